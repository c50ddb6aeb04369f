"""The model runner where the fake one of the scheduler's tests cannot stand in."""

import pytest
import torch

from sglite import LLM, register
from sglite.cache.kv_pool import KVPool, LayerSpec
from sglite.engine.model_runner import ModelRunner
from sglite.engine.scheduler import PageCopy, Step
from sglite.models.llama import LlamaForCausalLM
from tests.checkpoints import make_checkpoint
from tests.engine.test_scheduler import make_engine, make_request


def test_pages_are_copied_even_in_a_step_with_no_tokens():
    pool = KVPool(4, 8, [LayerSpec(2, 4), LayerSpec(1, 4)], torch.float32)
    for keys, values in pool.layers:
        keys.normal_()
        values.normal_()
    before = [(keys.clone(), values.clone()) for keys, values in pool.layers]
    runner = ModelRunner(None, pool, None)
    launched = runner.launch(Step(page_copies=[PageCopy(None, 1, 3, 5)]))
    assert launched.outcomes() == []
    for pair, old_pair in zip(pool.layers, before, strict=True):
        for tensor, old in zip(pair, old_pair, strict=True):
            assert torch.equal(tensor[3, :5], old[1, :5])
            assert torch.equal(tensor[3, 5:], old[3, 5:])
            assert torch.equal(tensor[:3], old[:3])


def test_a_failed_step_ends_requests_that_only_had_a_copy():
    engine = make_engine(num_pages=3, page_size=4, chunk=100)
    request = make_request([1, 2, 3, 4, 5, 6, 7], 1)
    engine.add(request)
    while engine.has_work:
        engine.step()
    again = make_request([1, 2, 3, 4, 5, 6, 7], 1)
    engine.add(again)
    step = engine.scheduler.schedule()
    assert step.page_copies
    step.items.clear()  # as when no page is left for the first chunk
    engine.scheduler.fail(step, RuntimeError("planted"))
    assert again.finish_reason == "error"
    engine.scheduler.cache.check_invariant()


@pytest.mark.parametrize(("num_prompts", "times"), [(1, 0), (7, 0), (8, 1), (20, 1)])
def test_freed_logits_of_a_large_batch_go_back_to_the_system(num_prompts, times, monkeypatch):
    given_back = []
    monkeypatch.setattr(
        "sglite.engine.model_runner.give_back_free_memory", lambda: given_back.append(True)
    )
    with LLM("demo", device="cpu", kv_cache_tokens=1024) as llm:
        llm.generate([[5, 6, 7]] * num_prompts, max_new_tokens=3, ignore_eos=True)
        llm.generate([5, 6, 7], max_new_tokens=3)  # which is not asked to do it again
    assert len(given_back) == times


def generate_five_tokens(tmp_path, note):
    """Six prompts through a wide head; `note` is given the logits of every step.

    Gives the spare memory of the runner, which is closed.
    """

    @register("NotesLogits")
    class NotesLogits(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            note(output.next_token_logits)
            return output

    folder = make_checkpoint(tmp_path, vocab_size=60_000)
    with LLM(folder, device="cpu", kv_cache_tokens=1024, architecture="NotesLogits") as llm:
        llm.generate([[5, 6, 7]] * 6, max_new_tokens=5, ignore_eos=True)
        return llm._open.engine.runner._spare_memory


def test_logits_that_a_model_keeps_stay_as_they_are(tmp_path, registry_as_before):
    kept = []
    generate_five_tokens(tmp_path, lambda logits: kept.append((logits, logits.clone())))
    assert len(kept) == 5
    for logits, as_they_were in kept:
        assert logits.nbytes > 1 << 20  # else they are not reused at all
        assert torch.equal(logits, as_they_were)


def test_logits_that_nobody_keeps_leave_their_memory_to_the_next(tmp_path, registry_as_before):
    addresses = []
    spare_memory = generate_five_tokens(
        tmp_path, lambda logits: addresses.append(logits.data_ptr())
    )
    assert len(addresses) == 5
    assert len(set(addresses)) <= 2  # two where the step before still holds its own
    assert spare_memory.spare_bytes == 0
