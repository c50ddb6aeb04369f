"""The comparison of engines: workloads, checkpoints, processes, and a whole run on a tiny model."""

import json
import os
import sys
from statistics import median

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.checkpoints import make_checkpoint
from bench.engines import EngineError, EngineProcess, engine_names
from bench.models import CONFIGS, checkpoint_folder
from bench.peers.sglite import SgliteEngine
from bench.peers.sglite_transformers import SgliteTransformersEngine
from bench.report import tables
from bench.roofline import Weights, least_seconds, read_weights
from bench.throughput import main, parse_arguments
from bench.workloads import WORKLOADS, Workload


def common_prefix(left, right) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


@pytest.mark.parametrize(
    ("name", "num_prompts", "prompt_tokens", "shared_tokens", "new_tokens", "counted"),
    [
        ("single", 1, 128, 0, 128, 128),
        ("batch", 32, 128, 0, 64, 32 * 64),
        ("shared", 32, 1056, 1024, 32, 32 * 32),
        ("prefill", 1, 2048, 0, 1, 2048),
    ],
)
def test_workloads_have_their_shapes(
    name, num_prompts, prompt_tokens, shared_tokens, new_tokens, counted
):
    workload = WORKLOADS[name]
    prompts = workload.prompts(repeat=0, vocab_size=49152)
    assert [len(prompt) for prompt in prompts] == [prompt_tokens] * num_prompts
    assert workload.new_tokens == new_tokens
    assert workload.counted_tokens == counted
    assert workload.kv_tokens == num_prompts * (prompt_tokens + new_tokens)
    for prompt in prompts[1:]:
        # A few own tokens may be equal by chance.
        assert shared_tokens <= common_prefix(prompts[0], prompt) < shared_tokens + 4
    assert all(0 < token < 49152 for prompt in prompts for token in prompt)


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_repeat_begins_like_another(name):
    repeats = [WORKLOADS[name].prompts(repeat, 49152) for repeat in range(5)]
    for index, prompts in enumerate(repeats):
        for other in repeats[:index]:
            assert max(common_prefix(a, b) for a in prompts for b in other) < 4
    assert repeats[3] == WORKLOADS[name].prompts(3, 49152)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of the checkpoint `tiny`, in a cache folder of its own."""
    return checkpoint_folder("tiny", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_checkpoints_have_the_shapes_of_real_models(name, parameters):
    # The published models count as many parameters.
    fields = CONFIGS[name]
    assert fields["max_position_embeddings"] >= 4096
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert model.num_parameters() == parameters


def test_a_checkpoint_is_made_once(tiny):
    before = {file: file.stat().st_mtime_ns for file in tiny.iterdir()}
    assert checkpoint_folder("tiny", tiny.parent) == tiny
    assert {file: file.stat().st_mtime_ns for file in tiny.iterdir()} == before
    assert list(tiny.parent.iterdir()) == [tiny]
    assert checkpoint_folder(str(tiny), tiny.parent) == tiny
    with pytest.raises(ValueError, match=r"'llama-7b' is neither a folder .* llama-135m"):
        checkpoint_folder("llama-7b", tiny.parent)


def test_hugging_face_loads_the_checkpoint_and_its_numbers_are_sane(tiny):
    model, report = AutoModelForCausalLM.from_pretrained(
        tiny, dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert model.dtype == torch.bfloat16
    prompts = torch.tensor(WORKLOADS["batch"].prompts(0, 1024))
    with torch.inference_mode():
        output = model(prompts, output_hidden_states=True)
    assert 0.5 < output.logits.float().std() < 2
    for hidden in output.hidden_states:
        assert hidden.float().std() < 20
    # A model that says its last token again would hide engines that compute wrongly.
    assert (output.logits[:, -1].argmax(-1) == prompts[:, -1]).float().mean() < 0.2


def test_the_tokenizer_has_a_text_for_each_id(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == 1024
    text = "Größe 7, naïve"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([300, 301]) == " 300 301"
    assert tokenizer.eos_token_id == 0


def test_shards_hold_the_same_weights_as_one_file(tiny, tmp_path):
    make_checkpoint(CONFIGS["tiny"], tmp_path / "sharded", shard_bytes=40_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tiny).state_dict().items():
        assert torch.equal(tensor, sharded[name]), name


def test_weights_are_counted(tiny):
    layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128
    assert read_weights(tiny) == Weights(body=2 * layer, head=1024 * 64)


def test_least_time_is_reading_or_arithmetic():
    weights = Weights(body=900_000_000, head=100_000_000)  # 2 GB
    decode = Workload("decode", 1, 0, 1, 11)
    assert least_seconds(decode, weights, "bfloat16", 20, 1e6) == pytest.approx(11 * 0.1)
    # 100 shared rows and twice 10 own through the body, 2 rows through the head, then one step.
    shared = Workload("shared", 2, 100, 10, 2)
    operations = 2 * (0.9 * 120 + 0.1 * 2) + 2 * (0.9 * 2 + 0.1 * 2)
    assert least_seconds(shared, weights, "bfloat16", 1e6, 100) == pytest.approx(operations / 100)


def test_an_engine_that_fails_says_why_and_lives_on(tiny, tmp_path):
    with EngineProcess("transformers", sys.executable, num_threads=1) as engine:
        with pytest.raises(EngineError, match=r"transformers failed:[\s\S]*nowhere"):
            engine.load(tmp_path / "nowhere", "float32", 64)
        engine.load(tiny, "float32", 64)
        # Prompts of mixed length are padded, and the padding changes nothing.
        together = engine.run([[5, 6, 7], [8, 9, 10, 11, 12]], 4)["token_ids"]
        assert together == [
            engine.run([prompt], 4)["token_ids"][0] for prompt in ([5, 6, 7], [8, 9, 10, 11, 12])
        ]
        process = engine._process.pid
        assert engine.quit() > engine.memory_after_imports > 0
    assert not os.path.exists(f"/proc/{process}")


def test_the_path_through_transformers_is_an_engine(tiny):
    prompts = [[5, 6, 7], [8] * 20]
    expected = SgliteEngine(str(tiny), "float32", 1, 512, None)
    engine = SgliteTransformersEngine(str(tiny), "float32", 1, 512, None)
    assert engine.about["settings"] == "architecture=transformers"
    assert "Hugging Face's class" in str(engine.llm.describe())
    assert engine.generate(prompts, 8) == expected.generate(prompts, 8)


def test_an_engine_that_cannot_start_says_why():
    with pytest.raises(EngineError, match=r"absent ended with exit code 1:[\s\S]*No module named"):
        EngineProcess("absent", sys.executable, num_threads=1)


def test_an_engine_is_ended_with_its_block():
    with EngineProcess("transformers", sys.executable, num_threads=1) as engine:
        process = engine._process.pid
        assert os.path.exists(f"/proc/{process}")
    assert not os.path.exists(f"/proc/{process}")


def test_arguments_are_checked(capsys):
    assert {"sglite", "transformers"} <= set(engine_names())
    options = parse_arguments(["--peer", "transformers", "--peer-python", "transformers=/a/python"])
    assert options.engines == {"sglite": sys.executable, "transformers": "/a/python"}
    for wrong in (
        ["--peer", "absent"],
        ["--peer", "sglite"],
        ["--peer-python", "transformers=/a/python"],
        ["--repeats", "0"],
        ["--workload", "absent"],
    ):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
        assert wrong[0] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--model='absent' is neither"):
        main(["--model", "absent"])


def test_a_comparison_from_end_to_end(tiny, tmp_path, capsys):
    """Peers that cannot run are left out, and the page says why."""
    output = tmp_path / "results" / "tiny.json"
    arguments = ["--model", "tiny", "--cache-folder", str(tiny.parent), "--dtype", "float32"]
    arguments += ["--peer", "transformers", "--num-threads", "1", "--output", str(output)]
    # This interpreter has neither what converts for the one nor what the other imports.
    for peer in ("llama_cpp", "vllm_cpu"):
        arguments += ["--peer", peer, "--peer-python", f"{peer}={sys.executable}"]
    arguments += ["--workload", "single", "--workload", "batch", "--repeats", "2"]
    main([*arguments, "--startups", "1"])
    result = json.loads(output.read_text())
    assert list(result["engines"]) == ["sglite", "transformers"]
    assert list(result["failures"]) == ["llama_cpp", "vllm_cpu"]
    assert result["command"].startswith("python bench/throughput.py --model tiny --cache-folder")
    workload_table, engine_table, machine_table, _left_out = tables(result)
    assert workload_table.columns[:4] == [
        "workload",
        "sglite, tok/s",
        "transformers, tok/s",
        "sglite / transformers",
    ]
    page, printed = output.with_suffix(".md").read_text(), capsys.readouterr()
    assert "| llama_cpp | start: ModuleNotFoundError: No module named 'gguf' |" in page
    assert "| vllm_cpu | start: ModuleNotFoundError: No module named 'vllm' |" in page
    assert "llama_cpp is left out" in printed.err
    assert [cells[0] for cells in workload_table.cells] == ["single", "batch"]
    for cells, tokens in zip(workload_table.cells, (128, 32 * 64), strict=True):
        seconds = result["workloads"][cells[0]]["seconds"]
        ours, theirs = seconds["sglite"], seconds["transformers"]
        assert len(ours) == len(theirs) == 2
        assert cells[1].startswith(f"{median(tokens / time for time in ours):.1f} (")
        ratio = median(1 / time for time in ours) / median(1 / time for time in theirs)
        in_turn = sorted(their / our for our, their in zip(ours, theirs, strict=True))
        assert cells[3] == f"{ratio:.2f} ({in_turn[0]:.2f} to {in_turn[1]:.2f})"
        assert "| " + " | ".join(cells) + " |" in page
        assert cells[3].split()[0] in printed.out
    # Two engines that compute the same model, in float32: 2 x (1 + 32) prompts.
    assert [cells[5] for cells in engine_table.cells] == ["66 of 66", "66 of 66"]
    for engine in result["engines"].values():
        assert engine["peak_memory"] > engine["memory_after_imports"] > 50e6
        assert len(engine["startup_seconds"]) == len(engine["import_seconds"]) == 1
    assert len(result["limits"]) == 2
    figures = dict(machine_table.cells)
    assert figures["threads"] == "1"
    assert float(figures["reading, GB/s"].split()[0]) > 0
