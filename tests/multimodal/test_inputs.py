"""Digests, cache keys and positions of images."""

import numpy as np
import pytest
import torch
import transformers

from sglite.interface.checks import TOKEN_ID_MAX
from sglite.multimodal.inputs import MultimodalInputs, MultimodalItem
from sglite.multimodal.keys import image_keys, pad_input_ids
from sglite.multimodal.rope_positions import Grid, mrope_positions
from tests.vision_checkpoints import RECIPES

PIXELS = torch.arange(24.0).view(4, 6)


def item(pixels=PIXELS, modality="image", start=2, stop=5, **data):
    return MultimodalItem(modality, pixels, start, stop, data)


class TestDigest:
    def test_depends_on_what_the_model_sees_and_not_on_where_it_stands(self):
        grid = torch.tensor([1, 2, 2])
        assert item(grid=grid).digest == item(PIXELS.clone(), start=9, stop=12, grid=grid).digest
        changed = PIXELS.clone()
        changed[3, 5] += 1e-6 * changed[3, 5]
        others = [
            item(changed, grid=grid),
            item(PIXELS.view(6, 4), grid=grid),
            item(PIXELS.double(), grid=grid),
            item(grid=torch.tensor([1, 4, 1])),
            item(grid=grid.int()),
            item(gird=grid),
            item(modality="video", grid=grid),
            item(grid=grid, interval=2.0),
            item(),
        ]
        digests = {item(grid=grid).digest, *(other.digest for other in others)}
        assert len(digests) == len(others) + 1

    def test_takes_what_lies_in_any_order(self):
        assert item(PIXELS.t().contiguous().t()).digest == item().digest


class TestKeys:
    def test_no_key_is_a_token(self):
        keys = image_keys(item().digest, 5000)
        assert keys.dtype == np.int64
        assert (keys < 0).all()
        assert TOKEN_ID_MAX > 0  # tokens are not negative

    def test_a_key_is_a_function_of_digest_and_offset(self):
        first = image_keys(item().digest, 300)
        assert np.array_equal(first[:7], image_keys(item().digest, 7))
        other = image_keys(item(PIXELS + 1).digest, 300)
        assert len(set(first.tolist()) | set(other.tolist())) == 600

    def test_every_bit_of_the_digest_counts(self):
        digest = int.from_bytes(item().digest, "little")
        others = [(digest ^ (1 << bit)).to_bytes(16, "little") for bit in range(128)]
        assert len({int(image_keys(other, 1)[0]) for other in others}) == 128

    def test_only_the_spans_are_replaced(self):
        inputs = MultimodalInputs([item(start=2, stop=5), item(PIXELS + 1, start=6, stop=8)])
        ids = [10, 11, 99, 99, 99, 12, 99, 99, 13]
        keys = pad_input_ids(ids, inputs)
        assert keys[[0, 1, 5, 8]].tolist() == [10, 11, 12, 13]
        assert np.array_equal(keys[2:5], image_keys(inputs.items[0].digest, 3))
        assert np.array_equal(keys[6:8], image_keys(inputs.items[1].digest, 2))


class TestSpans:
    def test_which_are_within_a_range_and_which_lie_around_a_border(self):
        inputs = MultimodalInputs([item(start=2, stop=5), item(start=5, stop=6)])
        assert inputs.overlapping(0, 2) == inputs.overlapping(6, 9) == []
        assert inputs.overlapping(4, 6) == list(inputs.items)
        assert [inputs.span_around(position) for position in range(7)] == [
            None,
            None,
            None,
            (2, 5),
            (2, 5),
            None,
            None,
        ]


class TestRopePositions:
    @pytest.mark.parametrize("seed", range(6))
    def test_are_hugging_faces(self, seed):
        draw = np.random.default_rng(seed)
        recipe = RECIPES["qwen2-vl"]
        config = transformers.Qwen2VLConfig(**recipe.config)
        with torch.device("meta"):
            model = transformers.Qwen2VLForConditionalGeneration._from_config(config)
        ids, kinds, grids, own = [], [], {1: [], 2: []}, []
        for _ in range(draw.integers(1, 5)):
            count = int(draw.integers(1, 6))
            ids += [5] * count
            kinds += [0] * count
            kind = int(draw.integers(1, 3))
            time = int(draw.integers(1, 5)) if kind == 2 else 1
            height, width = (int(value) for value in draw.integers(1, 5, 2))
            own.append(Grid(len(ids), time, height, width))
            grids[kind].append([time, 2 * height, 2 * width])
            ids += [9] * (time * height * width)
            kinds += [kind] * (time * height * width)
        ids += [5] * 3
        kinds += [0] * 3
        expected, delta = model.model.get_rope_index(
            torch.tensor([ids]),
            torch.tensor([kinds]),
            image_grid_thw=torch.tensor(grids[1]) if grids[1] else None,
            video_grid_thw=torch.tensor(grids[2]) if grids[2] else None,
        )
        positions, offset = mrope_positions(len(ids), own)
        assert np.array_equal(positions, expected[:, 0].numpy())
        assert offset == int(delta)

    def test_go_on_behind_the_prompt(self):
        positions, offset = mrope_positions(8, [Grid(1, 1, 2, 3)])
        inputs = MultimodalInputs([], positions, offset)
        assert positions[:, 7].tolist() == [4, 4, 4]
        assert inputs.rope_positions(6, 10).tolist() == [[1, 4, 5, 6], [2, 4, 5, 6], [3, 4, 5, 6]]
        assert inputs.rope_positions(9, 11).tolist() == [[6, 7]] * 3

    def test_of_text_count(self):
        positions, offset = mrope_positions(4, [])
        assert positions.tolist() == [[0, 1, 2, 3]] * 3
        assert offset == 0
