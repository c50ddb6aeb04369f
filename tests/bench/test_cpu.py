import json
from itertools import pairwise

import pytest

from bench import cpu, throughput
from bench.engines import EngineError
from bench.report import reached_share
from bench.workloads import WORKLOADS


def result(seconds: dict, quantization=None, **engines) -> dict:
    """A result of one turn, with the seconds of each workload by engine."""
    names = list(next(iter(seconds.values())))
    return {
        "model": "tiny",
        "command": "python bench/throughput.py",
        "date": "today",
        "dtype": "bfloat16",
        "quantization": quantization,
        "weights": {"body": 90_000_000, "head": 10_000_000},
        "checkpoint_bytes": 200_000_000,
        "kv_bytes": 100_000_000,
        "limits": [{"read_gigabytes_per_second": 20.0, "matmul_gigaflops_per_second": 1e6}],
        "engines": {
            name: {
                "startup_seconds": [engines.get(name, 1.0)],
                "peak_memory": 700_000_000,
                "memory_after_imports": 200_000_000,
            }
            for name in names
        },
        "workloads": {
            name: {**vars(WORKLOADS[name]), "seconds": {e: [s] for e, s in by_engine.items()}}
            for name, by_engine in seconds.items()
        },
    }


def test_goals_are_measured_against_the_best_peer():
    measured = result(
        {
            "single": {"sglite": 1.6, "llama_cpp": 2.0, "openvino": 3.2},
            "batch": {"sglite": 2.0, "llama_cpp": 8.0, "openvino": 2.5},
        },
        sglite=0.5,
        llama_cpp=0.6,
        openvino=0.1,
    )
    rows = {row[0]: row[1:] for row in cpu.goals(measured)}
    assert rows["single, tok/s"] == [
        "80.0",
        "llama_cpp 64.0",
        "1.25 (1.25 to 1.25)",
        "1.10",
        "yes",
    ]
    assert rows["batch, tok/s"][1:] == ["openvino 819.2", "1.25 (1.25 to 1.25)", "1.30", "no"]
    # 200 MB at 20 GB/s is 10 ms for each of 128 tokens, of 12.5 ms.
    assert rows["single, share of the limit"] == ["80%", "", "", "85%", "no"]
    assert rows["start-up to first token, s"][2:] == ["1.20", "1.00", "yes"]
    assert rows["peak memory above imports, MB"] == ["500", "", "", "500", "yes"]


def test_a_packed_start_stands_beside_one_from_the_checkpoint():
    measured = result({"single": {"sglite": 1.0, "llama_cpp": 1.2}}, sglite=0.5, llama_cpp=0.6)
    measured |= {"packed": True, "startup_seconds_not_packed": [0.8]}
    rows = {row[0]: row[1:] for row in cpu.goals(measured)}
    assert rows["start-up to first token, packed, s"][2:] == ["1.20", "1.00", "yes"]
    assert rows["start-up to first token, s"][2:] == ["0.75", "1.00", "no"]


def test_goals_of_int8():
    measured = result({"single": {"sglite": 1.0, "llama_cpp": 1.2}}, "int8")
    rows = {row[0]: row[1:] for row in cpu.goals(measured)}
    assert list(rows) == ["single, tok/s", "peak memory above imports, MB"]
    assert rows["single, tok/s"][2:] == ["1.20 (1.20 to 1.20)", "1.15", "yes"]
    assert rows["peak memory above imports, MB"] == ["500", "", "", "400", "no"]


def test_without_peers_there_is_nothing_to_reach():
    rows = {row[0]: row[1:] for row in cpu.goals(result({"single": {"sglite": 1.0}}))}
    assert rows["single, tok/s"] == ["128.0", "no peer", "", "1.10", ""]
    assert rows["start-up to first token, s"][1] == "no llama_cpp"


def test_one_command_measures_all_and_sums_up(tmp_path, monkeypatch):
    commands = []

    def measure(arguments):
        options = throughput.parse_arguments([*arguments, *_pythons(arguments)])
        commands.append((options.model, options.quantization, list(options.engines)))
        seconds = {"single": dict.fromkeys(options.engines, 1.0)}
        options.output.write_text(json.dumps(result(seconds, options.quantization)))

    monkeypatch.setattr(throughput, "main", measure)
    monkeypatch.setattr(cpu, "is_installed", lambda name: name != "openvino")
    cpu.main(["--output-folder", str(tmp_path)])
    bf16, int8 = ["sglite", "transformers", "llama_cpp", "vllm_cpu"], ["sglite", "llama_cpp"]
    assert commands == [
        ("llama-135m", None, bf16),
        ("llama-135m", "int8", int8),
        ("qwen3-0.6b", None, bf16),
        ("qwen3-0.6b", "int8", int8),
    ]
    page = (tmp_path / "cpu.md").read_text()
    assert page.count("single, tok/s") == 4
    cpu.main(["--output-folder", str(tmp_path), "--summary"])
    assert len(commands) == 4
    assert (tmp_path / "cpu.md").read_text() == page


def _pythons(arguments: list[str]) -> list[str]:
    peers = [b for a, b in pairwise(arguments) if a == "--peer"]
    return [word for peer in peers for word in ("--peer-python", f"{peer}=python")]


def test_a_quantization_is_counted_with_its_bytes():
    seconds = {"single": {"sglite": 1.28}}
    assert reached_share(result(seconds), "single") == pytest.approx(1.0)
    assert reached_share(result(seconds, "int8"), "single") == pytest.approx(0.5)


def test_a_part_that_fails_does_not_lose_the_others(tmp_path, monkeypatch):
    def measure(arguments):
        options = throughput.parse_arguments([*arguments, *_pythons(arguments)])
        if options.quantization:
            raise EngineError("sglite failed:\nno int8")
        options.output.write_text(json.dumps(result({"single": {"sglite": 1.0}})))

    monkeypatch.setattr(throughput, "main", measure)
    with pytest.raises(SystemExit, match="tiny-int8: sglite failed"):
        cpu.main(["--model", "tiny", "--peer", "transformers", "--output-folder", str(tmp_path)])
    assert "128.0" in (tmp_path / "cpu.md").read_text()
