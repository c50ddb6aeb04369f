"""The methods for event loops: awaited, streamed, cancelled, batched."""

import asyncio
import os
import signal
import threading

import pytest

from sglite import LLM, EngineClosedError, GenerationError, InvalidRequestError
from tests.children import run_in_child

PROMPTS = ["What is 17 + 25?", "The capital of France is", "Count from 3 to 12."]
ENDLESS = {"ignore_eos": True, "max_new_tokens": 900}


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=8192) as model:
        yield model


@pytest.fixture(scope="module")
def expected(llm):
    return [output.text for output in llm.generate(PROMPTS, temperature=0)]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def is_idle(llm):
    stats = llm.stats()
    return stats["running"] == stats["waiting"] == 0


def test_one_prompt_and_a_list(llm, expected):
    async def main():
        assert (await llm.agenerate(PROMPTS[0], temperature=0)).text == expected[0]
        outputs = await llm.async_generate(PROMPTS, {"temperature": 0})
        assert [output.text for output in outputs] == expected
        assert await llm.agenerate([]) == []

    asyncio.run(main())


def test_many_tasks_share_batches_and_the_loop_goes_on(llm):
    async def main():
        beats = 0

        async def beat():
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        heart = asyncio.create_task(beat())
        before = llm.stats()["steps"]
        calls = [
            llm.agenerate(PROMPTS[0], seed=seed, max_new_tokens=30, ignore_eos=True)
            for seed in range(20)
        ]
        outputs = await asyncio.gather(*calls)
        heart.cancel()
        # One after the other they take 20 x 30 steps.
        assert llm.stats()["steps"] - before < 200
        assert beats > 100
        return outputs

    outputs = asyncio.run(main())
    for seed, output in enumerate(outputs):
        alone = llm.generate(PROMPTS[0], seed=seed, max_new_tokens=30, ignore_eos=True)
        assert output.token_ids == alone.token_ids


def test_a_stream_adds_up(llm, expected):
    async def main():
        texts = [""] * len(PROMPTS)
        async for chunk in llm.astream(PROMPTS, temperature=0):
            texts[chunk.index] += chunk.text
        return texts

    assert asyncio.run(main()) == expected


def test_cancelling_the_task_ends_its_requests_and_no_others(llm, expected):
    async def main():
        unwanted = asyncio.create_task(llm.agenerate(["Hi"] * 3, **ENDLESS))
        await until(lambda: llm.stats()["running"] == 3)
        wanted = asyncio.create_task(llm.agenerate(PROMPTS, temperature=0))
        unwanted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unwanted
        assert [output.text for output in await wanted] == expected
        await asyncio.wait_for(until(lambda: is_idle(llm)), 100)

    asyncio.run(main())


@pytest.mark.parametrize("closes", [False, True])
def test_leaving_a_stream_early_frees_its_request(llm, closes):
    async def main():
        stream = llm.astream("Hi", **ENDLESS)
        async for _ in stream:
            break
        if closes:
            await stream.aclose()
        else:
            del stream
        await asyncio.wait_for(until(lambda: is_idle(llm)), 100)

    asyncio.run(main())


def test_a_timeout_is_a_cancellation(llm):
    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.agenerate("Hi", **ENDLESS), 0.02)
        await asyncio.wait_for(until(lambda: is_idle(llm)), 100)

    asyncio.run(main())


def test_an_error_reaches_its_own_task(llm, expected):
    def broken(token_ids, logits):
        raise ValueError("mine")

    async def main():
        failing = llm.agenerate("Hi", logits_processors=[broken])
        results = await asyncio.gather(
            failing, llm.agenerate(PROMPTS, temperature=0), return_exceptions=True
        )
        assert isinstance(results[0], GenerationError)
        assert [output.text for output in results[1]] == expected
        with pytest.raises(InvalidRequestError):
            await llm.agenerate("Hi", temperature=-1)
        with pytest.raises(InvalidRequestError):
            llm.astream("Hi", temperature=-1)

    asyncio.run(main())


def test_the_synchronous_methods_work_in_a_running_loop(llm, expected):
    async def main():
        assert [output.text for output in llm.generate(PROMPTS, temperature=0)] == expected
        assert "".join(c.text for c in llm.stream(PROMPTS[0], temperature=0)) == expected[0]

    asyncio.run(main())


def test_threads_and_tasks_share_batches(llm, expected):
    texts = []
    thread = threading.Thread(
        target=lambda: texts.extend(out.text for out in llm.generate(PROMPTS, temperature=0))
    )

    async def main():
        thread.start()
        return [output.text for output in await llm.agenerate(PROMPTS, temperature=0)]

    assert asyncio.run(main()) == expected
    thread.join()
    assert texts == expected


def test_a_loop_that_ends_takes_its_requests_along(llm):
    loop = asyncio.new_event_loop()
    task = loop.create_task(llm.agenerate("Hi", **ENDLESS))
    loop.run_until_complete(until(lambda: llm.stats()["running"] == 1))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    asyncio.run(asyncio.wait_for(until(lambda: is_idle(llm)), 100))


def test_closing_ends_what_tasks_wait_for():
    async def main():
        model = LLM("demo", kv_cache_tokens=2048)
        task = asyncio.create_task(model.agenerate("Hi", **ENDLESS))
        await until(lambda: model.stats()["running"] == 1)
        model.shutdown()
        with pytest.raises(EngineClosedError, match="while the call was running"):
            await task
        with pytest.raises(EngineClosedError):
            await model.agenerate("Hi")

    asyncio.run(main())


def interrupt_a_task():
    """A child process: Ctrl-C while `asyncio.run` awaits a generation."""
    model = LLM("demo", kv_cache_tokens=2048)

    async def main():
        task = asyncio.create_task(model.agenerate("Hi", **ENDLESS))
        await until(lambda: model.stats()["running"] == 1)
        os.kill(os.getpid(), signal.SIGINT)
        await task

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("interrupted")
    assert "42" in asyncio.run(model.agenerate(PROMPTS[0], temperature=0)).text


def test_an_interrupt_in_a_real_process():
    assert run_in_child(interrupt_a_task) == "interrupted\n"
