"""The decoder's composites: fused or in parts, the same bits; hooks and subclasses are seen."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from sglite import ops
from sglite.interface.errors import UnsupportedModelError
from sglite.layers import Linear, PPProxyTensors
from sglite.layers.composite import is_plain
from sglite.layers.mlp import gated_activation
from sglite.layers.norm import RMSNorm
from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
from tests.checkpoints import make_checkpoint
from tests.forward import Runner

TOKEN_IDS = [[5, 6, 7, 8, 9, 10, 11], [20], [3] * 30]


@pytest.fixture
def loaded(tmp_path):
    return load_model(resolve_checkpoint(make_checkpoint(tmp_path, dtype=torch.bfloat16)))


def logits_of(loaded):
    run = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=len(TOKEN_IDS))
    return torch.cat(run.run(TOKEN_IDS))


@pytest.mark.parametrize("name", ["rotary_emb", "attn", "q_norm", "k_norm"])
def test_what_is_one_op_before_attention_gives_the_bits_of_its_parts(tmp_path, name, monkeypatch):
    loaded = load_model(
        resolve_checkpoint(make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16))
    )
    # What listens in the MLP keeps the layers from being one op.
    for layer in loaded.model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: None)
    before = logits_of(loaded)  # and the rotary table has grown
    fused = []
    op = ops.rope_and_write_kv
    monkeypatch.setattr(
        ops, "rope_and_write_kv", lambda *args, **kw: fused.append(1) or op(*args, **kw)
    )
    assert torch.equal(logits_of(loaded), before)
    assert len(fused) == 3  # once for each layer
    attention = loaded.model.model.layers[1].self_attn
    seen = []
    getattr(attention, name).register_forward_hook(lambda *call: seen.append(call))
    assert torch.equal(logits_of(loaded), before)
    assert seen
    # Layers share the rotary embedding, so that its hook keeps all of them apart.
    assert len(fused) == (3 if name == "rotary_emb" else 5)


def test_norms_that_differ_run_one_by_one(tmp_path):
    loaded = load_model(resolve_checkpoint(make_checkpoint(tmp_path, "qwen3")))
    before = logits_of(loaded)
    for layer in loaded.model.model.layers:
        layer.self_attn.k_norm.eps = 0.5
    assert not torch.equal(logits_of(loaded), before)


class Doubled(Linear):
    """A part of someone else's: takes no residual."""

    def forward(self, x):
        return super().forward(x) * 2


def parts(loaded):
    """Every part of the first layer that a composite may run together with others."""
    layer = loaded.model.model.layers[0]
    return {
        "layer": layer,
        "self_attn": layer.self_attn,
        "qkv_proj": layer.self_attn.qkv_proj,
        "o_proj": layer.self_attn.o_proj,
        "mlp": layer.mlp,
        "gate_up_proj": layer.mlp.gate_up_proj,
        "act_fn": layer.mlp.act_fn,
        "down_proj": layer.mlp.down_proj,
        "input_layernorm": layer.input_layernorm,
        "post_attention_layernorm": layer.post_attention_layernorm,
    }


PART_NAMES = [
    "layer",
    "self_attn",
    "qkv_proj",
    "o_proj",
    "mlp",
    "gate_up_proj",
    "act_fn",
    "down_proj",
    "input_layernorm",
    "post_attention_layernorm",
]


@pytest.mark.parametrize("name", PART_NAMES)
def test_a_hook_sees_the_parts_own_output_and_changes_no_bit(loaded, name):
    before = logits_of(loaded)
    seen = []
    hook = parts(loaded)[name].register_forward_hook(
        lambda module, inputs, output: seen.append((inputs, output))
    )
    assert torch.equal(logits_of(loaded), before)
    hook.remove()
    (inputs, output) = seen[0]
    if name not in ("layer", "self_attn", "qkv_proj"):  # whose output is rotated in place
        # Without the norm in front or the residual: what the part alone gives for its input.
        assert torch.equal(output, parts(loaded)[name](inputs[0]))
    assert torch.equal(logits_of(loaded), before)


