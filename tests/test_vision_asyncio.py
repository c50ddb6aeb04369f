"""Prompts with pictures, and long ones, in a running event loop: they are read beside it."""

import asyncio
import time

import pytest

from sglite import LLM, InvalidRequestError, SamplingParams
from sglite.engine.tokenizer import Tokenizer
from sglite.multimodal.qwen_vl import QwenVLImageProcessor
from tests.vision_checkpoints import make_vision_checkpoint, picture

SECONDS = 0.4
PARAMS = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)
PROMPT = {"text": "<image>what?", "images": [picture(30, 30, 1)]}
LONG = "word " * 3000


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_vision_checkpoint(tmp_path_factory.mktemp("vision"))
    with LLM(folder, kv_cache_tokens=2048) as model:
        yield model


@pytest.fixture
def slow(monkeypatch):
    """Pictures and long texts take `SECONDS` to be read."""
    process, encode = QwenVLImageProcessor.process_image, Tokenizer.encode

    def slow_process(self, image):
        time.sleep(SECONDS)
        return process(self, image)

    def slow_encode(self, text, **keywords):
        if len(text) > len(LONG) // 2:
            time.sleep(SECONDS)
            text = text[:50]  # the model's context is short
        return encode(self, text, **keywords)

    monkeypatch.setattr(QwenVLImageProcessor, "process_image", slow_process)
    monkeypatch.setattr(Tokenizer, "encode", slow_encode)


async def longest_pause(work):
    """What `work` gives, and the longest time for which nothing else ran in the loop, seconds."""
    pauses = []

    async def tick():
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            pauses.append(now - before)
            before = now

    clock = asyncio.create_task(tick())
    result = await work
    clock.cancel()
    return result, max(pauses)


async def collected(stream):
    return "".join([chunk.text async for chunk in stream])


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["picture", "long text"])
def test_the_loop_goes_on_while_a_prompt_is_read(llm, slow, prompt):
    expected = llm.generate(prompt, PARAMS).text
    output, pause = asyncio.run(longest_pause(llm.agenerate(prompt, PARAMS)))
    assert output.text == expected
    assert pause < SECONDS / 2
    text, pause = asyncio.run(longest_pause(collected(llm.astream(prompt, PARAMS))))
    assert text == expected
    assert pause < SECONDS / 2


@pytest.mark.parametrize("streams", [False, True])
def test_cancelling_meanwhile_leaves_nothing(llm, slow, streams):
    async def main():
        before = llm.stats()
        call = collected(llm.astream(PROMPT)) if streams else llm.agenerate(PROMPT)
        task = asyncio.create_task(call)
        await asyncio.sleep(SECONDS / 4)
        task.cancel()
        start = time.perf_counter()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.perf_counter() - start < SECONDS / 2
        await asyncio.sleep(1.5 * SECONDS)
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
