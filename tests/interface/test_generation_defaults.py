"""What is read from generation_config.json, and what is refused in it."""

import json
import math

import pytest
from transformers import GenerationConfig

from sglite.interface.errors import CheckpointError
from sglite.interface.generation_defaults import GenerationDefaults

read = GenerationDefaults.from_generation_config


def test_no_file_and_an_empty_one_leave_the_librarys_defaults():
    assert read(None) == read({}) == GenerationDefaults()


def test_null_counts_as_absent_and_other_keys_are_left_alone():
    assert read({"temperature": None, "do_sample": None}) == GenerationDefaults()
    file = {"_from_model_config": True, "pad_token_id": 0, "num_beams": 4, "max_length": 20}
    assert read(file) == GenerationDefaults()


def test_values_are_read():
    file = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "max_new_tokens": 77,
        "eos_token_id": [151645, 151643],
    }
    assert read(file) == GenerationDefaults(
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.1,
        repetition_penalty=1.05,
        max_new_tokens=77,
        eos_token_ids=(151645, 151643),
    )


def test_top_k_0_is_off():
    assert read({"top_k": 0}).top_k == -1


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 5], (2, 5)), ([], ()), (None, ())])
def test_end_tokens_are_one_or_a_list(value, ids):
    assert read({"eos_token_id": value}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("file", "temperature"),
    [
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({}, 1.0),
    ],
)
def test_a_file_is_greedy_only_where_it_says_so(file, temperature):
    assert read(file).temperature == temperature


def test_reads_a_file_that_hugging_face_wrote(tmp_path):
    GenerationConfig(do_sample=True, temperature=0.3, eos_token_id=[7, 8]).save_pretrained(tmp_path)
    defaults = read(json.loads((tmp_path / "generation_config.json").read_text()))
    assert defaults == GenerationDefaults(temperature=0.3, eos_token_ids=(7, 8))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", -1, "at least 0"),
        ("temperature", "hot", "a finite number"),
        ("temperature", math.nan, "a finite number"),
        ("top_k", 1.5, "an integer"),
        ("top_k", -2, "at least -1"),
        ("top_p", 0.0, "(0, 1]"),
        ("min_p", 2, "[0, 1]"),
        ("repetition_penalty", 0, "above 0"),
        ("max_new_tokens", 0, "at least 1"),
        ("do_sample", "false", "True or False"),
        ("eos_token_id", "</s>", "a token id"),
        ("eos_token_id", [2, -1], "a token id"),
    ],
)
def test_a_wrong_value_names_the_file_the_key_the_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(CheckpointError) as caught:
        read({name: value})
    message = str(caught.value)
    assert message.startswith(f"generation_config.json: {name}")
    assert repr(value[-1] if isinstance(value, list) else value) in message
    assert allowed in message
