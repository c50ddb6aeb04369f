"""`sglite.compare`: right models pass, and of wrong ones the first wrong module is named."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import sglite
from sglite import CheckpointError, InvalidRequestError, UnsupportedModelError, register
from sglite.models.llama import LlamaForCausalLM
from sglite.tools.compare.matching import Layout
from sglite.tools.compare.metrics import Closeness, cosines, rouge_l, row_errors
from sglite.tools.compare.recording import as_rows
from tests.checkpoints import FAMILIES, edit_json, hugging_face, make_checkpoint
from tests.command_line import run
from tests.tools import ported  # noqa: F401  (registers its models)
from tests.tools.planted import BUGS

PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# One prompt, longer than a page and than Mistral's window.
PROMPT = [(7 * i + i * i) % 380 for i in range(23)]
QUICK = {"prompts": PROMPT, "new_tokens": 3, "itself": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder and Hugging Face model of a name in `CONFIGS`, each made once."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            base, overrides = ("llama", PLAIN_ROPE) if name == "llama-plain" else (name, {})
            folder = tmp_path_factory.mktemp(name)
            make_checkpoint(folder, base, dtype=dtype, **overrides)
            made[name, dtype] = folder, hugging_face(folder)
        return made[name, dtype]

    return get


def quick(checkpoint, architecture, **options):
    folder, reference = checkpoint
    return sglite.compare(
        folder, architecture=architecture, reference=reference, **{**QUICK, **options}
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_right_models_pass(checkpoints, name):
    report = sglite.compare(checkpoints(name)[0], itself=False, new_tokens=3)
    assert report.passed, str(report)
    assert report
    assert report.first_divergence is None
    assert [row.path for row in report.layers] == [f"model.layers.{i}" for i in range(3)]
    assert all(0 < row.relative_error < 1e-5 for row in report.layers)
    assert all(0 < row.found.relative_error < 1e-5 for row in report.logits)
    assert {text.prompt_tokens for text in report.texts} >= {1, 15, 16, 17, 73}
    assert all(text.ours == text.theirs and text.rouge_l == 1 for text in report.texts)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_right_models_pass_in_bfloat16(checkpoints, name):
    folder, _ = checkpoints(name, torch.bfloat16)
    report = sglite.compare(folder, itself=False, prompts=[PROMPT, PROMPT[:1]])
    assert report.passed, str(report)
    assert [limits.dtype for limits in report.limits] == ["bfloat16", "float32"]
    low, exact = report.layers[:3], report.layers[3:]
    assert all(row.relative_error > 1e-3 and row.own_error > 1e-3 for row in low)
    assert all(row.relative_error < 1e-5 and row.own_error is None for row in exact)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_named(checkpoints, bug):
    report = quick(checkpoints(bug.checkpoint), bug.architecture)
    assert not report.passed
    first = report.first_divergence
    assert (first.path, first.position) == (bug.path, bug.position), str(report)
    assert str(first).startswith(f"{bug.path}: relative error ")
    assert f"first at position {bug.position}" in str(first)


def test_what_bfloat16_would_hide_is_found_in_float32(checkpoints):
    report = quick(checkpoints("llama-plain", torch.bfloat16), "Planted-epsilon")
    assert not any(row.failure for row in report.logits if row.dtype == "bfloat16")
    assert report.first_divergence.path == "model.layers.0.input_layernorm"


@pytest.mark.parametrize(
    ("architecture", "path"),
    [
        ("Ported", None),
        ("Ported-epsilon", "model.layers.2.post_attention_layernorm"),
        ("Ported-scale", "model.layers.2.self_attn.inner"),
    ],
)
def test_a_model_in_the_style_of_sglang(checkpoints, architecture, path):
    report = quick(checkpoints("llama-plain"), architecture)
    first = report.first_divergence
    assert (first.path if first else None) == path, str(report)


@register("Planted-wrapper")
class Wrapper(LlamaForCausalLM):
    """Changes its logits behind the last module."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.next_token_logits[:, 7] += 0.5
        return output


@register("Planted-embedding")
class ScaledEmbedding(LlamaForCausalLM):
    """Scales its embedding, as Gemma does."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.model.embed_tokens.register_forward_hook(lambda *arguments: 2 * arguments[2])


@register("Planted-final-norm")
class OtherNorm(LlamaForCausalLM):
    """Its last norm is another."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.model.norm.weight_offset = 0.01


class OnlyInDecode(nn.Module):
    def forward(self, x):
        out = torch.nn.functional.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :]
        return out * 1.01 if len(x) == 1 else out


