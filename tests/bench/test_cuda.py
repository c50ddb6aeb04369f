"""What the GPU benches compute from what they measure. The measuring itself needs a GPU."""

import json
import time

import pytest
import torch

from bench.cuda_accuracy import Differences, draw_prompts, variants
from bench.cuda_decode import main, parse_arguments
from bench.cuda_process import ContestantError, ContestantProcess
from bench.cuda_report import markdown, tables
from bench.cuda_trace import describe_steps, gpu_events
from bench.cuda_workloads import DECODES, PREFILL, ModelShape, least_seconds
from bench.models import CONFIGS, checkpoint_folder
from bench.roofline import Weights

H200 = {"read_gigabytes_per_second": 4300, "matmul_teraflops_per_second": 790}


def shape_of(name: str) -> ModelShape:
    """As `ModelShape.of` reads it from a checkpoint, without making one."""
    config = CONFIGS[name]
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = hidden * head * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    layers = config["num_hidden_layers"]
    weights = Weights(layers * layer, config["vocab_size"] * hidden)
    return ModelShape(weights, layers, heads, kv_heads, head)


@pytest.mark.parametrize(
    ("name", "single", "batch", "prefill"),
    [
        ("qwen3-0.6b", 0.281, 2.03, 18.9),
        ("llama-3.2-1b", 0.576, 1.07, 25.8),
        ("llama-3.1-8b", 3.495, 5.49, 167),
    ],
)
def test_least_times_are_those_of_the_models_and_the_machine(name, single, batch, prefill):
    works = (DECODES[0], DECODES[2], PREFILL)
    times = [1e3 * least_seconds(work.least_terms(shape_of(name)), H200) for work in works]
    assert times == pytest.approx([single, batch, prefill], rel=0.02)


def test_the_context_is_the_mean_over_the_measured_tokens():
    for decode in DECODES:
        lengths = [
            decode.workload.prompt_tokens + generated for generated in range(decode.new_tokens)
        ]
        assert sum(lengths) / len(lengths) == pytest.approx(decode.context, abs=1)


def event(name, start, duration, launch, category="kernel"):
    return {
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {"correlation": launch},
    }


def test_a_trace_gives_periods_gaps_and_kernels():
    events = [{"cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 900}]
    for step in range(5):
        begin = 1000 * step
        for kernel in range(8):  # which add 100 us each, 800 in all
            # From the second on they start 40 us early, and wait.
            early = 40 if kernel else 0
            name = "a" if kernel else "b"
            events.append(event(name, begin + 100 * kernel - early, 100 + early, launch=step))
        events.append(event("copy", begin + 850, 30, launch=100 + step, category="gpu_memcpy"))
    events += [event("prefill", 9000 + index, 1, launch=200 + index) for index in range(20)]
    found = describe_steps(gpu_events(events))
    assert found["steps"] == 5
    assert found["period_us"] == 1000
    assert found["span_us"] == 800
    assert found["gap_us"] == 200
    assert found["idle_us"] == found["max_idle_us"] == 170
    assert [(row["name"], row["per_step"], row["added_us"]) for row in found["kernels"]] == [
        ("a", 7, 700),
        ("b", 1, 100),
    ]
    assert describe_steps(gpu_events(events[-20:])) == {"steps": 0}


def test_differences_are_close_by_mean_and_by_the_peers_largest():
    close = Differences()
    close.add(torch.tensor([0.01, 0.08]), torch.tensor([0.01, 0.05]))
    close.add(torch.empty(0), torch.empty(0))
    assert close.is_close
    assert close.ours_mean == pytest.approx(0.045)
    far = Differences()
    far.add(torch.tensor([0.0] * 99 + [0.3]), torch.tensor([0.1] * 100))
    assert not far.is_close
    bad = Differences()
    bad.add(torch.tensor([0.0, torch.nan]), torch.tensor([0.1, 0.1]))
    assert not bad.is_close


def test_prompts_share_beginnings_and_variants_have_names():
    prompts = draw_prompts([1, 5, 9, 4])
    assert prompts[2][:5] == prompts[1]
    assert [len(prompt) for prompt in prompts] == [1, 5, 9, 4]
    names = [variant.name for variant in variants(100)]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint_folder("tiny", tmp_path_factory.mktemp("cache"))


def test_a_contestant_that_fails_says_why(tiny, tmp_path):
    with (
        ContestantProcess("transformers_static", tmp_path / "nowhere", device="cpu") as process,
        pytest.raises(ContestantError, match=r"transformers_static failed:[\s\S]*nowhere"),
    ):
        process.wait_ready(time.monotonic() + 200)


def test_a_comparison_from_end_to_end(tiny, tmp_path, capsys):
    output = tmp_path / "results" / "tiny.json"
    words = ["--model", "tiny", "--device", "cpu", "--scale", "64", "--output", str(output)]
    words += ["--cache-folder", str(tiny.parent), "--variant", 'chunks={"chunked_prefill_size":32}']
    assert parse_arguments(words).variant == [("chunks", {"chunked_prefill_size": 32})]
    main(words)
    result = json.loads(output.read_text())
    assert result["command"].startswith("python -m bench.cuda_decode --model tiny")
    runs = result["models"]["tiny"]["runs"]
    assert list(runs) == ["sglite", "chunks"]
    for run in runs.values():
        assert all(len(found["step_seconds"]) > 2 for found in run["decode"].values())
        assert len(run["prefill_seconds"]) == 5
        assert set(run["startup"]) == {
            "weights_seconds",
            "after_weights_seconds",
            "first_tokens_seconds",
        }
    titles = [rows.title for rows in tables(result)]
    assert "tiny: time of a step" in titles
    page = output.with_suffix(".md").read_text()
    assert page == markdown(result)
    assert "| prefill 8k |" in page
    assert "prefill 8k" in capsys.readouterr().out
