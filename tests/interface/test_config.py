"""Options and the resolved configuration: checks, foreign names, defaults that need no hardware."""

import dataclasses
import pathlib

import pytest
import torch

from sglite.interface import foreign_names
from sglite.interface.config import (
    ALIASES,
    EngineConfig,
    LLMOptions,
    check_keywords,
    refuse_foreign_option,
)
from sglite.interface.errors import ConfigError
from sglite.interface.option_checks import CHECKS
from sglite.interface.sampling_params import PARAMETER_NAMES

NAMES = [option.name for option in dataclasses.fields(LLMOptions)]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("model", None, "a folder, a hub id, 'demo', or a live Hugging Face module"),
        ("model", 5, "a folder, a hub id, 'demo', or a live Hugging Face module"),
        ("model", "", "a folder, a hub id, 'demo', or a live Hugging Face module"),
        ("model", torch.nn.Linear, "a live Hugging Face module"),
        ("tokenizer", 5, "a folder, a hub id or a tokenizer object"),
        ("tokenizer", "", "a folder, a hub id or a tokenizer object"),
        ("architecture", "", "a name"),
        ("architecture", int, "a name"),
        ("dtype", "int8", "'auto', 'bfloat16', 'float16' or 'float32'"),
        ("dtype", torch.float64, "'auto', 'bfloat16', 'float16' or 'float32'"),
        ("dtype", 16, "'auto', 'bfloat16', 'float16' or 'float32'"),
        ("device", "mps", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("device", "cuda:", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("device", "cuda:x", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("device", 0, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("quantization", 8, "a name"),
        ("context_length", 0, "an integer of at least 1"),
        ("context_length", "4k", "an integer of at least 1"),
        ("kv_cache_tokens", -1, "an integer of at least 1"),
        ("kv_cache_tokens", 1e5, "an integer of at least 1"),
        ("mem_fraction", 0, "a finite number in (0, 1)"),
        ("mem_fraction", 1.0, "a finite number in (0, 1)"),
        ("mem_fraction", 90, "a finite number in (0, 1)"),
        ("mem_fraction", float("nan"), "a finite number in (0, 1)"),
        ("page_size", 0, "an integer of at least 1"),
        ("max_running_requests", 0, "an integer of at least 1"),
        ("chunked_prefill_size", -1, "an integer of at least 1"),
        ("prefix_cache", 1, "True or False"),
        ("cuda_graphs", "no", "True or False"),
        ("num_threads", 0, "an integer of at least 1"),
        ("num_threads", True, "an integer of at least 1"),
        ("seed", -1, "an integer in [0, 18446744073709551615]"),
        ("trust_remote_code", "yes", "True or False"),
        ("batch_invariant", 1, "True or False"),
        ("revision", 5, "a name"),
        ("cache_dir", 5, "a path"),
    ],
)
def test_a_refused_option_is_named_with_its_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        LLMOptions(**{"model": "demo", name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}")
    assert allowed in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dtype", torch.bfloat16, "bfloat16"),
        ("dtype", "half", "float16"),
        ("dtype", "float", "float32"),
        ("dtype", "torch.float32", "float32"),
        ("dtype", None, "auto"),
        ("device", torch.device("cuda", 1), "cuda:1"),
        ("device", torch.device("cpu"), "cpu"),
        ("device", "cpu:0", "cpu"),
        ("device", "cuda", "cuda"),
        ("device", None, "auto"),
        ("model", pathlib.Path("a"), pathlib.Path("a")),
        ("page_size", None, 16),
        ("prefix_cache", None, True),
        ("mem_fraction", 0.5, 0.5),
        ("cache_dir", pathlib.Path("c"), pathlib.Path("c")),
        ("token", True, True),
    ],
)
def test_accepted_options_are_read(name, value, expected):
    assert getattr(LLMOptions(**{"model": "demo", name: value}), name) == expected


def test_a_live_module_and_a_tokenizer_object_pass():
    class Tokenizer:
        def encode(self, text): ...

        def decode(self, ids): ...

    module, tokenizer = torch.nn.Linear(2, 2), Tokenizer()
    options = LLMOptions(model=module, tokenizer=tokenizer)
    assert options.model is module
    assert options.tokenizer is tokenizer


def test_two_sizes_of_the_cache_are_refused():
    with pytest.raises(ConfigError, match=r"mem_fraction=0.5 and kv_cache_tokens=100"):
        LLMOptions(model="demo", mem_fraction=0.5, kv_cache_tokens=100)


def test_a_token_is_shown_nowhere():
    options = LLMOptions(model="demo", token="hf_secret")
    assert options.token == "hf_secret"
    assert "hf_secret" not in f"{options!r}{options}"
    for wrong in (b"hf_secret", ["hf_secret"], ""):
        with pytest.raises(ConfigError, match="token must be a string") as caught:
            LLMOptions(model="demo", token=wrong)
        assert "secret" not in str(caught.value)
    assert "not an empty string" in str(caught.value)


def test_every_option_is_documented_and_checked():
    for cls in (LLMOptions, EngineConfig):
        for option in dataclasses.fields(cls):
            assert f"    {option.name}: " in cls.__doc__
    assert set(CHECKS) == set(NAMES)


class TestKeywords:
    def test_model_path_is_model(self):
        assert check_keywords({"model_path": "x", "seed": 1}) == {"model": "x", "seed": 1}
        assert check_keywords({"model": None, "model_path": "x"}) == {"model": "x"}
        assert check_keywords({"model": "x", "model_path": None}) == {"model": "x"}
        assert LLMOptions.from_keywords({"model_path": "x"}) == LLMOptions(model="x")

    def test_both_are_refused(self):
        with pytest.raises(ConfigError, match="model was given twice, as model and model_path"):
            check_keywords({"model": "x", "model_path": "x"})

    def test_a_missing_model_is_named(self):
        with pytest.raises(ConfigError, match="model is missing: it must be a folder, a hub id"):
            LLMOptions.from_keywords({"seed": 1})

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("contex_length", "context_length"),
            ("kv_cache_token", "kv_cache_tokens"),
            ("prefixcache", "prefix_cache"),
        ],
    )
    def test_a_misspelt_name_gets_the_nearest(self, name, nearest):
        with pytest.raises(ConfigError) as caught:
            check_keywords({"model": "x", name: 1})
        message = str(caught.value)
        assert f"LLM() has no argument {name!r}. Did you mean {nearest!r}?" in message
        assert all(known in message for known in NAMES)

    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            ("gpu_memory_utilization", "use mem_fraction"),
            ("mem_fraction_static", "use mem_fraction"),
            ("max_num_seqs", "use max_running_requests"),
            ("enforce_eager", "use cuda_graphs=False"),
            ("disable_cuda_graph", "use cuda_graphs=False"),
            ("cuda_graph_max_bs", "use cuda_graphs"),
            ("max_model_len", "use context_length"),
            ("context_len", "use context_length"),
            ("tensor_parallel_size", "one device"),
            ("tp_size", "one device"),
            ("dp_size", "one device"),
            ("pipeline_parallel_size", "one device"),
            ("tokenizer_path", "use tokenizer"),
            ("disable_radix_cache", "use prefix_cache=False"),
            ("enable_prefix_caching", "use prefix_cache"),
            ("block_size", "use page_size"),
            ("max_num_batched_tokens", "use chunked_prefill_size"),
            ("enable_chunked_prefill", "chunked_prefill_size"),
            ("max_total_tokens", "use kv_cache_tokens"),
            ("swap_space", "prefix cache"),
            ("kv_cache_dtype", "dtype of the model"),
            ("load_format", "safetensors"),
            ("download_dir", "use cache_dir"),
            ("enable_lora", "LoRA"),
            ("lora_paths", "LoRA"),
            ("speculative_algorithm", "no speculative decoding"),
            ("speculative_config", "no speculative decoding"),
            ("served_model_name", "no server"),
            ("random_seed", "use seed"),
            ("attention_backend", "by device and shape"),
            ("torch_dtype", "use dtype"),
            ("temperature", "llm.generate"),
            ("max_tokens", "llm.generate"),
        ],
    )
    def test_a_foreign_name_gets_ours_or_that_there_is_none(self, name, advice):
        with pytest.raises(ConfigError) as caught:
            check_keywords({"model": "x", name: 1})
        assert repr(name) in str(caught.value)
        assert advice in str(caught.value)
        with pytest.raises(ConfigError):
            refuse_foreign_option(name)

    def test_a_name_that_nobody_knows_is_not_foreign(self):
        assert refuse_foreign_option("zzz") is None

    def test_no_foreign_name_is_one_of_ours_and_all_advice_names_real_things(self):
        for name in (*NAMES, *ALIASES):
            assert foreign_names.advice_for_option(name) is None
        tables = {
            (*NAMES,): (foreign_names._OPTIONS, foreign_names._OPTION_PREFIXES),
            (*PARAMETER_NAMES, "progress"): (foreign_names._SAMPLING,),
            ("images",): (foreign_names._PROMPT_KEYS,),
        }
        for known, group in tables.items():
            for advice in [text for table in group for text in table.values()]:
                first = advice.removeprefix("use ").split(",")[0].split(" ")[0].split("=")[0]
                if advice.startswith("use ") and "." not in first and first != "a":
                    assert first in known, advice


