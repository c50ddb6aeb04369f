"""`LLM.check_invariance`: no bit differs for the native families, and what differs is found."""

import pytest
import torch

from sglite import _C, LLM, InvalidRequestError, register
from sglite.engine.invariance import Condition, InvarianceReport
from sglite.layers import LogitsProcessor, LogitsProcessorOutput
from sglite.models.llama import LlamaForCausalLM
from tests.checkpoints import make_checkpoint

#: Data type and quantization.
STORAGE = [("bfloat16", None), ("float32", None), ("bfloat16", "int8")]
#: Enough of each condition for small models.
QUICK = {"batch_sizes": (2, 17), "chunk_sizes": (5, 61), "prefix_lengths": (16, 530)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose sums cancel."""
    return make_checkpoint(
        tmp_path_factory.mktemp("invariance") / "model", cancels=True, max_position_embeddings=1024
    )


FAMILIES = ["llama", "mistral", "qwen2", "qwen2-window", "qwen3"]
# Those whose layers are not `DecoderLayer`s alone, or have parts of their own.
FURTHER_FAMILIES = [
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "glm4",
    "smollm3",
    "granite",
    "cohere2",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "starcoder2",
]


@pytest.mark.parametrize(("dtype", "quantization"), STORAGE)
@pytest.mark.parametrize(("name", "num_threads"), [*((name, 1) for name in FAMILIES), ("llama", 2)])
def test_every_native_family(name, dtype, quantization, num_threads, tmp_path):
    folder = make_checkpoint(tmp_path, name, cancels=True, max_position_embeddings=1024)
    with LLM(
        folder,
        dtype=dtype,
        quantization=quantization,
        num_threads=num_threads,
        kv_cache_tokens=2048,
    ) as llm:
        report = llm.check_invariance(new_tokens=8)
    assert report, str(report)
    assert report.is_promised
    names = [condition.name for condition in report.conditions]
    assert f"num_threads={3 - num_threads}" in names
    for condition in report.conditions[1:]:
        assert condition.is_met, condition
        assert condition.rows >= 8, condition
        assert condition.logits == condition.rows * 384


@pytest.mark.parametrize("name", FURTHER_FAMILIES)
def test_further_families(name, tmp_path):
    folder = make_checkpoint(tmp_path, name, cancels=True, max_position_embeddings=1024)
    with LLM(folder, dtype="bfloat16", num_threads=1, kv_cache_tokens=2048) as llm:
        report = llm.check_invariance(new_tokens=8, **QUICK)
    assert report, str(report)
    assert all(condition.is_met for condition in report.conditions[1:])


def test_nothing_is_left_behind():
    options = {"kv_cache_tokens": 512, "seed": 1, "num_threads": 1}
    with LLM("demo", **options) as llm, LLM("demo", **options) as other:
        for model in (llm, other):
            model.generate("What is 17 + 25?", temperature=0)
        before = llm.stats()
        report = llm.check_invariance(["What is 17 + 25?", [5, 6, 7]], **QUICK)
        assert llm.stats() == before
        assert report.ok
        # Not even a seed has been drawn.
        assert llm.generate("Hi", max_new_tokens=1).outputs[0].seed == (
            other.generate("Hi", max_new_tokens=1).outputs[0].seed
        )


def test_the_report_prints_as_a_table(folder):
    with LLM(folder, kv_cache_tokens=2048, prefix_cache=False, num_threads=1) as llm:
        report = llm.check_invariance(**QUICK)
    text = str(report)
    assert "batch of 17" in text
    assert f"All {report.logits:,} logits compared are the same bits." in text
    assert report.first_difference is None
    (hits,) = (condition for condition in report.conditions if condition.name == "prefix hits")
    assert not hits.is_met
    assert "prefix_cache is off" in text
    assert "does not promise" not in text


class Planted(LlamaForCausalLM):
    """The last bit of some logits differs where `differs(forward_batch)` says so."""

    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        out = super().forward(input_ids, positions, forward_batch, input_embeds)
        logits = out.next_token_logits
        if len(logits) and self.differs(positions, forward_batch):
            logits[-1, 7] = torch.nextafter(logits[-1, 7], torch.tensor(torch.inf))
        return out


@register("DependsOnTheBatch")
class DependsOnTheBatch(Planted):
    def differs(self, positions, forward_batch):
        return forward_batch.batch_size >= 17


@register("DependsOnChunks")
class DependsOnChunks(Planted):
    def differs(self, positions, forward_batch):
        return forward_batch.max_query_tokens == 61


@register("DependsOnThePrefix")
class DependsOnThePrefix(Planted):
    def differs(self, positions, forward_batch):
        return positions[0] == 530


@register("DependsOnThreads")
class DependsOnThreads(Planted):
    def differs(self, positions, forward_batch):
        return _C.num_threads() == 2


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (DependsOnTheBatch, ["batch of 17"]),
        (DependsOnChunks, ["chunks of 61", "preemption, in chunks of 61"]),
        (DependsOnThePrefix, ["prefix hit of 530"]),
        (DependsOnThreads, ["num_threads=2"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_depends_on_something_is_found_and_named(architecture, expected, folder):
    with LLM(
        folder, architecture=architecture.__name__, kv_cache_tokens=2048, num_threads=1
    ) as llm:
        report = llm.check_invariance(**QUICK)
    assert not report
    wrong = [condition for condition in report.conditions if not condition.ok]
    assert set(expected) <= {condition.name for condition in wrong}
    first = report.first_difference
    assert first.condition == wrong[0].name == expected[0]
    assert first.token_id == 7
    assert first.found != first.expected
    assert str(first) in str(report)
    for condition in wrong:
        assert condition.differing_logits == condition.differing_rows
        assert condition.differing_bits >= condition.differing_rows
        assert condition.largest_difference > 0


class OtherOrder(LogitsProcessor):
    """Adds the head's products up in another order where there are several rows."""

    def forward(self, input_ids, hidden_states, lm_head, forward_batch):
        rows = hidden_states[forward_batch.logits_rows].float()
        weight = lm_head.weight.float()
        if len(rows) > 8:
            rows, weight = rows.flip(1), weight.flip(1)
        total = torch.zeros(len(rows), len(weight))
        for column, factors in zip(rows.T, weight.T, strict=True):
            total += column[:, None] * factors
        return LogitsProcessorOutput(next_token_logits=total)


@register("AddsInAnotherOrder")
class AddsInAnotherOrder(LlamaForCausalLM):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.logits_processor = OtherOrder(self.config)


def test_another_order_of_addition_is_found(folder):
    with LLM(folder, architecture="AddsInAnotherOrder", kv_cache_tokens=2048, num_threads=1) as llm:
        report = llm.check_invariance(**QUICK)
    condition = next(c for c in report.conditions if c.name == "batch of 17")
    # Rows of long prefills are added up like those of large batches.
    assert condition.differing_rows > 0.25 * condition.rows
    # Sums that cancel show it nearly everywhere.
    assert condition.differing_logits > 0.9 * 384 * condition.differing_rows


def test_a_setting_that_does_not_promise_it_is_named():
    report = InvarianceReport("a model", False, [Condition("batch of 2", rows=1, logits=5)])
    assert "batch_invariant is off" in str(report)
    assert report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"prompts=\[\]"),
        ({"batch_sizes": (0,)}, "batch_sizes=0"),
        ({"chunk_sizes": 5}, "chunk_sizes=5"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"prompts": [[1] * 500]}, "prompt"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with (
        LLM("demo", kv_cache_tokens=512) as llm,
        pytest.raises(InvalidRequestError, match=message),
    ):
        llm.check_invariance(**arguments)