def calls_as_one_op(monkeypatch):
    """Grows by one entry for each layer that runs as one op."""
    calls = []
    op = ops.decoder_layers
    monkeypatch.setattr(ops, "decoder_layers", lambda *args: calls.extend(args[2]) or op(*args))
    return calls


def test_layers_that_follow_each_other_are_one_call(loaded, monkeypatch):
    before = logits_of(loaded)
    runs = []
    op = ops.decoder_layers
    monkeypatch.setattr(ops, "decoder_layers", lambda *args: runs.append(len(args[2])) or op(*args))
    assert torch.equal(logits_of(loaded), before)
    assert runs == [3]
    # A layer that somebody listens to, and one with a forward of its own, are called themselves.
    middle = loaded.model.model.layers[1]
    hook = middle.register_forward_hook(lambda module, inputs, output: output * 2)
    assert not torch.equal(logits_of(loaded), before)
    assert runs == [3, 1, 1, 1]
    hook.remove()
    kind = type(middle)
    middle.__class__ = type("Doubling", (kind,), {"forward": lambda *args: 2 * kind.forward(*args)})
    assert not torch.equal(logits_of(loaded), before)
    assert runs == [3, 1, 1, 1, 1, 1, 1]


def wanted_logits_of(loaded):
    """Of the last token of each sequence alone."""
    run = Runner(loaded.model, loaded.kv_layers, loaded.dtype, num_sequences=len(TOKEN_IDS))
    return torch.cat(run.run(TOKEN_IDS, all_logits=False))


LAST_ROWS = torch.tensor([len(ids) for ids in TOKEN_IDS]).cumsum(0) - 1


def test_the_last_layer_gives_the_rows_whose_logits_are_wanted(loaded, monkeypatch):
    expected = logits_of(loaded)[LAST_ROWS]
    given = []
    op = ops.decoder_layers
    monkeypatch.setattr(ops, "decoder_layers", lambda *args: given.append(op(*args)) or given[-1])
    assert torch.equal(wanted_logits_of(loaded), expected)
    assert [len(hidden) for hidden in given] == [3]
    # Where not all layers are one call, each gives all rows.
    loaded.model.model.layers[2].mlp.register_forward_hook(lambda *call: None)
    assert torch.equal(wanted_logits_of(loaded), expected)
    assert [len(hidden) for hidden in given] == [3, 38]


@pytest.mark.parametrize("path", ["model", "model.norm", "logits_processor", "model.layers.2"])
def test_who_listens_behind_the_layers_sees_all_rows(loaded, path):
    expected = wanted_logits_of(loaded)
    seen = []
    hook = loaded.model.get_submodule(path).register_forward_pre_hook(
        lambda module, inputs: seen.extend(len(x) for x in inputs if isinstance(x, torch.Tensor))
    )
    assert torch.equal(wanted_logits_of(loaded), expected)
    assert set(seen) == {38}
    hook.remove()
    part = loaded.model.get_submodule(path)
    kind, seen = type(part), []
    replaced = {"forward": lambda *args: seen.append(len(args[1])) or kind.forward(*args)}
    part.__class__ = type("Listening", (kind,), replaced)
    assert torch.equal(wanted_logits_of(loaded), expected)
    assert seen == [38]


