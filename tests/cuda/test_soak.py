"""Thousands of requests through a small cache: all finish, no page and no byte is lost.

`SGLITE_SOAK_REQUESTS=10000` (`make soak-cuda`) for the long run.
"""

import os
import random
import threading

import pytest
import torch

from sglite import LLM, SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

NUM_REQUESTS = int(os.environ.get("SGLITE_SOAK_REQUESTS", "600"))
KV_TOKENS = 2048
ROUNDS = 10  # memory is looked at after each
CALLERS = 3
MIB = 1 << 20

pytestmark = pytest.mark.timeout(max(300, NUM_REQUESTS // 5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak") / "model"
    return make_checkpoint(folder, "llama", dtype=torch.bfloat16, head_dim=64)


def draw_request(source: random.Random, shared: list[list[int]]) -> tuple[list, SamplingParams]:
    """A prompt of up to 300 tokens and its parameters, of all kinds."""
    own = source.choices(range(2, VOCAB_SIZE), k=source.randint(1, 150))
    start = source.choice(shared)
    prompt = start[: source.randint(0, len(start))] + own
    choices = {
        "temperature": source.choice([0.0, 0.7, 1.5]),
        "top_k": source.choice([-1, 1, 20]),
        "top_p": source.choice([1.0, 0.9]),
        "min_p": source.choice([0.0, 0.1]),
        "repetition_penalty": source.choice([1.0, 1.0, 1.2]),
        "logprobs": source.choice([None, None, None, 2]),
        "seed": source.choice([None, source.randrange(1 << 40)]),
        "ignore_eos": source.random() < 0.5,
    }
    return prompt, SamplingParams(max_new_tokens=source.randint(1, 100), **choices)


def check_output(prompt: list[int], params: SamplingParams, output) -> None:
    assert output.error is None
    assert output.finish_reason in ("stop", "length")
    assert output.usage.prompt_tokens == len(prompt)
    count = len(output.token_ids)
    assert 1 <= count <= params.max_new_tokens
    assert count == params.max_new_tokens or output.finish_reason == "stop"
    assert all(0 <= token < VOCAB_SIZE for token in output.token_ids)


def soak(llm: LLM, seed: int, count: int) -> None:
    """One caller: batches, single prompts, and streams that are left early."""
    source = random.Random(seed)
    shared = [random.Random(index).choices(range(2, VOCAB_SIZE), k=150) for index in range(4)]
    while count > 0:
        size = min(count, source.choice([1, 7, 40]))
        requests = [draw_request(source, shared) for _ in range(size)]
        prompts, params = map(list, zip(*requests, strict=True))
        if size == 1 and source.random() < 0.3:
            stream = llm.stream(prompts, params)
            next(stream)
            stream.close()
        else:
            outputs = llm.generate(prompts, params, progress=False)
            for prompt, parameters, output in zip(prompts, params, outputs, strict=True):
                check_output(prompt, parameters, output)
        count -= size


def check_idle(llm: LLM, prefix_cache: bool) -> None:
    """Nothing runs or waits, and every page is free or in the prefix cache."""
    stats = llm.stats()
    assert stats["running"] == stats["waiting"] == 0
    assert stats["kv_tokens_total"] >= KV_TOKENS
    if prefix_cache:
        assert stats["kv_tokens_cached"] <= stats["kv_tokens_used"] <= stats["kv_tokens_total"]
    else:
        assert stats["kv_tokens_used"] == stats["kv_tokens_cached"] == 0
    # Free, in the tree, and reserved pages are all pages, each once.
    llm._open.engine.scheduler.cache.check_invariant()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_request_finishes_and_memory_stays_flat(prefix_cache, checkpoint, engine_device):
    errors, memory = [], []

    def caller(seed: int, count: int) -> None:
        try:
            soak(llm, seed, count)
        except BaseException as error:
            errors.append(error)

    with LLM(
        checkpoint,
        dtype="bfloat16",
        device=engine_device,
        kv_cache_tokens=KV_TOKENS,
        max_running_requests=32,
        chunked_prefill_size=256,
        prefix_cache=prefix_cache,
    ) as llm:
        for round_number in range(ROUNDS):
            share = NUM_REQUESTS // 2 // ROUNDS // CALLERS
            threads = [
                threading.Thread(target=caller, args=(round_number * CALLERS + index, share))
                for index in range(CALLERS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors, errors
            check_idle(llm, prefix_cache)
            if engine_device == "cuda":
                torch.cuda.synchronize()
                memory.append((torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
        stats = llm.stats()
    assert stats["preemptions"] > 0, "the cache was to be too small"
    assert stats["cached_tokens"] > 0 or not prefix_cache
    if memory:
        # By the third round every batch size has been captured.
        allocated, free = zip(*memory[2:], strict=True)
        assert max(allocated) - allocated[0] <= MIB, allocated
        assert free[0] - min(free) <= 4 * MIB, free
