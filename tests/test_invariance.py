"""`LLM.check_invariance`: no bit differs for any native model, and what differs is found."""

import os

import numpy as np
import pytest
import torch

from sglite import _C, LLM, InvalidRequestError, ops, register
from sglite.engine.decode_state import DecodeState
from sglite.engine.invariance import Condition, InvarianceReport
from sglite.layers import LogitsProcessor, LogitsProcessorOutput
from sglite.models.llama import LlamaForCausalLM
from sglite.models.registry import _BUILT_IN
from tests.checkpoints import CONFIGS, make_checkpoint
from tests.models.test_quantized_formats import FORMATS
from tests.quantized_checkpoints import quantize_checkpoint
from tests.vision_checkpoints import RECIPES, make_vision_checkpoint

#: Data type and quantization. Every model has the first and one of the others in turn: what is a
#: model's own, and what is an op's for one kind of storage, meet all of the other's.
STORAGE = [("bfloat16", None), ("float32", None), ("bfloat16", "int8")]
#: Enough of each condition for small models.
QUICK = {"batch_sizes": (2, 17), "chunk_sizes": (5, 61), "prefix_lengths": (16, 530)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose sums cancel."""
    return make_checkpoint(
        tmp_path_factory.mktemp("invariance") / "model", cancels=True, max_position_embeddings=1024
    )


#: The least that has each condition once. Prompts that end inside of pages, one beyond the first
#: split of the keys, of which a row's attention is computed apart.
_IDS = [2 + 7 * i * i % 381 for i in range(540)]
SMALLEST = {
    "prompts": [_IDS, _IDS[:47], _IDS[60:75], _IDS[80:81]],
    "new_tokens": 3,
    "batch_sizes": (17,),
    "chunk_sizes": (61,),
    "prefix_lengths": (16, 530),
    "prompt_logits": 16,
}
#: With more threads than the LLM's own, one of each kind.
BY_THREADS = (
    "alone",
    "batch of 17",
    "chunks of 61",
    "9 requests over one prefix",
    "second turn after plain requests",
    "plain requests",
    "preemption of plain requests",
    "preemption in chunks",
)


def make_native_checkpoint(folder, architecture):
    """A checkpoint of a native architecture, whose sums cancel."""
    texts = {
        f"{class_name.removesuffix('Config').removesuffix('Text')}ForCausalLM": name
        for name, (class_name, _) in reversed(CONFIGS.items())
    }
    if architecture in texts:
        options = {"cancels": True, "max_position_embeddings": 1024}
        return make_checkpoint(folder, texts[architecture], **options)
    pictures = {recipe.model_class: name for name, recipe in RECIPES.items()}
    assert architecture in pictures, (
        f"{architecture} is in the registry, but no checkpoint of it is made: give it a config in "
        f"tests/checkpoints.py or a recipe in tests/vision_checkpoints.py"
    )
    return make_vision_checkpoint(folder, pictures[architecture], cancels=True)


@pytest.fixture(scope="module", params=_BUILT_IN)
def native(request, tmp_path_factory):
    """An architecture of the registry, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("native") / "model"
    return request.param, make_native_checkpoint(folder, request.param)


def check_with_one_and_two_threads(folder, dtype, quantization=None, architecture=None):
    """Every condition with one thread, and one of each kind with two."""
    options = {"dtype": dtype, "quantization": quantization, "architecture": architecture}
    with LLM(folder, num_threads=1, kv_cache_tokens=1024, **options) as llm:
        report = llm.check_invariance(**SMALLEST)
    assert report, str(report)
    assert report.is_promised
    assert report.is_complete, str(report)
    names = [condition.name for condition in report.conditions]
    assert {*BY_THREADS, *(f"num_threads=2, {name}" for name in BY_THREADS)} <= {*names}
    for condition in report.conditions[1:]:
        assert condition.rows >= 3, condition
    return llm.config


def test_every_native_model(native):
    architecture, folder = native
    other = 1 + list(_BUILT_IN).index(architecture) % 2
    for dtype, quantization in (STORAGE[0], STORAGE[other]):
        config = check_with_one_and_two_threads(folder, dtype, quantization)
        assert config.architecture == architecture


def test_a_native_model_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(
        AssertionError, match="NewForCausalLM is in the registry, but no checkpoint"
    ):
        make_native_checkpoint(tmp_path, "NewForCausalLM")


@pytest.mark.parametrize(("dtype", "quantization"), [("float16", None), ("bfloat16", "int4")])
def test_further_storage(folder, dtype, quantization):
    check_with_one_and_two_threads(folder, dtype, quantization)


def test_gptq_in_order_of_activations(tmp_path):
    config_and_quantizer = FORMATS["gptq-act-order"](np.random.default_rng(0))
    options = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 1024}
    quantize_checkpoint(make_checkpoint(tmp_path, "llama", **options), *config_and_quantizer)
    check_with_one_and_two_threads(tmp_path, "bfloat16")


@pytest.mark.parametrize("name", ["qwen2-window", "llama-biases"])
def test_further_configs(name, tmp_path):
    make_checkpoint(tmp_path, name, cancels=True, max_position_embeddings=1024)
    check_with_one_and_two_threads(tmp_path, "bfloat16")


