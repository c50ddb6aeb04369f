"""Ends of sequences: end tokens, stop tokens, stop strings over token borders."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglite.engine.stopping import StopChecker
from sglite.interface.sampling_params import SamplingParams


class Spelling:
    """A detokenizer whose token ids are code points."""

    def __init__(self, left_over=""):
        self.left_over = left_over

    def add(self, token_id):
        return chr(token_id)

    def flush(self):
        return self.left_over


class Pieces:
    """A detokenizer whose token n is the n-th of the pieces given."""

    def __init__(self, pieces):
        self.pieces = pieces

    def add(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return ""


def feed(checker, token_ids):
    """Adds tokens until the checker stops; returns what each call gave."""
    reasons = []
    for token_id in token_ids:
        reasons.append(checker.add(token_id))
        if checker.stopped:
            break
    return reasons


def test_end_token_ends_and_is_not_in_the_text():
    checker = StopChecker(SamplingParams(), end_token_ids=[0], detokenizer=Spelling())
    assert feed(checker, [104, 105, 0, 104]) == [None, None, None]
    assert checker.stopped
    assert checker.text == "hi"


def test_stop_token_id_is_the_reason():
    checker = StopChecker(SamplingParams(stop_token_ids=[7]), end_token_ids=[0])
    assert feed(checker, [1, 7]) == [None, 7]
    assert checker.stopped
    assert checker.ending_token_ids == {0, 7}


def test_ignore_eos_keeps_the_stop_tokens():
    params = SamplingParams(ignore_eos=True, stop_token_ids=[7])
    checker = StopChecker(params, end_token_ids=[0])
    assert feed(checker, [0, 0, 7]) == [None, None, 7]


@pytest.mark.parametrize(("keep", "text"), [(False, "one "), (True, "one STOP")])
def test_stop_string_across_token_borders(keep, text):
    params = SamplingParams(stop=["STOP"], include_stop_str_in_output=keep)
    checker = StopChecker(params, detokenizer=Pieces(["one S", "T", "OP and", " more"]))
    assert feed(checker, range(4)) == [None, None, "STOP"]
    assert checker.text == text


def test_what_may_become_a_stop_string_is_held_back_until_it_is_clear():
    checker = StopChecker(SamplingParams(stop=["abc"]), detokenizer=Spelling())
    shown = []
    for character in "xabab":
        checker.add(ord(character))
        shown.append(checker.text)
    assert shown == ["x", "x", "x", "xab", "xab"]
    checker.finish()
    assert checker.text == "xabab"


def test_the_earliest_stop_string_wins():
    checker = StopChecker(SamplingParams(stop=["d", "bc"]), detokenizer=Pieces(["abcd"]))
    assert feed(checker, [0]) == ["bc"]
    assert checker.text == "a"


def test_min_new_tokens_delays_stop_strings():
    checker = StopChecker(SamplingParams(stop=["a"], min_new_tokens=2), detokenizer=Spelling())
    assert feed(checker, map(ord, "aaba")) == [None, None, None, "a"]
    assert checker.text == "aab"


def test_left_over_bytes_come_at_the_end():
    checker = StopChecker(SamplingParams(), detokenizer=Spelling("\ufffd"))
    feed(checker, map(ord, "hi"))
    checker.finish()
    assert checker.text == "hi\ufffd"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
    keep=st.booleans(),
)
def test_against_searching_the_whole_text(text, stops, cuts, keep):
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    params = SamplingParams(stop=stops, include_stop_str_in_output=keep)
    checker = StopChecker(params, detokenizer=Pieces(pieces))
    shown = ""
    for index in range(len(pieces)):
        checker.add(index)
        assert checker.text.startswith(shown), "text that was shown has been taken back"
        shown = checker.text
        if checker.stopped:
            break
    checker.finish()
    # The naive way: look at the text after every piece.
    expected = text
    for border in borders:
        hits = [(text[:border].find(stop), stop) for stop in stops]
        hits = [(position, stop) for position, stop in hits if position >= 0]
        if hits:
            position, stop = min(hits, key=lambda hit: hit[0])
            expected = text[: position + (len(stop) if keep else 0)]
            break
    assert checker.text == expected
