"""Sampling parameters: what is accepted, what is refused and in which words, and resolution."""

import copy
import dataclasses
import inspect
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglite.interface import foreign_names
from sglite.interface.errors import InvalidRequestError
from sglite.interface.generation_defaults import GenerationDefaults
from sglite.interface.sampling_params import (
    ALIASES,
    PARAMETER_NAMES,
    SamplingParams,
    broadcast_sampling_params,
)

NAN, INF = math.nan, math.inf

#: name, refused value, and what the message must say besides both.
REFUSED = [
    ("max_new_tokens", 0, "an integer of at least 1"),
    ("max_new_tokens", True, "an integer of at least 1"),
    ("max_new_tokens", 5.0, "an integer of at least 1"),
    ("max_new_tokens", "5", "an integer of at least 1"),
    ("min_new_tokens", -1, "an integer of at least 0"),
    ("temperature", -0.1, "a finite number of at least 0 (0 is greedy)"),
    ("temperature", NAN, "a finite number of at least 0"),
    ("temperature", INF, "a finite number of at least 0"),
    ("temperature", "0.5", "a finite number of at least 0"),
    ("temperature", True, "a finite number of at least 0"),
    ("temperature", 10**400, "a finite number of at least 0"),
    ("temperature", 1e39, "a finite number of at least 0"),
    ("top_k", -2, "-1 and 0 keep all"),
    ("top_k", 1.0, "an integer of at least -1"),
    ("top_k", False, "an integer of at least -1"),
    ("top_p", 0, "a finite number in (0, 1]"),
    ("top_p", 1.0001, "a finite number in (0, 1]"),
    ("top_p", NAN, "a finite number in (0, 1]"),
    ("min_p", -0.01, "a finite number in [0, 1]"),
    ("min_p", 1.01, "a finite number in [0, 1]"),
    ("min_p", NAN, "a finite number in [0, 1]"),
    ("frequency_penalty", 2.1, "a finite number in [-2, 2]"),
    ("frequency_penalty", NAN, "a finite number in [-2, 2]"),
    ("presence_penalty", -2.1, "a finite number in [-2, 2]"),
    ("presence_penalty", -INF, "a finite number in [-2, 2]"),
    ("repetition_penalty", 0, "a finite number above 0"),
    ("repetition_penalty", INF, "a finite number above 0"),
    ("n", 0, "an integer of at least 1"),
    ("n", True, "an integer of at least 1"),
    ("n", [2], "an integer of at least 1"),
    ("seed", -1, "an integer in [0, 18446744073709551615]"),
    ("seed", 2**64, "an integer in [0, 18446744073709551615]"),
    ("seed", 1.0, "an integer in [0, 18446744073709551615]"),
    ("stop", "", "at least one character"),
    ("stop", ["a", ""], "at least one character, not ''"),
    ("stop", ["a", 5], "at least one character, not 5"),
    ("stop", 5, "a string or a list of strings"),
    ("stop", b"x", "a string or a list of strings"),
    ("stop", {"a": 1}, "a string or a list of strings"),
    ("stop_token_ids", 5, "a list of token ids"),
    ("stop_token_ids", "5", "a list of token ids"),
    ("ignore_eos", 1, "True or False"),
    ("skip_special_tokens", "yes", "True or False"),
    ("include_stop_str_in_output", 0, "True or False"),
    ("logit_bias", [(1, 2.0)], "a dict from token id to a number"),
    ("bad_words", [""], "at least one character"),
    ("bad_words", 3, "a string or a list of strings"),
    ("allowed_token_ids", [], "at least one token id, or None to allow all"),
    ("allowed_token_ids", 7, "a list of token ids"),
    ("logprobs", -1, "an integer of at least 0"),
    ("logprobs", True, "an integer of at least 0"),
    ("prompt_logprobs", -1, "an integer of at least 0"),
    ("prompt_logprobs_start", -1, "an integer of at least 0"),
    ("logits_processors", "f", "callables f(token_ids, logits) -> logits"),
    ("logits_processors", [print, 3], "callables f(token_ids, logits) -> logits"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_refused_value_is_named_with_its_argument_and_what_is_allowed(name, value, allowed):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}=")
    assert repr(value)[:50] in message
    assert allowed in message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stop_token_ids", [1, -2], ("stop_token_ids[1]=-2", "[0, 2147483647]")),
        ("stop_token_ids", [True], ("stop_token_ids[0]=True", "[0, 2147483647]")),
        ("stop_token_ids", [1.0], ("stop_token_ids[0]=1.0", "[0, 2147483647]")),
        ("stop_token_ids", [2**31], ("stop_token_ids[0]=2147483648", "[0, 2147483647]")),
        ("allowed_token_ids", ["a"], ("allowed_token_ids[0]='a'", "[0, 2147483647]")),
        ("logit_bias", {-1: 1.0}, ("key of logit_bias=-1", "[0, 2147483647]")),
        ("logit_bias", {"x": 1.0}, ("key of logit_bias='x'", "[0, 2147483647]")),
        ("logit_bias", {5: NAN}, ("logit_bias[5]=nan", "a finite number", "-1e9")),
        ("logit_bias", {5: -INF}, ("logit_bias[5]=-inf", "a finite number", "-1e9")),
        ("logit_bias", {5: True}, ("logit_bias[5]=True", "a finite number")),
        ("logit_bias", {5: 1, "5": 2}, ("key of logit_bias='5'", "once")),
        ("bad_words", ["a\ud800"], ("bad_words='a\\ud800'", "surrogate")),
        ("stop", "\udfff", ("stop='\\udfff'", "surrogate")),
    ],
)
def test_a_refused_entry_is_named_with_its_place(name, value, words):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    for word in words:
        assert word in str(caught.value)