@pytest.mark.parametrize("name", PART_NAMES)
def test_a_layer_is_one_op_while_all_of_its_parts_are_plain(loaded, name, monkeypatch):
    before = logits_of(loaded)  # and the rotary table has grown
    calls = calls_as_one_op(monkeypatch)
    assert torch.equal(logits_of(loaded), before)
    assert len(calls) == 3
    hook = parts(loaded)[name].register_forward_hook(lambda *call: None)
    assert torch.equal(logits_of(loaded), before)
    # What listens to the layer as a whole sees what it needs to see.
    assert len(calls) == (6 if name == "layer" else 5)
    hook.remove()
    assert torch.equal(logits_of(loaded), before)
    assert len(calls) == (9 if name == "layer" else 8)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_quantised_layer_is_one_op_too(tmp_path, method, mixed, monkeypatch):
    checkpoint = resolve_checkpoint(make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16))
    loaded = load_model(checkpoint, quantization=method)
    if mixed:
        for layer in loaded.model.model.layers:
            matrix = layer.mlp.down_proj.matrix
            matrix._stored = ops.pack_weight(matrix.read_rows(0, matrix.shape[0]))
    logits_of(loaded)  # and the rotary table has grown
    calls = calls_as_one_op(monkeypatch)
    as_one = logits_of(loaded)
    assert len(calls) == 3
    for layer in loaded.model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: None)
    assert torch.equal(logits_of(loaded), as_one)
    assert len(calls) == 3


def replaced_parts(layer):
    """Changes of what a layer holds, each by itself."""
    norm, attention, mlp = layer.input_layernorm, layer.self_attn, layer.mlp
    return {
        "norm weight": lambda: setattr(norm, "weight", nn.Parameter(norm.weight * 2)),
        "norm data": lambda: setattr(norm.weight, "data", norm.weight * 2),
        "epsilon": lambda: setattr(norm, "eps", 0.5),
        "offset": lambda: setattr(norm, "weight_offset", 1.0),
        "scale": lambda: setattr(attention.attn, "scaling", 0.5),
        "window": lambda: setattr(attention.attn, "sliding_window", 2),
        "bias": lambda: setattr(
            mlp.down_proj, "bias", nn.Parameter(torch.ones(norm.weight.shape).to(norm.weight))
        ),
        "weight": lambda: setattr(
            mlp.down_proj.matrix, "_stored", ops.pack_weight(mlp.down_proj.weight * 2)
        ),
        "activation": lambda: setattr(mlp, "act_fn", gated_activation("gelu")),
        "norm of heads": lambda: setattr(
            attention, "q_norm", RMSNorm(attention.head_dim).to(norm.weight.dtype)
        ),
        "forward": lambda: setattr(norm, "forward", lambda x: x * 2),
    }


REPLACED = ["norm weight", "norm data", "epsilon", "offset", "scale", "window", "bias", "weight"]
REPLACED += ["activation", "norm of heads", "forward"]


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_counts_from_the_next_call_on(loaded, name):
    before = logits_of(loaded)
    layer = loaded.model.model.layers[1]
    replaced_parts(layer)[name]()
    if name == "norm of heads":
        layer.self_attn.k_norm = layer.self_attn.q_norm
    after = logits_of(loaded)
    assert not torch.equal(after, before)
    for other in loaded.model.model.layers:
        other.mlp.act_fn.register_forward_hook(lambda *call: None)
    assert torch.equal(logits_of(loaded), after)


LIST_CHANGES = {
    "replaced": lambda layers: layers.__setitem__(1, copy.deepcopy(layers[0])),
    "swapped": lambda layers: layers._modules.update({"0": layers[1], "1": layers[0]}),
    "added": lambda layers: layers.append(copy.deepcopy(layers[0])),
    "removed": lambda layers: layers.__delitem__(1),
    "with other parts": lambda layers: vars(layers).update(_modules={"0": layers[0]}),
    "without its parts": lambda layers: vars(layers[1]).update(_modules=dict(layers[0]._modules)),
    "with another forward": lambda layers: setattr(
        layers[1], "forward", lambda positions, hidden_states, batch: hidden_states * 2
    ),
}


@pytest.mark.parametrize("change", LIST_CHANGES)
def test_a_list_of_layers_that_is_changed_counts_from_the_next_call_on(loaded, change):
    before = logits_of(loaded)
    layers = loaded.model.model.layers
    if change == "added":  # of which there is a cache
        del layers[2]
        before = logits_of(loaded)
    LIST_CHANGES[change](layers)
    after = logits_of(loaded)
    assert not torch.equal(after, before)
    for layer in layers:
        layer.mlp.act_fn.register_forward_hook(lambda *call: None)
    assert torch.equal(logits_of(loaded), after)


