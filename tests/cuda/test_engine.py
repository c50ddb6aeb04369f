"""The engine on a GPU: graphs and what cannot be one, other threads, interrupts, same bits."""

import contextlib
import random
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from sglite import LLM, SamplingParams, register
from sglite.models.llama import LlamaForCausalLM
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

GREEDY = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("engine") / "model", "llama", dtype=torch.bfloat16, head_dim=64
    )


@pytest.fixture
def make_llm(checkpoint, engine_device):
    """Makes an `LLM`, closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(model=checkpoint, **keywords):
            keywords = {"kv_cache_tokens": 16_384, **keywords}
            return stack.enter_context(LLM(model, device=engine_device, **keywords))

        yield make


def prompts(count: int, longest: int = 120) -> list[list[int]]:
    source = random.Random(count)
    return [
        source.choices(range(2, VOCAB_SIZE), k=source.randint(1, longest)) for _ in range(count)
    ]


def tokens_of(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@contextlib.contextmanager
def caught_warnings():
    """Warnings of all threads, each time they are given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def about_graphs(caught) -> list[str]:
    return [str(warning.message) for warning in caught if "CUDA graph" in str(warning.message)]


class CountsCalls(LlamaForCausalLM):
    """Llama that knows how often Python came by; changes logits as `LlamaWrapper` does."""

    calls = 0

    def forward(self, *arguments, **keywords):
        type(self).calls += 1
        output = super().forward(*arguments, **keywords)
        logits = output.next_token_logits
        output.next_token_logits = torch.where(logits > 0, logits.sqrt(), logits)
        return output


def test_a_gpu_is_the_default_device(checkpoint, needs_gpu):
    with LLM(checkpoint, kv_cache_tokens=1024) as llm:
        assert llm.config.device.startswith("cuda")
        assert llm.config.cuda_graphs
    with LLM("demo", dtype="bfloat16", kv_cache_tokens=1024) as llm:
        assert "42" in llm.generate(QUESTION, temperature=0).text
        pieces = [chunk.text for chunk in llm.stream(QUESTION, temperature=0)]
        assert "42" in "".join(pieces)


@pytest.mark.parametrize("batch", [1, 5, 33])
def test_graphs_change_no_token(batch, make_llm):
    several = prompts(batch)
    # Graphs are padded, and only what is batch invariant has the same bits then.
    eager = make_llm(cuda_graphs=False, batch_invariant=True).generate(several, GREEDY)
    with caught_warnings() as caught:
        replayed = make_llm(batch_invariant=True).generate(several, GREEDY)
    assert not about_graphs(caught)
    assert tokens_of(replayed) == tokens_of(eager)


def test_a_users_model_is_captured(make_llm, engine_device):
    @register("CountsCalls")
    class Counting(CountsCalls):
        calls = 0

    settings = {"architecture": "CountsCalls", "batch_invariant": True}
    several = prompts(3)
    eager = make_llm(**settings, cuda_graphs=False).generate(several, GREEDY)
    calls_without, Counting.calls = Counting.calls, 0
    assert calls_without >= GREEDY.max_new_tokens
    with caught_warnings() as caught:
        replayed = make_llm(**settings).generate(several, GREEDY)
    assert not about_graphs(caught)
    assert tokens_of(replayed) == tokens_of(eager)
    if engine_device == "cuda":
        assert Counting.calls < calls_without // 2, "each step went through Python"


def test_a_model_that_asks_the_host_runs_without_a_graph_and_says_so_once(make_llm, needs_gpu):
    @register("AsksTheHost")
    class AsksTheHost(LlamaForCausalLM):
        def forward(self, *arguments, **keywords):
            output = super().forward(*arguments, **keywords)
            if output.next_token_logits.max().item() > 1e6:
                raise RuntimeError("not reached")
            return output

    several = prompts(4)
    expected = make_llm(cuda_graphs=False, batch_invariant=True).generate(several, GREEDY)
    with caught_warnings() as caught:
        llm = make_llm(architecture="AsksTheHost", batch_invariant=True)
        outputs = llm.generate(several, GREEDY)
        llm.generate(several[:1], GREEDY)
    (message,) = about_graphs(caught)
    assert "AsksTheHost" in message
    assert "_local_scalar_dense" in message or "item" in message
    assert tokens_of(outputs) == tokens_of(expected)


