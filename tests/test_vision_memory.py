"""Pixels of prompts: how long they stay, and that giving them up changes nothing."""

import base64
import gc
import io
import time

import numpy as np
import pytest
import torch

from sglite import LLM, SamplingParams
from sglite.engine import calls
from sglite.engine.image_features import ImageFeatures
from sglite.interface.prompts import normalize_prompts
from sglite.multimodal.inputs import MultimodalItem
from tests.vision_checkpoints import make_vision_checkpoint, picture

PARAMS = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
# Files of these are smaller than their pixels, and so are copies of the pictures.
PICTURES = [picture(48, 40, seed) for seed in range(6)]
PROMPTS = [
    {"text": f"<image>a<image>{'b' * seed}", "images": [one, PICTURES[0]]}
    for seed, one in enumerate(PICTURES)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_vision_checkpoint(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def expected(folder):
    with LLM(folder, kv_cache_tokens=4096) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def pixels_alive():
    """What the pixels of all items in the process take."""
    gc.collect()
    items = [one for one in gc.get_objects() if type(one) is MultimodalItem]
    tensors = {id(item.pixel_values): item.pixel_values for item in items}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


@pytest.mark.parametrize("options", [{}, {"image_cache_bytes": 0, "prefix_cache": False}])
def test_a_call_that_may_keep_none_gives_the_same(folder, expected, monkeypatch, options):
    monkeypatch.setattr(calls, "_MOST_PIXEL_BYTES", 0)
    with LLM(folder, kv_cache_tokens=4096, **options) as llm:
        work = llm._open.calls.prepare(*normalize_prompts(PROMPTS), PARAMS, {})
        assert all(group.num_pixel_bytes == 0 for group in work.groups)
        outputs = llm._open.calls.run(work, False)
        assert [output.token_ids for output in outputs] == expected


def test_within_the_limit_nothing_is_made_twice(folder, monkeypatch):
    made = []
    with LLM(folder, kv_cache_tokens=4096) as llm:
        kind = type(llm._open.intake.reader.processor)
        process = kind.process_images
        monkeypatch.setattr(
            kind, "process_images", lambda self, images: made.append(1) or process(self, images)
        )
        llm.generate(PROMPTS, PARAMS)
    assert len(made) == len(PROMPTS)


def test_after_preemption(folder, expected, monkeypatch):
    """Everything has gone by then: keys and values, embeddings, and pixels."""
    with LLM(folder, kv_cache_tokens=4096) as llm:
        longest = max(len(o.prompt_token_ids) for o in llm.generate(PROMPTS, PARAMS))
    options = {"image_cache_bytes": 0, "prefix_cache": False, "page_size": 4}
    with LLM(folder, kv_cache_tokens=2 * longest + 2, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        assert llm.stats()["preemptions"] > 0
        assert [output.token_ids for output in outputs] == expected


def test_none_is_left_once_prompts_are_computed(folder, monkeypatch):
    """While the call still runs, and in what is kept of it afterwards."""
    most, of_step = [], ImageFeatures.of_step

    def watched(self, *arguments):
        found = of_step(self, *arguments)
        most.append(pixels_alive())
        return found

    with LLM(folder, kv_cache_tokens=4096, chunked_prefill_size=64) as llm:
        before = pixels_alive()
        monkeypatch.setattr(ImageFeatures, "of_step", watched)
        outputs = llm.generate(PROMPTS, PARAMS)
        assert len(outputs) == len(PROMPTS)
        assert most[0] > most[len(most) // 2] > most[-1] == before
        assert pixels_alive() == before


def test_pictures_may_change_once_the_call_has_begun(folder, monkeypatch, tmp_path):
    """What is kept to make pixels again is out of the caller's hands."""
    own = [picture(48, 40, seed) for seed in range(20, 30)]
    files = [encoded(one) for one in own]
    with LLM(folder, kv_cache_tokens=4096) as llm:
        prompts = [{"text": "<image>a", "images": [file]} for file in files]
        expected = [output.token_ids for output in llm.generate(prompts, PARAMS)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, file in zip(paths, files[:3], strict=True):
        path.write_bytes(file)
    array, rgb = np.array(own[4]), own[6].copy()
    tensor = torch.tensor(np.array(own[5])).permute(2, 0, 1).contiguous()
    buffer, fetched = bytearray(files[7]), {"http://a/a.png": files[8]}
    url = "data:image/png;base64," + base64.b64encode(files[3]).decode()
    images = [paths[0], str(paths[1]), f"file://{paths[2]}", url, array, tensor, rgb, buffer]
    images += [*fetched, files[9]]
    monkeypatch.setattr(calls, "_MOST_PIXEL_BYTES", 0)
    with LLM(folder, kv_cache_tokens=4096, image_fetcher=fetched.__getitem__) as llm:
        prompts = [{"text": "<image>a", "images": [given]} for given in images]
        work = llm._open.calls.prepare(*normalize_prompts(prompts), PARAMS, {})
        array[:], buffer[:] = 0, b"\0" * len(buffer)
        tensor.zero_()
        rgb.paste((0, 0, 0), (0, 0, *rgb.size))
        for path in paths:
            path.unlink()
        fetched.clear()
        outputs = llm._open.calls.run(work, False)
    assert [output.token_ids for output in outputs] == expected
    assert len(set(map(tuple, expected))) == len(expected)


def test_what_was_interrupted_goes_on(folder, expected, monkeypatch):
    """Its pixels had been given up by then."""
    wait = calls.Calls._wait

    def interrupted(self, call, *arguments):
        while not all(request.output_token_ids for request in call.requests):
            time.sleep(0.001)
        raise KeyboardInterrupt

    options = {"image_cache_bytes": 0, "prefix_cache": False}
    with LLM(folder, kv_cache_tokens=4096, **options) as llm:
        monkeypatch.setattr(calls.Calls, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, max_new_tokens=60)
        monkeypatch.setattr(calls.Calls, "_wait", wait)
        resumed = llm.resume(progress=False)
    assert [output.token_ids[:6] for output in resumed] == expected