def resolved(options=None, **found):
    values = {
        "model": "demo",
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "device": "cpu",
        "quantization": None,
        "context_limit": 2048,
        "kv_cache_tokens": 10_007,
        "num_threads": 2,
        "batch_invariant": True,
    }
    options = LLMOptions(model="demo", **(options or {}))
    return EngineConfig.resolve(options, **{**values, **found})


class TestEngineConfig:
    def test_defaults_follow_the_device(self):
        cpu, gpu = resolved(), resolved(device="cuda:0")
        assert (cpu.chunked_prefill_size, cpu.cuda_graphs) == (512, False)
        assert gpu.cuda_graphs
        assert gpu.chunked_prefill_size > cpu.chunked_prefill_size
        assert gpu.max_running_requests > cpu.max_running_requests

    def test_what_the_caller_said_stays(self):
        asked = {
            "context_length": 100,
            "page_size": 8,
            "max_running_requests": 3,
            "chunked_prefill_size": 17,
            "prefix_cache": False,
            "cuda_graphs": False,
            "seed": 5,
            "trust_remote_code": True,
            "revision": "main",
        }
        config = resolved(asked, device="cuda:0")
        assert {name: getattr(config, name) for name in asked} == asked
        assert resolved({"cache_dir": pathlib.Path("c")}).cache_dir == "c"

    @pytest.mark.parametrize(
        ("asked", "found", "tokens"),
        [
            ({}, 10_007, 10_000),
            ({}, 16, 16),
            ({"kv_cache_tokens": 100}, 10_007, 112),
            ({"kv_cache_tokens": 112}, 10_007, 112),
            ({"kv_cache_tokens": 1}, 10_007, 16),
            ({"page_size": 1}, 10_007, 10_007),
        ],
    )
    def test_the_cache_has_whole_pages(self, asked, found, tokens):
        config = resolved(asked, kv_cache_tokens=found)
        assert config.kv_cache_tokens == tokens
        assert config.num_pages * config.page_size == tokens

    def test_a_cache_without_a_page_is_refused(self):
        with pytest.raises(ConfigError, match=r"holds 15 tokens.* page_size=16.* mem_fraction"):
            resolved(kv_cache_tokens=15)

    @pytest.mark.parametrize(
        ("asked", "limit", "expected"),
        [(None, 2048, 2048), (100, 2048, 100), (2048, 2048, 2048), (5, None, 5), (None, None, 112)],
    )
    def test_the_context_keeps_within_the_models_limit(self, asked, limit, expected):
        options = {"context_length": asked, "kv_cache_tokens": 112}
        assert resolved(options, context_limit=limit).context_length == expected

    def test_a_context_above_the_models_limit_is_refused(self):
        with pytest.raises(ConfigError, match=r"context_length=2049 .* at most 2048"):
            resolved({"context_length": 2049})

    def test_it_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            resolved().dtype = "float32"

    def test_it_prints_as_a_table_of_every_setting(self):
        config = resolved({"token": "hf_secret", "seed": 5, "mem_fraction": 0.5})
        assert str(config) == repr(config)
        head, *rows = str(config).splitlines()
        assert head == "EngineConfig"
        table = dict(row.split(maxsplit=1) for row in rows)
        assert list(table) == [option.name for option in dataclasses.fields(EngineConfig)]
        assert table["mem_fraction"] == "0.5"
        assert table["prefix_cache"] == "yes"
        assert table["cuda_graphs"] == "no"
        assert table["revision"] == "-"
        assert len({row.index(value) for row, value in zip(rows, table.values(), strict=True)}) == 1
        assert "secret" not in str(config)
