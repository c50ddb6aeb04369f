"""Videos with the rate of their frames: how they are read, and the positions that come of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from sglite import LLM, InvalidRequestError, SamplingParams
from sglite.interface.prompts import normalize_prompts
from sglite.multimodal.qwen_vl import QwenVLImageProcessor
from sglite.multimodal.rope_positions import Grid, mrope_positions
from sglite.multimodal.videos import read_video
from tests.vision_checkpoints import RECIPES, make_vision_checkpoint, picture

FRAMES = [picture(60, 44, seed) for seed in range(7)]
PARAMS = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True, logprobs=0)


def test_a_dict_says_the_rate():
    assert read_video("x", FRAMES).fps is None
    assert read_video("x", {"frames": FRAMES}).fps is None
    found = read_video("x", {"frames": np.stack([np.asarray(FRAMES[0])] * 3), "fps": 5})
    assert (found.fps, len(found)) == (5.0, 3)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"fps": 2}, "x is a dict without 'frames'"),
        ({"frame": FRAMES}, "'frame'.*Did you mean 'frames'"),
        ({"frames": FRAMES, "fps": 0}, r"x\['fps'\]=0"),
        ({"frames": FRAMES, "fps": "fast"}, r"x\['fps'\]"),
        ({"frames": []}, "without a frame"),
        ({"frames": "a.mp4"}, "not decoded here"),
    ],
)
def test_what_is_wrong_is_named(video, message):
    with pytest.raises(InvalidRequestError, match=message):
        read_video("x", video)


def test_prompts_take_one_alone():
    video = {"frames": FRAMES, "fps": 3}
    for videos in (video, [video]):
        (prompt,), _ = normalize_prompts("<video>", videos=videos)
        assert prompt.videos == (video,)
    prompts, _ = normalize_prompts([{"text": "a", "videos": video}, "b"], videos=[None, [FRAMES]])
    assert [prompt.videos for prompt in prompts] == [(video,), (FRAMES,)]


def config_with(tokens_per_second):
    recipe = RECIPES["qwen2.5-vl"].config
    vision = {**recipe["vision_config"], "tokens_per_second": tokens_per_second}
    return transformers.Qwen2_5_VLConfig(**{**recipe, "vision_config": vision})


@pytest.fixture(scope="module")
def config():
    return config_with(4)


@pytest.mark.parametrize("tokens_per_second", [2, 25])
@pytest.mark.parametrize("fps", [0.5, 1, 1.3, 2, 3, 6, 9, 23.976, 24, 30, 49, 55])
def test_positions_are_hugging_faces(fps, tokens_per_second):
    """Of a long video, where products in another precision fall short of a whole number."""
    config = config_with(tokens_per_second)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    count = 200 * 2 * 3
    ids = torch.tensor([[5] * 3 + [9] * count + [5] * 4])
    kinds = torch.tensor([[0] * 3 + [2] * count + [0] * 4])
    expected, delta = model.model.get_rope_index(
        ids,
        kinds,
        video_grid_thw=torch.tensor([[200, 4, 6]]),
        second_per_grid_ts=torch.tensor([2 / fps]),
    )
    processor = SimpleNamespace(
        hf_config=config,
        image_processor=SimpleNamespace(temporal_patch_size=2),
        _processor=SimpleNamespace(video_settings={}),
    )
    interval = QwenVLImageProcessor.video_data(processor, fps)["interval"]
    positions, offset = mrope_positions(ids.shape[1], [Grid(3, 200, 2, 3, interval)])
    assert np.array_equal(positions, expected[:, 0].numpy())
    assert offset == int(delta)


@pytest.mark.parametrize("fps", [None, 1.0, 5.0])
def test_the_rate_reaches_the_model(tmp_path, config, fps):
    """What a request has is what Hugging Face makes of `second_per_grid_ts`."""
    vision = config.vision_config.to_dict()
    folder = make_vision_checkpoint(tmp_path, "qwen2.5-vl", vision_config=vision)
    with LLM(folder, kv_cache_tokens=512) as llm:
        reader = llm._open.intake.reader
        (prompt,), _ = normalize_prompts("a<video>b", videos={"frames": FRAMES, "fps": fps})
        token_ids, inputs, _ = reader.read("x", prompt)
        (item,) = inputs.items
        with torch.device("meta"):
            model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
        ids = torch.tensor([token_ids])
        expected, _ = model.model.get_rope_index(
            ids,
            2 * (ids == config.video_token_id).long(),
            video_grid_thw=item.data["grid_thw"][None],
            second_per_grid_ts=torch.tensor([2 / (fps or 2.0)]),
        )
        assert np.array_equal(inputs.positions, expected[:, 0].numpy())


def test_every_way_in_takes_it(tmp_path, config):
    vision = config.vision_config.to_dict()
    folder = make_vision_checkpoint(tmp_path, "qwen2.5-vl", vision_config=vision)
    slow, usual = {"frames": FRAMES, "fps": 0.5}, FRAMES
    with LLM(folder, kv_cache_tokens=1024) as llm:

        def scores(output):
            return [next(iter(entry.values())).logprob for entry in output.logprobs]

        def of(video):
            return scores(llm.generate("a<video>b", PARAMS, videos=[video]))

        assert of(usual) == of({"frames": FRAMES}) == of({"frames": FRAMES, "fps": 2})
        assert of(usual) != of(slow)
        assert scores(llm.generate({"text": "a<video>b", "videos": slow}, PARAMS)) == of(slow)
        # Another rate is another picture to the prefix cache.
        before = llm.stats()["images_encoded"]
        assert llm.generate("a<video>b", PARAMS, videos=[slow]).usage.cached_tokens > 8
        assert llm.stats()["images_encoded"] == before

        def said(*parts):
            return scores(llm.chat([{"role": "user", "content": list(parts)}], PARAMS))

        part = {"type": "video", "video": FRAMES}
        assert said(part) == said({**part, "fps": 2.0})
        assert said(part) != said({**part, "fps": 0.5})
        assert said({**part, "fps": 0.5}) == said({"type": "video", "video": slow})