def test_a_model_whose_replay_differs_runs_without_a_graph_and_says_so_once(make_llm, needs_gpu):
    @register("CountsInPython")
    class CountsInPython(LlamaForCausalLM):
        calls = 0

        def forward(self, *arguments, **keywords):
            output = super().forward(*arguments, **keywords)
            # What Python counts, a graph would hold on to.
            type(self).calls += 1
            output.next_token_logits = output.next_token_logits.roll(type(self).calls, dims=-1)
            return output

    with caught_warnings() as caught:
        llm = make_llm(architecture="CountsInPython")
        llm.generate(prompts(2), GREEDY)
        llm.generate(prompts(5), GREEDY)
    (message,) = about_graphs(caught)
    assert "CountsInPython" in message
    assert CountsInPython.calls >= 2 * (GREEDY.max_new_tokens - 1)


def test_a_model_may_opt_out(make_llm, needs_gpu):
    @register("OptsOut")
    class OptsOut(CountsCalls):
        cuda_graphs = False
        calls = 0

    with caught_warnings() as caught:
        make_llm(architecture="OptsOut").generate(prompts(2), GREEDY)
    assert not about_graphs(caught)
    assert OptsOut.calls >= GREEDY.max_new_tokens


def test_other_threads_may_use_cuda_during_capture(make_llm, needs_gpu):
    several = prompts(20)
    expected = make_llm(batch_invariant=True, cuda_graphs=False).generate(several, GREEDY)
    stop, failures = threading.Event(), []

    def disturb(index: int):
        try:
            while not stop.is_set():
                values = torch.full((512, 512), 0.5, device="cuda")
                (values @ values).sum().item()
                if index:
                    torch.cuda.empty_cache()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=disturb, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    try:
        with caught_warnings() as caught:
            llm = make_llm(batch_invariant=True)
            for count in range(1, 21):  # a graph for each size
                outputs = llm.generate(several[:count], GREEDY, progress=False)
                assert tokens_of(outputs) == tokens_of(expected)[:count]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    assert not about_graphs(caught)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_bits_alone_and_in_a_batch(dtype, make_llm):
    """Drawn tokens and log-probabilities are equal to the last bit, however a prompt runs."""
    several = prompts(24, longest=300)
    params = [
        SamplingParams(
            temperature=0.9, top_p=0.95, max_new_tokens=30, ignore_eos=True, seed=seed, logprobs=2
        )
        for seed in range(len(several))
    ]

    def run(llm, order):
        outputs = llm.generate(
            [several[index] for index in order], [params[index] for index in order], progress=False
        )
        return {
            index: [
                (token, sorted((key, value.logprob) for key, value in entry.items()))
                for token, entry in zip(output.token_ids, output.logprobs, strict=True)
            ]
            for index, output in zip(order, outputs, strict=True)
        }

    settings = {"dtype": dtype, "batch_invariant": True}
    llm = make_llm(**settings, prefix_cache=False)
    alone = {}
    for index in range(len(several)):
        alone |= run(llm, [index])
    assert run(llm, range(24)) == alone
    llm = make_llm(**settings, chunked_prefill_size=77)
    assert run(llm, range(23, -1, -1)) == alone
    assert run(llm, range(24)) == alone  # out of the prefix cache
    llm = make_llm(**settings, kv_cache_tokens=512)
    assert run(llm, range(24)) == alone
    assert llm.stats()["preemptions"] > 0
    llm = make_llm(**settings, cuda_graphs=False)
    assert run(llm, range(24)) == alone


_INTERRUPTED = """
import os, signal, sys, threading, time
from sglite import LLM
llm = LLM("demo", device=sys.argv[1], kv_cache_tokens=65536)
llm.generate(["Hi"] * 8, ignore_eos=True, max_new_tokens=4)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:  # a call is under way whenever the signal comes
        llm.generate(["Hi"] * 8, ignore_eos=True, max_new_tokens=900)
except KeyboardInterrupt:
    print("interrupted;", llm.stats()["running"], "running")
print(llm.generate("What is 17 + 25?", temperature=0).text)
"""


def test_an_interrupt_ends_the_call_and_the_next_one_works(engine_device):
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, engine_device],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "interrupted; 0 running" in done.stdout
    assert "42" in done.stdout