def test_long_values_are_cut_in_messages():
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(temperature="x" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("arguments", "name", "field", "expected"),
    [
        ({"top_k": 0}, "top_k", None, -1),
        ({"top_k": np.int32(7)}, "top_k", int, 7),
        ({"temperature": 0}, "temperature", float, 0.0),
        ({"temperature": np.float32(0.5)}, "temperature", float, 0.5),
        ({"top_p": 1}, "top_p", float, 1.0),
        ({"min_p": 1}, "min_p", float, 1.0),
        ({"frequency_penalty": -2}, "frequency_penalty", float, -2.0),
        ({"seed": 2**64 - 1}, "seed", int, 2**64 - 1),
        ({"stop": "end"}, "stop", tuple, ("end",)),
        ({"stop": ["b", "a"]}, "stop", tuple, ("b", "a")),
        ({"stop": []}, "stop", tuple, ()),
        ({"stop_token_ids": {3, 1}}, "stop_token_ids", tuple, (1, 3)),
        ({"stop_token_ids": np.array([4, 2])}, "stop_token_ids", tuple, (4, 2)),
        ({"allowed_token_ids": range(3)}, "allowed_token_ids", tuple, (0, 1, 2)),
        ({"logit_bias": {"12": -100}}, "logit_bias", None, {12: -100.0}),
        ({"logit_bias": {np.int64(3): 1}}, "logit_bias", None, {3: 1.0}),
        ({"logits_processors": print}, "logits_processors", tuple, (print,)),
        ({"logprobs": 0}, "logprobs", int, 0),
        ({"bad_words": "x"}, "bad_words", tuple, ("x",)),
    ],
)
def test_accepted_values_become_plain_python_types(arguments, name, field, expected):
    value = getattr(SamplingParams(**arguments), name)
    assert value == expected
    assert field is None or type(value) is field


def test_an_empty_one_leaves_unset_what_a_checkpoint_may_fill():
    params = SamplingParams()
    unset = {name for name in PARAMETER_NAMES if getattr(params, name) is None}
    assert unset == {
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "allowed_token_ids",
        "logprobs",
        "prompt_logprobs",
    }
    assert params == SamplingParams(**dict.fromkeys(PARAMETER_NAMES))
    assert (params.n, params.min_new_tokens, params.skip_special_tokens) == (1, 0, True)


def test_the_signature_names_every_parameter_and_alias():
    named = set(inspect.signature(SamplingParams).parameters) - {"others"}
    assert named == set(PARAMETER_NAMES) | set(ALIASES)
    assert set(PARAMETER_NAMES) == {f.name for f in dataclasses.fields(SamplingParams)}


def test_the_documentation_describes_every_parameter_and_alias():
    for name in (*PARAMETER_NAMES, *ALIASES):
        assert f"    {name}: " in SamplingParams.__doc__


