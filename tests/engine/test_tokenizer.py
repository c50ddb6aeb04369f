"""Text in pieces: whatever the tokens, the pieces add up to the whole."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglite.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.checkpoints import DEMO_FOLDER


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(AutoTokenizer.from_pretrained(DEMO_FOLDER))


@pytest.fixture(scope="module")
def sentence_piece_like():
    """A tokenizer whose first word loses its leading space, as Llama 2's does."""
    pieces = ["<unk>", "▁Hello", "▁world", "▁", "wor", "ld", "▁big", "!"]
    fast = FastTokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>"))


def pieces_of(tokenizer, prompt, output, skip_special=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special)
    return [detokenizer.add(token) for token in output] + [detokenizer.flush()]


def whole(tokenizer, prompt, output, skip_special=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special)
    return detokenizer.add_all(output) + detokenizer.flush()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), split=st.integers(0, 40))
@example(text="0𐀀𐀀𘋀", split=12)  # the context begins and ends inside characters of single bytes
@example(text="a <|end|> é<|end|>", split=2)  # special tokens
def test_pieces_of_any_text_add_up(byte_level, text, split):
    token_ids = byte_level.encode(text, add_special_tokens=False)
    prompt, output = token_ids[:split], token_ids[split:]
    before = byte_level.decode(prompt, skip_special_tokens=False).rstrip("\ufffd").encode()
    expected = text.encode()[len(before) :].decode(errors="replace")
    has_special = byte_level.decode(token_ids) != text
    for skip_special in [False] if has_special else [False, True]:
        assert "".join(pieces_of(byte_level, prompt, output, skip_special)) == expected
        assert whole(byte_level, prompt, output, skip_special) == expected


@settings(max_examples=200, deadline=None)
@given(output=st.lists(st.integers(0, 1100), max_size=30), skip_special=st.booleans())
def test_any_ids_give_the_same_text_in_pieces_and_at_once(byte_level, output, skip_special):
    prompt = byte_level.encode("What is 17 + 25?")
    pieces = pieces_of(byte_level, prompt, output, skip_special)
    assert "".join(pieces) == whole(byte_level, prompt, output, skip_special)


def test_an_unfinished_character_waits(byte_level):
    output = byte_level.encode("é€😀", add_special_tokens=False)
    assert len(output) > 3, "the test needs characters of several tokens"
    pieces = pieces_of(byte_level, [], output)
    assert "".join(pieces) == "é€😀"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


def test_bytes_that_never_become_a_character_come_out_at_the_end(byte_level):
    output = byte_level.encode("😀", add_special_tokens=False)[:-1]
    pieces = pieces_of(byte_level, [], output)
    assert pieces[:-1] == [""] * len(output)
    assert set(pieces[-1]) == {"\ufffd"}


def test_a_character_that_the_prompt_began_is_finished(byte_level):
    token_ids = byte_level.encode("x😀y", add_special_tokens=False)
    assert "".join(pieces_of(byte_level, token_ids[:2], token_ids[2:])) == "😀y"


def test_ids_without_a_token_are_empty(byte_level):
    assert byte_level.decode([1_000_000]) == ""
    assert byte_level.decode_one(1_000_000) == ""


def test_the_space_between_prompt_and_output_is_kept(sentence_piece_like):
    prompt = sentence_piece_like.encode("Hello")
    output = sentence_piece_like.encode("world", add_special_tokens=False)
    assert "".join(pieces_of(sentence_piece_like, prompt, output)) == " world"
    assert whole(sentence_piece_like, prompt, output) == " world"
