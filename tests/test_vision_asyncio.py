"""Prompts with pictures, and long ones, in a running event loop: they are read beside it."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from sglite import LLM, InvalidRequestError, SamplingParams
from sglite.engine.tokenizer import Tokenizer
from sglite.multimodal.qwen_vl import QwenVLImageProcessor
from tests.vision_checkpoints import make_vision_checkpoint, picture

SECONDS = 0.1
PARAMS = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)
PROMPT = {"text": "<image>what?", "images": [picture(30, 30, 1)]}
LONG = "word " * 3000


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_vision_checkpoint(tmp_path_factory.mktemp("vision"))
    with LLM(folder, kv_cache_tokens=2048) as model:
        yield model


def hold_reading(monkeypatch, wait):
    """Has `wait` called where a picture or a long text is read."""
    process, encode = QwenVLImageProcessor.process_image, Tokenizer.encode

    def slow_process(self, image):
        wait()
        return process(self, image)

    def slow_encode(self, text, **keywords):
        if len(text) > len(LONG) // 2:
            wait()
            text = text[:50]  # the model's context is short
        return encode(self, text, **keywords)

    monkeypatch.setattr(QwenVLImageProcessor, "process_image", slow_process)
    monkeypatch.setattr(Tokenizer, "encode", slow_encode)


@pytest.fixture
def slow(monkeypatch):
    """Pictures and long texts take `SECONDS` to be read."""
    hold_reading(monkeypatch, lambda: time.sleep(SECONDS))


@pytest.fixture
def reading(monkeypatch):
    """Pictures and long texts are read until `may_end` is set, as it is at first."""
    events = SimpleNamespace(begun=threading.Event(), may_end=threading.Event())
    events.may_end.set()

    def wait():
        events.begun.set()
        if not events.may_end.wait(100):
            raise TimeoutError("nothing else has run meanwhile")

    hold_reading(monkeypatch, wait)
    return events


async def collected(stream):
    return "".join([chunk.text async for chunk in stream])


async def begin(call, reading):
    """A task of the call, whose prompt is being read by now."""
    reading.begun.clear()
    reading.may_end.clear()
    task = asyncio.create_task(call)
    while not reading.begun.is_set():
        await asyncio.sleep(0.001)
    return task


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["picture", "long text"])
def test_the_loop_goes_on_while_a_prompt_is_read(llm, reading, prompt):
    expected = llm.generate(prompt, PARAMS).text

    async def main(call):
        task = await begin(call, reading)
        # That this line is reached is the point: reading goes on until it says so.
        reading.may_end.set()
        return await task

    assert asyncio.run(main(llm.agenerate(prompt, PARAMS))).text == expected
    assert asyncio.run(main(collected(llm.astream(prompt, PARAMS)))) == expected


@pytest.mark.parametrize("streams", [False, True])
def test_cancelling_meanwhile_leaves_nothing(llm, reading, streams):
    async def main():
        before = llm.stats()
        call = collected(llm.astream(PROMPT)) if streams else llm.agenerate(PROMPT)
        task = await begin(call, reading)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        reading.may_end.set()
        await asyncio.sleep(0.2)
        assert llm.stats() == before

    asyncio.run(main())


def test_what_is_wrong_is_said_where_it_is_waited_for(llm):
    broken = {"text": "<image>", "images": [b"no picture"]}

    async def main():
        with pytest.raises(InvalidRequestError, match="no image"):
            await llm.agenerate(broken)
        stream = llm.astream(broken)
        with pytest.raises(InvalidRequestError, match="no image"):
            await anext(stream)
        with pytest.raises(InvalidRequestError, match="temperature"):
            llm.astream(broken, temperature=-1)

    asyncio.run(main())


def test_seeds_are_drawn_in_the_order_of_the_calls(llm, monkeypatch):
    """And not in the order in which threads have read the prompts."""
    process = QwenVLImageProcessor.process_image

    def slower_first(self, image):
        time.sleep(0.3 if image.size == PROMPT["images"][0].size else 0)
        return process(self, image)

    monkeypatch.setattr(QwenVLImageProcessor, "process_image", slower_first)
    quick = {"text": "<image>what?", "images": [picture(40, 20, 2)]}

    async def seeds(model):
        calls = [model.agenerate(prompt, max_new_tokens=1) for prompt in (PROMPT, quick)]
        return [output.outputs[0].seed for output in await asyncio.gather(*calls)]

    found = []
    for _ in range(2):
        with LLM(llm.config.model, kv_cache_tokens=512, seed=3) as own:
            found.append(asyncio.run(seeds(own)))
    with LLM(llm.config.model, kv_cache_tokens=512, seed=3) as own:
        outputs = own.generate([PROMPT, quick], max_new_tokens=1)
    assert found[0] == found[1] == [output.outputs[0].seed for output in outputs]


def test_the_clock_of_the_first_token_starts_with_the_call(llm, slow):
    for output in (
        llm.generate(PROMPT, PARAMS),
        llm.chat(
            [{"role": "user", "content": [{"type": "image", "image": picture(30, 30)}]}], PARAMS
        ),
        list(llm.stream(PROMPT, PARAMS))[-1].output,
        asyncio.run(llm.agenerate(PROMPT, PARAMS)),
        llm.generate([LONG, "short"], PARAMS)[1],
    ):
        assert SECONDS <= output.usage.time_to_first_token <= output.usage.latency