@pytest.mark.parametrize(
    ("alias", "value"), [("max_tokens", 5), ("min_tokens", 2), ("no_stop_trim", True)]
)
def test_aliases_mean_the_same_in_the_constructor_in_dicts_and_in_keywords(alias, value):
    expected = SamplingParams(**{ALIASES[alias]: value})
    assert SamplingParams(**{alias: value}) == expected
    assert SamplingParams.make({alias: value}) == expected
    assert SamplingParams.make(**{alias: value}) == expected
    assert SamplingParams(**{alias: value, ALIASES[alias]: value}) == expected
    assert SamplingParams(**{alias: None, ALIASES[alias]: value}) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 5, "max_new_tokens": 6},
        {"min_tokens": 1, "min_new_tokens": 0},
        {"no_stop_trim": True, "include_stop_str_in_output": False},
    ],
)
@pytest.mark.parametrize("make", [lambda kw: SamplingParams(**kw), SamplingParams.make])
def test_two_spellings_with_different_values_are_refused(make, arguments):
    with pytest.raises(InvalidRequestError) as caught:
        make(arguments)
    for name, value in arguments.items():
        assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda name: SamplingParams(**{name: 1}),
        lambda name: SamplingParams.make({name: 1}),
        lambda name: SamplingParams.make(None, **{name: 1}),
        lambda name: SamplingParams.make({name: None}),
    ],
)
class TestUnknownNames:
    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("tempreature", "temperature"),
            ("topp", "top_p"),
            ("max_token", "max_new_tokens"),
            ("repetition_penality", "repetition_penalty"),
            ("progres", "progress"),
        ],
    )
    def test_a_misspelt_name_gets_the_nearest(self, make, name, nearest):
        with pytest.raises(InvalidRequestError) as caught:
            make(name)
        message = str(caught.value)
        assert f"Unknown sampling parameter {name!r}. Did you mean {nearest!r}?" in message
        assert "presence_penalty" in message

    def test_a_bar_is_shown_elsewhere(self, make):
        with pytest.raises(InvalidRequestError) as caught:
            make("progress")
        assert "Did you mean" not in str(caught.value)
        assert "generate(), chat() and resume()" in str(caught.value)
        assert "streams and async calls show no bar" in str(caught.value)

    @pytest.mark.parametrize("name", ["self", "others", "value", "count", "keywords"])
    def test_a_name_from_our_own_code_is_unknown_too(self, make, name):
        with pytest.raises(InvalidRequestError, match=f"Unknown sampling parameter '{name}'"):
            make(name)
        with pytest.raises(InvalidRequestError, match=f"Unknown sampling parameter '{name}'"):
            broadcast_sampling_params(None, 1, **{name: 1})

    def test_a_name_near_to_nothing_gets_the_list(self, make):
        with pytest.raises(InvalidRequestError) as caught:
            make("zzz")
        assert "Did you mean" not in str(caught.value)
        assert all(name in str(caught.value) for name in PARAMETER_NAMES)

    @pytest.mark.parametrize(
        ("name", "advice"),
        [
            ("lora_path", "merge the adapter"),
            ("lora_request", "merge the adapter"),
            ("best_of", "no beam search"),
            ("use_beam_search", "no beam search"),
            ("json_schema", "examples/json_output.py"),
            ("regex", "examples/json_output.py"),
            ("ebnf", "examples/json_output.py"),
            ("structured_outputs", "examples/json_output.py"),
            ("guided_decoding", "examples/json_output.py"),
            ("guided_json", "examples/json_output.py"),
            ("response_format", "examples/json_output.py"),
            ("sampling_seed", "use seed"),
            ("spaces_between_special_tokens", "leave it out"),
            ("do_sample", "temperature"),
            ("return_logprob", "use logprobs"),
            ("stream", "llm.stream"),
        ],
    )
    def test_a_foreign_name_gets_advice(self, make, name, advice):
        with pytest.raises(InvalidRequestError) as caught:
            make(name)
        assert repr(name) in str(caught.value)
        assert advice in str(caught.value)


def test_no_foreign_name_is_one_of_ours():
    for name in (*PARAMETER_NAMES, *ALIASES):
        assert foreign_names.advice_for_sampling(name) is None


def test_parameters_that_contradict_each_other_are_refused():
    with pytest.raises(InvalidRequestError, match=r"min_new_tokens=6 .* max_new_tokens=5"):
        SamplingParams(min_new_tokens=6, max_new_tokens=5)
    with pytest.raises(InvalidRequestError, match=r"prompt_logprobs_start=3 .* prompt_logprobs"):
        SamplingParams(prompt_logprobs_start=3)
    assert SamplingParams(min_new_tokens=5, max_new_tokens=5).min_new_tokens == 5
    assert SamplingParams(prompt_logprobs=0, prompt_logprobs_start=3).prompt_logprobs_start == 3


