"""A GPU's memory: taken as agreed, given back in full, and refused in words that help."""

import gc
import random
import re
import threading

import pytest
import torch

from sglite import LLM, OutOfMemoryError, SamplingParams
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

MIB = 1 << 20
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
LAYERS, KV_HEADS, HEAD_DIM = 2, 4, 64
KV_BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2

pytestmark = pytest.mark.usefixtures("needs_gpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """About 70 MB of weights."""
    return make_checkpoint(
        tmp_path_factory.mktemp("memory") / "model",
        "llama",
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [source.choices(range(2, VOCAB_SIZE), k=source.randint(1, 200)) for _ in range(count)]


def use(llm: LLM) -> None:
    """Prefill, and graphs of several sizes."""
    for count in (1, 3, 8):
        llm.generate(prompts(count), GREEDY, progress=False)


def wait_for_driver() -> None:
    for thread in threading.enumerate():
        if thread.name == "sglite-driver":
            thread.join()


@pytest.fixture
def baseline(checkpoint):
    """What is free after a first LLM was made, used and closed."""
    gc.collect()  # what a test before this one has left when it failed
    torch.cuda.empty_cache()
    with LLM(checkpoint, device="cuda") as llm:
        use(llm)
    return free_bytes()


def by_close(llm: LLM) -> None:
    llm.close()


def by_with(llm: LLM) -> None:
    with llm:
        use(llm)


@pytest.mark.parametrize("leave", [by_close, by_with])
@pytest.mark.parametrize("keywords", [{}, {"kv_cache_tokens": 16_384, "cuda_graphs": False}])
def test_closing_gives_everything_back(leave, keywords, checkpoint, baseline):
    llm = LLM(checkpoint, device="cuda", **keywords)
    use(llm)
    assert baseline - free_bytes() > 60 * MIB
    leave(llm)
    assert abs(free_bytes() - baseline) <= MIB


def test_del_gives_everything_back_without_a_collection(checkpoint, baseline):
    gc.disable()
    try:
        llm = LLM(checkpoint, device="cuda", kv_cache_tokens=16_384)
        use(llm)
        wait_for_driver()
        del llm
        assert abs(free_bytes() - baseline) <= MIB
    finally:
        gc.enable()


def test_ten_models_one_after_the_other_leave_nothing(checkpoint, baseline):
    for _ in range(10):
        with LLM(checkpoint, device="cuda", kv_cache_tokens=16_384) as llm:
            use(llm)
    assert abs(free_bytes() - baseline) <= MIB


def test_an_interrupted_or_failed_start_leaves_nothing(checkpoint, baseline):
    with pytest.raises(OutOfMemoryError):
        LLM(checkpoint, device="cuda", kv_cache_tokens=1 << 40)
    gc.collect()
    # More may be free: an allocation that fails makes torch give back what it had kept.
    assert free_bytes() >= baseline - MIB


def test_two_models_share_a_card(checkpoint):
    several = prompts(6)

    def answers(llm):
        return [output.token_ids for output in llm.generate(several, GREEDY, progress=False)]

    with LLM(checkpoint, device="cuda", batch_invariant=True) as llm:
        alone = answers(llm)

    def run_two():
        found = {}
        with (
            LLM(checkpoint, device="cuda", mem_fraction=0.3, batch_invariant=True) as one,
            LLM(checkpoint, device="cuda", mem_fraction=0.3, batch_invariant=True) as other,
        ):
            threads = [
                threading.Thread(
                    target=lambda llm=llm, name=name: found.update({name: answers(llm)})
                )
                for name, llm in (("one", one), ("other", other))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == {"one": alone, "other": alone}
            one.close()
            assert answers(other) == alone

    # cuBLAS keeps a workspace for each of the most threads that ever worked at once.
    run_two()
    before = free_bytes()
    run_two()
    assert abs(free_bytes() - before) <= MIB


def test_kv_cache_tokens_is_taken_exactly(checkpoint, baseline):
    taken = []
    for tokens in (16_384, 16_384 + 65_536):
        with LLM(checkpoint, device="cuda", kv_cache_tokens=tokens) as llm:
            assert llm.config.kv_cache_tokens == llm.stats()["kv_tokens_total"] == tokens
            taken.append(baseline - free_bytes())
    assert taken[1] - taken[0] == pytest.approx(65_536 * KV_BYTES_PER_TOKEN, abs=8 * MIB)


def test_mem_fraction_is_a_share_of_what_is_free(checkpoint, baseline):
    # Few enough that the context and the number of requests do not bound the cache.
    fractions = {0.004: 0, 0.008: 0}
    for fraction in fractions:
        with LLM(checkpoint, device="cuda", mem_fraction=fraction) as llm:
            fractions[fraction] = llm.config.kv_cache_tokens * KV_BYTES_PER_TOKEN
    assert 0.003 * baseline <= fractions[0.004] <= 0.004 * baseline
    assert fractions[0.008] == pytest.approx(2 * fractions[0.004], rel=0.05)


def test_a_cache_that_is_too_large_is_refused_with_what_is_there(checkpoint, baseline):
    with pytest.raises(OutOfMemoryError) as caught:
        LLM(checkpoint, device="cuda", kv_cache_tokens=1 << 36)
    message = str(caught.value)
    needed = (1 << 36) * KV_BYTES_PER_TOKEN / 2**30
    assert f"{needed:.2f} GB" in message
    assert re.search(r"[\d.]+ GB are free", message)
    assert "kv_cache_tokens" in message


@pytest.mark.parametrize("left", [40 * MIB, 200 * MIB])
def test_a_full_card_is_refused_with_what_to_change(left, checkpoint, baseline):
    hog = torch.empty(free_bytes() - left, dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(OutOfMemoryError) as caught:
            LLM(checkpoint, device="cuda", chunked_prefill_size=65_536)
    finally:
        del hog
        torch.cuda.empty_cache()
    message = str(caught.value)
    assert re.search(r"[\d.]+ [GM]i?B", message)
    assert "free" in message
    if left > 100 * MIB:  # the weights fit
        assert "chunked_prefill_size" in message or "mem_fraction" in message
    with LLM(checkpoint, device="cuda", kv_cache_tokens=4096) as llm:
        use(llm)