def test_a_class_whose_forward_is_replaced_runs_that(loaded, monkeypatch):
    before = logits_of(loaded)
    kind = type(loaded.model.model.layers[1])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args: forward(*args) * 2)
    assert not torch.equal(logits_of(loaded), before)
    monkeypatch.undo()
    assert torch.equal(logits_of(loaded), before)


def test_a_copy_of_a_model_has_layers_of_its_own(loaded):
    before = logits_of(loaded)
    copied = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    assert torch.equal(logits_of(copied), before)
    loaded.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *call: 1 / 0)
    assert torch.equal(logits_of(copied), before)


def test_a_copy_of_a_layer_has_hooks_of_its_own(loaded):
    before = logits_of(loaded)
    layers = loaded.model.model.layers
    layers[1] = copy.deepcopy(layers[1])
    assert torch.equal(logits_of(loaded), before)
    seen = []
    layers[1].mlp.register_forward_hook(lambda *call: seen.append(call))
    assert torch.equal(logits_of(loaded), before)
    assert len(seen) == 1


def test_a_global_hook_is_seen_too(loaded):
    before = logits_of(loaded)
    names = {module: name for name, module in loaded.model.named_modules()}
    called = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: called.append(names.get(module))
    )
    try:
        assert torch.equal(logits_of(loaded), before)
    finally:
        hook.remove()
    assert {"model.layers.0.self_attn", "model.layers.2.mlp.down_proj", "lm_head"} <= set(called)


@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_subclass_runs_as_it_is(loaded, path):
    layer = loaded.model.model.layers[1]
    parent, _, name = path.rpartition(".")
    original = layer.get_submodule(path)
    doubled = Doubled(original.in_features, original.out_features, bias=False)
    doubled.to(loaded.dtype).weight = original.weight
    setattr(layer.get_submodule(parent), name, doubled)
    with_subclass = logits_of(loaded)
    setattr(layer.get_submodule(parent), name, original)
    original.weight = original.weight * 2  # doubling is exact
    assert torch.equal(with_subclass, logits_of(loaded))


def test_a_replaced_forward_is_seen(loaded):
    mlp = loaded.model.model.layers[0].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    without = logits_of(loaded)
    del mlp.forward
    mlp.down_proj.weight = torch.zeros(mlp.down_proj.matrix.shape)
    assert torch.equal(logits_of(loaded), without)


def test_what_is_plain():
    layer = Linear(4, 4)
    assert is_plain(layer, Linear)
    assert not is_plain(Doubled(4, 4), Linear)
    hook = layer.register_forward_pre_hook(lambda module, inputs: None)
    assert not is_plain(layer, Linear)
    hook.remove()
    assert is_plain(layer, Linear)


def test_input_embeds_replace_the_embedding(loaded):
    table = loaded.model.model.embed_tokens.weight
    before = logits_of(loaded)

    class FromEmbeds(nn.Module):
        def forward(self, input_ids, positions, forward_batch):
            embeds = table[input_ids]
            kept = embeds.clone()
            output = loaded.model(
                torch.zeros_like(input_ids), positions, forward_batch, input_embeds=embeds
            )
            assert torch.equal(embeds, kept)
            return output

    run = Runner(FromEmbeds(), loaded.kv_layers, loaded.dtype, num_sequences=len(TOKEN_IDS))
    assert torch.equal(torch.cat(run.run(TOKEN_IDS)), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp_proxy_tensors": PPProxyTensors()}, "pp_proxy_tensors is not supported"),
        ({"get_embedding": True}, "get_embedding=True is not supported"),
    ],
)
def test_sglangs_further_arguments_are_refused_when_used(loaded, arguments, message):
    with pytest.raises(UnsupportedModelError, match=message):
        loaded.model(None, None, None, **arguments)
    if "pp_proxy_tensors" in arguments:
        with pytest.raises(UnsupportedModelError, match=message):
            loaded.model.model(None, None, None, **arguments)