class TestMake:
    def test_takes_every_form(self):
        params = SamplingParams(top_k=5)
        assert SamplingParams.make(params) is params
        assert SamplingParams.make({"top_k": 5}) == params
        assert SamplingParams.make(top_k=5) == params
        assert SamplingParams.make(None) == SamplingParams()

    def test_keywords_win(self):
        base = SamplingParams(top_k=5, max_new_tokens=9, logit_bias={1: 2.0})
        expected = SamplingParams(top_k=7, max_new_tokens=3, logit_bias={1: 2.0})
        assert SamplingParams.make(base, top_k=7, max_tokens=3) == expected
        given_dict = {"top_k": 5, "max_tokens": 9, "logit_bias": {1: 2.0}}
        assert SamplingParams.make(given_dict, top_k=7, max_new_tokens=3) == expected
        assert SamplingParams.make(base, top_k=None) == base

    @pytest.mark.parametrize("value", [5, "temperature", [("n", 2)], SamplingParams])
    def test_refuses_anything_else(self, value):
        with pytest.raises(InvalidRequestError, match=r"sampling_params=.*SamplingParams, a dict"):
            SamplingParams.make(value)

    def test_refuses_names_that_are_no_strings(self):
        with pytest.raises(InvalidRequestError, match="5 is no sampling parameter"):
            SamplingParams.make({5: 1})


class TestBroadcast:
    def test_one_for_all(self):
        assert broadcast_sampling_params({"n": 2}, 3) == [SamplingParams(n=2)] * 3
        assert broadcast_sampling_params(None, 2, n=2) == [SamplingParams(n=2)] * 2
        assert broadcast_sampling_params(SamplingParams(), 0) == []

    def test_one_for_each(self):
        result = broadcast_sampling_params([{"n": 2}, SamplingParams(seed=1), None], 3, top_k=4)
        assert result == [
            SamplingParams(n=2, top_k=4),
            SamplingParams(seed=1, top_k=4),
            SamplingParams(top_k=4),
        ]
        assert broadcast_sampling_params([], 0) == []

    @pytest.mark.parametrize(("length", "count"), [(2, 3), (1, 3), (0, 1), (3, 2)])
    def test_another_length_is_refused(self, length, count):
        with pytest.raises(InvalidRequestError) as caught:
            broadcast_sampling_params([None] * length, count)
        assert f"list of {length}" in str(caught.value)
        assert f"{count} prompts" in str(caught.value)


class TestImmutability:
    params = SamplingParams(
        max_new_tokens=4, stop=["a"], logit_bias={1: 2.0}, logits_processors=[len], seed=3
    )

    def test_nothing_can_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.params.n = 2
        for change in (
            lambda bias: bias.__setitem__(1, 0.0),
            lambda bias: bias.update({1: 0.0}),
            lambda bias: bias.pop(1),
            lambda bias: bias.clear(),
        ):
            with pytest.raises(TypeError, match="cannot be changed"):
                change(self.params.logit_bias)

    def test_the_callers_own_lists_are_not_kept(self):
        stop, bias = ["a"], {1: 2.0}
        params = SamplingParams(stop=stop, logit_bias=bias)
        stop.append("b")
        bias[2] = 1.0
        assert params == SamplingParams(stop=["a"], logit_bias={1: 2.0})

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), dataclasses.replace],
    )
    def test_copies_are_equal_and_hash_alike(self, duplicate):
        assert duplicate(self.params) == self.params
        assert hash(duplicate(self.params)) == hash(self.params)

    def test_replace_and_asdict_work(self):
        assert dataclasses.replace(self.params, n=2).n == 2
        assert SamplingParams(**dataclasses.asdict(self.params)) == self.params
        assert SamplingParams(**self.params.to_dict()) == self.params
        with pytest.raises(InvalidRequestError):
            dataclasses.replace(self.params, n=0)

    def test_repr_shows_what_was_given_and_reads_back(self):
        params = SamplingParams(max_tokens=5, temperature=0, stop="x", logit_bias={"3": 1})
        assert repr(params) == (
            "SamplingParams(max_new_tokens=5, temperature=0.0, stop=('x',), logit_bias={3: 1.0})"
        )
        assert eval(repr(params)) == params
        assert repr(SamplingParams()) == "SamplingParams()"


