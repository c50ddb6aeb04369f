import pytest

from bench.growth import (
    BATCHES,
    CONTEXTS,
    CURVES,
    SHARES,
    curves,
    markdown,
    merged,
    plot,
    slower_batches,
    tables,
    verdict,
    workloads_of,
)
from bench.workloads import Workload


def all_workloads(longest: int) -> list[Workload]:
    return [workload for curve in CURVES for workload in workloads_of(curve, longest)]


def result(seconds) -> dict:
    """A result of two turns: a workload took `seconds` in the first, and twice that in the next."""
    workloads = {
        workload.name: {
            "seconds": {"sglite": [seconds(workload), 2 * seconds(workload)], "peer": [1.0, 1.0]}
        }
        for workload in all_workloads(8192)
    }
    return {
        "model": "tiny",
        "longest": 8192,
        "command": "python -m bench.growth",
        "date": "today",
        "dtype": "bfloat16",
        "quantization": None,
        "num_threads": 2,
        "load_average": 0.5,
        "python": "3.11",
        "machine": {"processor": "a processor", "system": "a system"},
        "limits": [{"read_gigabytes_per_second": 10.0, "matmul_gigaflops_per_second": 100.0}],
        "engines": {"sglite": {}, "peer": {}},
        "workloads": workloads,
    }


def linear(workload: Workload) -> float:
    own = workload.shared_tokens + workload.num_prompts * workload.own_tokens
    return 1e-3 * own + 5e-3 * (workload.new_tokens - 1)


def test_workloads_have_their_shapes():
    by_name = {workload.name: workload for workload in all_workloads(8192)}
    assert len(by_name) == len(BATCHES) + 2 * len(CONTEXTS) + len(SHARES)
    assert len(all_workloads(4096)) == len(by_name) - 2
    assert by_name["context 8192, 32 new"].kv_tokens == 8192
    for share in SHARES:
        workload = by_name[f"prefix {share} %"]
        assert workload.prompt_tokens == 512
        prompts = workload.prompts(0, 1000)
        assert all(
            prompt[: 512 * share // 100] == prompts[0][: 512 * share // 100] for prompt in prompts
        )
    assert len({tuple(prompt) for prompt in by_name["prefix 100 %"].prompts(0, 1000)}) == 1


def test_curves_have_their_units():
    found = curves(result(linear), "sglite")
    assert found["batch"][1] == pytest.approx([32 / 0.187, 32 / 0.374])
    assert found["prefill"][128] == pytest.approx([0.096, 0.192])
    # The prompt's time goes out, and what is left is shared by 31 tokens.
    assert found["decode"][8192] == pytest.approx([5.0, 10.0])
    assert found["prefix"][100] == pytest.approx([0.587, 1.174])
    assert found["prefix"][0][0] == pytest.approx(16 * 0.512 + 0.075)


def test_a_batch_is_slower_if_it_is_in_every_turn():
    assert slower_batches({1: [10, 10], 2: [12, 9], 4: [11, 9.9]}) == []
    assert slower_batches({1: [10, 10], 2: [9, 9], 4: [20, 9.5]}) == [(1, 2)]
    assert slower_batches({4: [8, 8], 1: [10, 10], 2: [9, 9]}) == [(1, 2), (1, 4), (2, 4)]
    assert slower_batches({1: [10, 10], 2: [9.9, 9.9]}) == []
    assert slower_batches({1: [10, 10], 2: [9.9, 9.9]}, margin=0) == [(1, 2)]


def test_the_page_names_batches_that_are_slower():
    grown = result(lambda workload: 9.0 if workload.name == "batch 48" else linear(workload))
    assert "48 below 32" in verdict(grown)
    assert verdict(result(linear)).endswith("sglite: none; peer: none.")
    rows = tables(grown)
    assert [len(table.cells) for table in rows] == [
        len(BATCHES),
        len(CONTEXTS),
        len(CONTEXTS),
        len(SHARES),
        6,
    ]
    assert rows[0].columns == ["prompts", "sglite", "peer"]
    page = markdown(grown, [])
    assert "48 below 32" in page
    assert "| 8192 | 7.50 (5.00 to 10.00) | 0.00 (0.00 to 0.00) |" in page


def test_a_curve_that_was_measured_again_takes_the_place_of_the_first():
    earlier, later = result(linear), result(lambda _: 9.0)
    later["workloads"] = {w.name: later["workloads"][w.name] for w in workloads_of("batch", 8192)}
    both = merged(earlier, later)
    assert curves(both, "sglite")["batch"][1] == [32 / 9, 32 / 18]
    assert curves(both, "sglite")["prefix"] == curves(earlier, "sglite")["prefix"]
    assert "(today), then" in both["command"]
    with pytest.raises(ValueError, match="num_threads: 2 before, 4 now"):
        merged(earlier, later | {"num_threads": 4})
    with pytest.raises(ValueError, match="engines"):
        merged(earlier, later | {"engines": {"sglite": {}}})


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    files = plot(result(linear), tmp_path / "growth-tiny")
    assert [file.name for file in files] == [
        "growth-tiny-batch.png",
        "growth-tiny-context.png",
        "growth-tiny-prefix.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
