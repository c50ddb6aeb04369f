"""Every op on a stream of its own and inside a CUDA graph; launches that cannot be are errors."""

import pytest
import torch

from sglite import ops
from tests.ops.test_rope import make_table

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Ops whose own tests capture them.
ELSEWHERE = {"log_probs", "paged_attention", "plan_attention", "sample"}
NOT_KERNELS = {
    "AttentionPart",
    "AttentionPlan",
    "LayerBatch",
    "LayerCall",
    "LayerCalls",
    "LayerParts",
    "LinearPart",
    "LogProbs",
    "NormPart",
    "PackedWeight",
    "QuantizedLayout",
    "QuantizedRows",
    "QuantizedWeight",
    "SpareMemory",
    "TokenEdits",
    "WeightMemory",
    "WeightWriter",
    "attention_workspace",
    "decoder_layers",
    "gated",
    "map_pages",
    "pack_weight",
    "quantize_weight",
    "rows_of_experts",
    "sampling_workspace",
    "used_experts",
}


def random(*shape):
    return torch.randn(shape, device="cuda").bfloat16()


def slots(count, limit=64):
    return torch.randperm(limit, device="cuda")[:count]


def rope_inputs():
    return [torch.arange(5, device="cuda") * 3, make_table(50, 64).cuda()]


def caches():
    return [random(4, 16, 2, 64), random(4, 16, 2, 64)]


def rotate(q, k, positions, table):
    ops.apply_rope(q, k, positions, table)


def fused(qkv, positions, table, k_cache, v_cache, at, q_norm, k_norm):
    ops.rope_and_write_kv(qkv, positions, table, k_cache, v_cache, at, q_norm=q_norm, k_norm=k_norm)


def linear_inputs():
    return [random(5, 512), random(256, 512), random(256)]


def with_norm(op, **options):
    """A fused linear op with the weight of its norm as the last of the tensors."""
    return lambda x, weight, bias, norm: op(x, norm, 1e-5, weight, bias, **options)


def decode_inputs():
    positions = torch.arange(5, device="cuda") * 3
    return [
        torch.randint(0, 50, (5,), device="cuda"),
        torch.zeros(5, dtype=torch.int64, device="cuda"),
        positions,
        (positions + 1).int(),
        (positions + 1).int(),
        slots(5),
        torch.randint(0, 50, (5, 4), device="cuda"),
        torch.randint(0, 9, (5, 3), device="cuda").int(),
    ]


def experts_of(x, logits, gate_up, down):
    """Routing and experts, which take their weights as lists."""
    weights, experts = ops.route(logits, 2, normalize=True)
    return ops.mix_experts(
        x, weights, experts, list(gate_up), list(down), activation="silu", batch_invariant=True
    )


# By name: the op on tensors, some of which it may change; and fresh tensors for it.
CALLS = {
    "embedding": (ops.embedding, lambda: [torch.randint(0, 50, (5,)).cuda(), random(50, 64)]),
    "rms_norm": (
        lambda x, weight, residual: ops.rms_norm(x, weight, 1e-5, residual=residual),
        lambda: [random(5, 2048), random(2048), random(5, 2048)],
    ),
    "layer_norm": (
        lambda x, weight, bias: ops.layer_norm(x, weight, bias, 1e-5),
        lambda: [random(5, 2048), random(2048), random(2048)],
    ),
    "silu_and_mul": (ops.silu_and_mul, lambda: [random(5, 128)]),
    "gelu_and_mul": (ops.gelu_and_mul, lambda: [random(5, 128)]),
    "apply_rope": (rotate, lambda: [random(5, 4, 64), random(5, 2, 64), *rope_inputs()]),
    "write_kv": (ops.write_kv, lambda: [random(5, 2, 64), random(5, 2, 64), *caches(), slots(5)]),
    "rope_and_write_kv": (
        fused,
        lambda: [random(5, 8 * 64), *rope_inputs(), *caches(), slots(5), random(64), random(64)],
    ),
    "linear": (ops.linear, linear_inputs),
    "gated_linear": (
        lambda *tensors: ops.gated_linear(*tensors, activation="silu"),
        linear_inputs,
    ),
    "norm_linear": (with_norm(ops.norm_linear), lambda: [*linear_inputs(), random(512)]),
    "norm_gated_linear": (
        with_norm(ops.norm_gated_linear, activation="silu"),
        lambda: [*linear_inputs(), random(512)],
    ),
    "soft_cap": (lambda x: ops.soft_cap(x, 30.0), lambda: [random(5, 512).float()]),
    "route": (
        lambda logits: torch.stack(ops.route(logits, 2, normalize=True)),
        lambda: [random(5, 8).float()],
    ),
    "mix_experts": (
        experts_of,
        lambda: [random(5, 256), random(5, 8).float(), random(8, 512, 256), random(8, 256, 256)],
    ),
    "gather_tokens": (
        ops.gather_tokens,
        lambda: [torch.randint(-1, 9, (9,), device="cuda") for _ in range(3)],
    ),
    "advance": (lambda *tensors: ops.advance(*tensors, 16), decode_inputs),
    "copy_kv_slots": (
        lambda k_cache, v_cache, *at: ops.copy_kv_slots([k_cache, v_cache], *at),
        lambda: [*caches(), slots(9), slots(9)],
    ),
}