class TestResolve:
    FILE = {  # noqa: RUF012
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "max_new_tokens": 300,
    }

    def test_the_librarys_defaults(self):
        params = SamplingParams().resolve()
        assert params.temperature == 1.0
        assert params.top_k == -1
        assert params.top_p == 1.0
        assert params.min_p == 0.0
        assert params.repetition_penalty == 1.0
        assert params.max_new_tokens is None

    @given(
        asked=st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(1e-4, 2),
                "top_k": st.integers(1, 100),
                "top_p": st.floats(0.01, 1),
                "min_p": st.floats(0, 1),
                "repetition_penalty": st.floats(0.5, 2),
                "n": st.integers(1, 4),
                "seed": st.integers(0, 2**64 - 1),
            },
        ),
        absent=st.sets(st.sampled_from(sorted(FILE))),
    )
    def test_the_file_fills_only_what_was_left_unset(self, asked, absent):
        file = {name: value for name, value in self.FILE.items() if name not in absent}
        resolved = SamplingParams(**asked).resolve(file, room=10_000)
        library = vars(GenerationDefaults())
        for name in self.FILE:
            assert getattr(resolved, name) == asked.get(name, file.get(name, library[name]))
        for name in ("n", "seed"):
            assert getattr(resolved, name) == getattr(SamplingParams(**asked), name)
        assert resolved.resolve(self.FILE, room=5) == resolved

    def test_the_original_stays_unset(self):
        params = SamplingParams(seed=1)
        params.resolve(self.FILE, room=10)
        assert params == SamplingParams(seed=1)

    @pytest.mark.parametrize(
        ("temperature", "resolved"), [(0.0, 0.0), (1e-9, 0.0), (9e-6, 0.0), (1e-5, 1e-5)]
    )
    def test_a_tiny_temperature_is_greedy(self, temperature, resolved):
        assert SamplingParams(temperature=temperature).resolve().temperature == resolved
        assert SamplingParams().resolve({"temperature": temperature}).temperature == resolved

    @pytest.mark.parametrize(
        ("asked", "file", "room", "expected"),
        [
            ({}, {}, None, None),
            ({}, {}, 1000, 128),
            ({}, {}, 100, 100),
            ({}, {}, 0, 1),
            ({}, {}, -5, 1),
            ({}, {"max_new_tokens": 300}, 1000, 300),
            ({}, {"max_new_tokens": 300}, 200, 200),
            ({"max_new_tokens": 500}, {}, 1000, 500),
            ({"max_new_tokens": 500}, {}, 100, 500),
            ({"max_new_tokens": 500}, {"max_new_tokens": 300}, None, 500),
            ({"min_new_tokens": 200}, {}, 1000, 200),
            ({"min_new_tokens": 200}, {}, None, None),
        ],
    )
    def test_the_number_of_new_tokens(self, asked, file, room, expected):
        assert SamplingParams(**asked).resolve(file, room=room).max_new_tokens == expected

    def test_more_tokens_at_least_than_fit_are_refused(self):
        with pytest.raises(InvalidRequestError, match=r"min_new_tokens=200 .* at most 100"):
            SamplingParams(min_new_tokens=200).resolve(room=100)

    def test_takes_defaults_that_were_read_before(self):
        defaults = GenerationDefaults.from_generation_config(self.FILE)
        assert SamplingParams(n=2).resolve(defaults) == SamplingParams(n=2).resolve(self.FILE)


class TestVocabulary:
    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"stop_token_ids": [3, 10]}, "stop_token_ids"),
            ({"allowed_token_ids": [10]}, "allowed_token_ids"),
            ({"logit_bias": {10: 1.0}}, "logit_bias"),
        ],
    )
    def test_an_id_outside_is_named(self, arguments, name):
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**arguments).check_vocabulary(10)
        for word in (name, "token id 10", "below 10"):
            assert word in str(caught.value)
        SamplingParams(**arguments).check_vocabulary(11)

    @pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
    def test_more_logprobs_than_tokens_are_refused(self, name):
        with pytest.raises(InvalidRequestError, match=f"{name}=11 .* at most 10"):
            SamplingParams(**{name: 11}).check_vocabulary(10)
        SamplingParams(**{name: 10}).check_vocabulary(10)