@register("Planted-decode")
class WrongInDecode(LlamaForCausalLM):
    """Wrong where a step has one token."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.model.layers[1].mlp.act_fn = OnlyInDecode()


@register("Planted-nan")
class NotANumber(LlamaForCausalLM):
    """Breaks down from position 9 on."""

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__(config, quant_config, prefix)
        self.model.layers[2].mlp.down_proj.register_forward_hook(self._break)

    @staticmethod
    def _break(module, args, output):
        output = output.clone()
        output[9:] = torch.nan
        return output


@pytest.mark.parametrize(
    ("architecture", "path", "position"),
    [
        ("Planted-wrapper", "Wrapper.forward", 0),
        ("Planted-embedding", "model.embed_tokens", 0),
        ("Planted-final-norm", "model.norm", 0),
        ("Planted-decode", "model.layers.1.mlp.act_fn", 23),
        ("Planted-nan", "model.layers.2.mlp.down_proj", 9),
    ],
)
def test_errors_elsewhere_are_named(checkpoints, architecture, path, position):
    report = quick(checkpoints("llama-plain"), architecture)
    first = report.first_divergence
    assert (first.path, first.position) == (path, position), str(report)


@register("Planted-batch")
class DependsOnTheBatch(LlamaForCausalLM):
    """Right but for the last bits, which depend on how many tokens a step has."""

    def forward(self, input_ids, *args, **kwargs):
        output = super().forward(input_ids, *args, **kwargs)
        output.next_token_logits *= 1 + 2.0**-20 * len(input_ids)
        return output


def test_a_model_is_compared_with_itself(checkpoints):
    options = {"prompts": [PROMPT, PROMPT[:14]], "itself": True}
    report = quick(checkpoints("llama-plain"), None, num_threads=2, **options)
    assert report.passed, str(report)
    names = [row.condition for row in report.itself]
    for name in ("batch of 3", "chunks of 17", "prefix hit of 16", "num_threads=1, alone"):
        assert name in names
    assert all(row.passed and row.is_promised and row.is_met for row in report.itself)
    assert "not met" not in str(report)
    assert "not compared" not in report.verdict
    unmet = dataclasses.replace(
        report.itself[-1], condition="prefix hits", note="prefix_cache is off", is_met=False
    )
    report = dataclasses.replace(report, itself=[unmet])
    assert "not met: prefix_cache is off" in str(report)
    assert "not compared with itself under: prefix hits (prefix_cache is off)" in report.verdict
    report = quick(checkpoints("llama-plain"), "Planted-batch", **options)
    assert "sglite differs from itself under" in str(report.first_divergence)
    assert "batch of 3" in [row.condition for row in report.itself if not row.passed]


def test_the_loss_of_quantising_is_measured(checkpoints):
    report = quick(checkpoints("llama-plain"), None, quantization="int8")
    assert report.passed
    assert 0 < report.quantization.kl < 0.1
    assert "int8: perplexity" in str(report)


def test_a_model_that_hugging_face_does_not_know(checkpoints, tmp_path):
    _, reference = checkpoints("llama-plain")
    folder = make_checkpoint(tmp_path, **PLAIN_ROPE)
    edit_json(folder / "config.json", {"model_type": "of-ones-own"})
    with pytest.raises(UnsupportedModelError, match="of-ones-own.*pass reference="):
        sglite.compare(folder, **QUICK)
    assert sglite.compare(folder, reference=reference, **QUICK).passed
    assert reference.config._attn_implementation == "eager"


def test_weights_that_hugging_face_would_draw_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "llama-tied")
    edit_json(folder / "config.json", {"attention_bias": True})
    with pytest.raises(CheckpointError, match="bias"):
        sglite.compare(folder, **QUICK)


def test_without_a_tokenizer_prompts_are_ids(tmp_path):
    folder = make_checkpoint(tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    report = sglite.compare(folder, new_tokens=2, itself=False)
    assert report.passed
    assert report.texts[0].our_text is None
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        sglite.compare(folder, prompts="Hi", itself=False)


def test_wrong_arguments(checkpoints):
    folder, _ = checkpoints("llama-plain")
    for prompts, message in (([], "nothing to compare"), ([list(range(600))], "600 tokens")):
        with pytest.raises(InvalidRequestError, match=message):
            sglite.compare(folder, prompts=prompts)
    with pytest.raises(InvalidRequestError, match="new_tokens"):
        sglite.compare(folder, new_tokens=1)
    with pytest.raises(sglite.ConfigError, match="reference"):
        sglite.compare(folder, reference="llama")


def test_the_report_prints_and_becomes_json(checkpoints):
    report = quick(checkpoints("llama-plain"), "Planted-scale")
    text = str(report)
    for word in ("prefill", "decode", "ROUGE-L", "model.layers.2", "self_attn.attn", "0.0001"):
        assert word in text, word
    assert text.splitlines()[-1] == report.verdict
    assert report.verdict.startswith("failed: model.layers.0.self_attn.attn: relative error 0.")
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["passed"] is False
    assert values["first_divergence"]["path"] == "model.layers.0.self_attn.attn"
    assert values["logits"][0]["found"]["positions"] == len(PROMPT)


def command(*arguments):
    return run("compare", *arguments, "--no-self")


def test_the_command_passes_a_right_model(checkpoints):
    folder, _ = checkpoints("llama")
    done = command(folder, "--json", "--prompt", "A prompt", "--prompt", "B", "--new-tokens", 2)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["passed"] is True
    assert len(values["texts"]) == 2


def test_the_command_fails_a_wrong_model_in_one_line(tmp_path):
    folder = make_checkpoint(tmp_path, "mistral")
    # Read by sglite alone, since Hugging Face's Llama knows no window.
    edit_json(folder / "config.json", {"model_type": "llama"})
    done = command(folder, "--architecture", "MistralForCausalLM", "--new-tokens", 2)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("failed: model.layers.0.self_attn.attn: relative error"), done.stdout
    assert "first at position 17" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs", "path", "other"),
    [
        ("model.layers", "model.layers", "model.layers.0.mlp", "model.layers.0.mlp"),
        ("model.layers", "model.language_model.layers", "model.norm", "model.language_model.norm"),
        ("model.layers", "model.language_model.layers", "lm_head", "lm_head"),
        ("inner.model.layers", "model.layers", "inner.model.layers.1", "model.layers.1"),
        ("inner.model.layers", "model.layers", "inner.lm_head", "lm_head"),
        ("model.blocks", "transformer.h", "model.blocks.2.mlp", "transformer.h.2.mlp"),
        ("model.blocks", "transformer.h", "model.norm", "transformer.norm"),
        ("model.layers", "model.layers", "", ""),
    ],
)
def test_paths_are_translated(ours, theirs, path, other):
    layout = Layout(ours, theirs, 3)
    assert layout.translate(path) == other
    assert layout.translate_back(other) == path


def test_measures_of_closeness():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 50, generator=generator) for _ in range(2))
    found = Closeness.of(a, b)
    p, q = b.softmax(-1), a.softmax(-1)
    kl = nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    reverse = nn.functional.kl_div(p.log(), q, reduction="none").sum(-1)
    assert found.kl == pytest.approx(kl.max().item(), rel=1e-5)
    assert found.reverse_kl == pytest.approx(reverse.max().item(), rel=1e-5)
    best = b.topk(5).indices
    differences = (q.log() - p.log()).gather(1, best)
    assert found.largest == pytest.approx(differences.abs().max().item(), rel=1e-5)
    assert found.rms == pytest.approx(differences.square().mean().sqrt().item(), rel=1e-5)
    shared = [len({*x} & {*y}) / 5 for x, y in zip(best.tolist(), a.topk(5).indices.tolist())]  # noqa: B905
    assert found.top == pytest.approx(sum(shared) / 9)
    same = Closeness.of(a, a + 3)
    assert (same.greedy, same.top, same.positions) == (1, 1, 9)
    assert max(same.relative_error, same.largest) < 1e-5
    assert Closeness.of(a * torch.nan, b).largest == float("inf")
    both = Closeness.over([Closeness.of(a[:3], b[:3]), Closeness.of(a[3:], b[3:])])
    assert both.rms == pytest.approx(found.rms)
    rows = torch.tensor([[3.0, 0], [0, 5]]), torch.tensor([[3.0, 4], [0, 4]])
    assert row_errors(*rows).tolist() == pytest.approx([0.8, 0.25])
    assert cosines(*rows).tolist() == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (1, 3, 5, 2), (3, 1, 5, 2), (4, 7), (3, 4)])
def test_tensors_become_rows_of_tokens(shape):
    """Whichever of the shapes in which models hand five tokens from part to part."""
    value = torch.arange(torch.Size(shape).numel()).float().view(shape)
    rows = as_rows(value, 5)
    if 5 not in shape:
        assert rows is None
        return
    assert rows.shape == (5, 6)
    assert torch.equal(rows[3], value.select(shape.index(5), 3).flatten())
    assert torch.equal(as_rows(value.narrow(shape.index(5), 3, 1), 1)[0], rows[3])


def test_a_row_that_vanishes_is_measured_against_the_others():
    expected = torch.tensor([[1e-9, 0], [1, 0], [0, 1], [1, 0]])
    errors = row_errors(expected + 1e-7, expected)
    assert errors[0] == pytest.approx(2**0.5 * 1e-6, rel=0.01)


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [("", "", 1), ("abc", "abc", 1), ("abcd", "acd", 6 / 7), ("ab", "cd", 0), ("", "a", 0)],
)
def test_rouge_l(a, b, score):
    assert rouge_l(a, b) == pytest.approx(score)