def test_every_op_is_here():
    assert set(CALLS) | ELSEWHERE | NOT_KERNELS == set(ops.__all__)


@pytest.fixture
def seeded(gpu):
    torch.manual_seed(0)


def results(out, tensors):
    """All that a call has written, or may have."""
    return [*tensors, *([] if out is None else [out])]


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("name", CALLS)
def test_runs_on_a_side_stream(name):
    call, make = CALLS[name]
    tensors = make()
    expected_tensors = [tensor.clone() for tensor in tensors]
    expected = results(call(*expected_tensors), expected_tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: whatever ran elsewhere would run before
        out = call(*tensors)
        assert not stream.query(), "the stream should still be busy"
    assert torch.cuda.default_stream().query()
    stream.synchronize()
    for actual, wanted in zip(results(out, tensors), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("name", CALLS)
def test_a_replay_equals_the_eager_op(name):
    call, make = CALLS[name]
    tensors = make()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = call(*tensors)
    for _ in range(2):  # on tensors that the capture has not seen
        fresh = make()
        for tensor, values in zip(tensors, fresh, strict=True):
            tensor.copy_(values)
        expected = results(call(*fresh), fresh)
        graph.replay()
        torch.cuda.synchronize()
        for actual, wanted in zip(results(out, tensors), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.usefixtures("seeded")
def test_kernels_that_overlap_see_each_others_results():
    """A chain in which each kernel may start while the one before it still runs."""
    tokens, width, inner = 64, 1024, 2048
    x, weight, table = random(tokens, width), random(width), random(50, width)
    ids = torch.randint(0, 50, (tokens,)).cuda()

    def chain():
        hidden = ops.embedding(ids, table)
        for _ in range(20):
            normed = ops.rms_norm(x, weight, 1e-5, residual=hidden)
            qkv = normed.view(tokens, width)
            ops.rope_and_write_kv(qkv, positions, cos_sin, *cache, at)
            gates = torch.cat([qkv, hidden, normed, hidden], 1)
            hidden = hidden + ops.silu_and_mul(gates[:, : 2 * inner])[:, :width]
        return hidden

    positions, cos_sin = torch.arange(tokens, device="cuda") % 50, make_table(50, 64).cuda()
    cache, at = [random(8, 16, 2, 64), random(8, 16, 2, 64)], slots(tokens, 128)
    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.usefixtures("seeded")
def test_positions_written_by_the_kernel_before():
    """The fused kernel reads a position early, and again once it may rely on it."""
    qkv, positions = random(64, 8 * 64), torch.zeros(64, dtype=torch.int64, device="cuda")
    cos_sin, at = make_table(50, 64).cuda(), slots(64)
    cache = caches()
    for step in range(1, 50):
        expected = qkv.clone()
        ops.rope_and_write_kv(expected, torch.full_like(positions, step), cos_sin, *cache, at)
        torch.cuda.synchronize()
        actual = qkv.clone()
        torch.add(positions, 1, out=positions)
        ops.rope_and_write_kv(actual, positions, cos_sin, *cache, at)
        assert torch.equal(actual[:, :256], expected[:, :256])


def test_an_impossible_launch_is_an_error_that_names_the_op():
    too_many = 2**31  # blocks
    x = random(1, 2048).expand(too_many, -1)
    with pytest.raises(RuntimeError, match="rms_norm: CUDA: "):
        ops.rms_norm(x, random(2048), 1e-5, out=x)
    out = ops.rms_norm(random(3, 2048), random(2048), 1e-5)  # and the next one works
    assert torch.isfinite(out).all()