def test_as_it_is_called_without_arguments(folder):
    """With two threads, and one of each kind with one."""
    with LLM(folder, dtype="bfloat16", num_threads=2, kv_cache_tokens=2048) as llm:
        report = llm.check_invariance()
    assert report, str(report)
    assert report.is_complete
    names = [condition.name for condition in report.conditions]
    assert "num_threads=1, plain requests" in names
    for condition in report.conditions[1:]:
        assert condition.rows >= 8, condition
        assert condition.logits == condition.rows * 384


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
    assert report.unmet == [hits]
    assert not report.is_complete
    assert "not met: prefix_cache is off" in text
    verdict = text.partition("same bits.")[2]
    count = len(report.conditions)
    assert f"not complete: 1 of {count} conditions were not met.\n  prefix hits: pref" in verdict
    assert "does not promise" not in text


def test_what_cannot_be_met_is_said(folder):
    """More threads than processors; prompts without a prefix, that grow past no page."""
    too_many = (os.cpu_count() or 1) + 1
    with LLM(folder, kv_cache_tokens=512, num_threads=1) as llm:
        report = llm.check_invariance(
            [[5]],
            new_tokens=2,
            batch_sizes=(2,),
            chunk_sizes=(1,),
            prefix_lengths=(3,),
            num_threads=(1, too_many),
        )
    assert report
    assert [condition.name for condition in report.unmet] == [
        "prefix hit of 3",
        "prefix hit of all but one",
        "preemption",
        f"num_threads={too_many}",
    ]
    assert f"there are {too_many - 1} processors" in str(report)


def test_a_complete_report_says_no_more():
    report = InvarianceReport("a model", True, [Condition("batch of 2", rows=1, logits=5)])
    assert report.is_complete
    assert str(report).endswith("All 5 logits compared are the same bits.")


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
        (DependsOnChunks, ["chunks of 61"]),
        (DependsOnThePrefix, ["prefix hit of 530"]),
        (
            DependsOnThreads,
            [f"num_threads=2, {name}" for name in ("alone", "batch of 17", "plain requests")],
        ),
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


def advances_too_far(*tensors):
    """Positions are one too large from the second step on."""
    ADVANCE(*tensors)
    tensors[2].add_(1)


def hides_the_last_key(*tensors):
    ADVANCE(*tensors)
    tensors[4].sub_(1)


def feeds_another_token(*tensors):
    """Where there are several rows."""
    ADVANCE(*tensors)
    if len(tensors[1]) > 1:
        tensors[1][-1] = 7


ADVANCE = ops.advance


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (ops, "advance", advances_too_far),
        (ops, "advance", hides_the_last_key),
        (ops, "advance", feeds_another_token),
        (DecodeState, "_add_pages", lambda *arguments: None),
    ],
)
def test_a_kept_decode_that_is_broken_is_found(owner, name, broken, folder, monkeypatch):
    """By the requests without logits processors, and by no others."""
    monkeypatch.setattr(owner, name, broken)
    with LLM(folder, kv_cache_tokens=2048, num_threads=1) as llm:
        report = llm.check_invariance(**QUICK, num_threads=(1,))
    wrong = [condition.name for condition in report.conditions if not condition.ok]
    assert "plain requests" in wrong
    assert all("plain requests" in name for name in wrong)


def sums(rows, weight):
    """rows [R, K] times weight [N, K], the columns one by one; from the end for over 8 rows."""
    columns = zip(rows.float().T, weight.float().T, strict=True)
    total = torch.zeros(len(rows), len(weight))
    for column, factors in reversed(list(columns)) if len(rows) > 8 else columns:
        total += column[:, None] * factors
    return total


class OtherOrder(LogitsProcessor):
    """Adds the head's products up in another order where there are several rows."""

    def forward(self, input_ids, hidden_states, lm_head, forward_batch):
        rows = hidden_states[forward_batch.logits_rows]
        return LogitsProcessorOutput(next_token_logits=sums(rows, lm_head.weight))


@register("HeadInAnotherOrder")
class HeadInAnotherOrder(LlamaForCausalLM):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.logits_processor = OtherOrder(self.config)


@register("LayerInAnotherOrder")
class LayerInAnotherOrder(LlamaForCausalLM):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        down_proj = self.model.layers[1].mlp.down_proj
        down_proj.register_forward_hook(
            lambda module, inputs, output: sums(inputs[0], module.weight).to(output.dtype)
        )


@pytest.mark.parametrize(
    ("name", "share", "of_row"),
    [("HeadInAnotherOrder", 0.25, 0.9), ("LayerInAnotherOrder", 0.05, 0.5)],
)
def test_another_order_of_addition_is_found(name, share, of_row, folder):
    """In many rows, although of one matrix among many, whose sums are rounded to 16 bits."""
    options = {"dtype": "bfloat16", "kv_cache_tokens": 2048, "num_threads": 1}
    with LLM(folder, architecture=name, **options) as llm:
        report = llm.check_invariance(batch_sizes=(17,), chunk_sizes=(), num_threads=())
    condition = next(c for c in report.conditions if c.name == "batch of 17")
    # Rows of long prefills are added up like those of large batches.
    assert condition.differing_rows > share * condition.rows
    assert condition.differing_logits > of_row * 384 * condition.differing_rows


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
