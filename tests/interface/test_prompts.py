"""Prompts: every form is read as what it means, and everything else is refused by name."""

import array
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglite.interface.errors import InvalidRequestError
from sglite.interface.prompts import Prompt, normalize_prompts

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

#: Ways to write the same token ids.
ID_FORMS = (
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda x: np.array(x, dtype=np.uint32),
    lambda x: [np.int64(i) for i in x],
    lambda x: [torch.tensor(i) for i in x],
    lambda x: array.array("q", x),
    lambda x: {"token_ids": x},
    lambda x: {"prompt_token_ids": tuple(x), "text": None},
    lambda x: {"input_ids": np.array(x), "images": []},
    lambda x: UserDict(input_ids=x),
    lambda x: Prompt(token_ids=tuple(x)),
    lambda x: Prompt(token_ids=list(x)),
)
TEXT_FORMS = (
    str,
    lambda x: {"text": x},
    lambda x: {"prompt": x, "images": None},
    lambda x: Prompt(text=x),
)


@st.composite
def prompts(draw):
    """Draw a prompt in some form, and what it must become."""
    if draw(st.booleans()):
        token_ids = draw(ids)
        return draw(st.sampled_from(ID_FORMS))(token_ids), Prompt(token_ids=tuple(token_ids))
    text = draw(texts)
    return draw(st.sampled_from(TEXT_FORMS))(text), Prompt(text=text)


@given(prompts())
def test_a_single_prompt_in_any_form(case):
    form, expected = case
    result, is_single = normalize_prompts(form)
    assert result == [expected]
    assert is_single
    if expected.token_ids is not None:
        assert type(result[0].token_ids) is tuple
        assert all(type(i) is int for i in result[0].token_ids)


@given(st.lists(prompts(), max_size=5), st.sampled_from([list, tuple]))
def test_a_list_of_prompts_in_any_mixture(cases, container):
    result, is_single = normalize_prompts(container(form for form, _ in cases))
    assert result == [expected for _, expected in cases]
    assert not is_single


def test_what_is_decided():
    assert normalize_prompts([5, 6, 7]) == ([Prompt(token_ids=(5, 6, 7))], True)
    assert normalize_prompts([]) == ([], False)
    assert normalize_prompts([[5]]) == ([Prompt(token_ids=(5,))], False)
    assert normalize_prompts(torch.tensor([5])) == ([Prompt(token_ids=(5,))], True)
    assert normalize_prompts([torch.tensor([5])]) == ([Prompt(token_ids=(5,))], False)
    assert normalize_prompts([np.array([5])]) == ([Prompt(token_ids=(5,))], False)
    assert normalize_prompts(["a"]) == ([Prompt(text="a")], False)
    assert normalize_prompts(np.array(["a", "b"])) == ([Prompt(text="a"), Prompt(text="b")], False)
    assert normalize_prompts("") == ([Prompt(text="")], True)


@pytest.mark.parametrize(
    ("images", "expected"),
    [("a.png", ("a.png",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), (None, ()), ([], ())],
)
def test_images_are_one_or_a_list(images, expected):
    for prompt in ({"text": "x", "images": images}, {"token_ids": [1], "images": images}):
        ((result,), is_single) = normalize_prompts(prompt)
        assert result.images == expected
        assert is_single
    picture = np.zeros((4, 4, 3))
    ((result,), _) = normalize_prompts({"text": "x", "images": picture})
    assert result.images[0] is picture


def test_the_callers_own_list_is_not_kept():
    token_ids = [1, 2]
    ((prompt,), _) = normalize_prompts(token_ids)
    token_ids.append(3)
    assert prompt.token_ids == (1, 2)


FORMS = "must be a string, a list of token ids, or a dict with 'text' or 'token_ids'"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, ("prompts=None", FORMS, "a list of such prompts")),
        (5, ("prompts=5", FORMS)),
        (b"abc", ("prompts=b'abc'", FORMS)),
        ({5, 6}, ("prompts={5, 6}", FORMS)),
        (iter(["a"]), ("prompts=<list_iterator", FORMS)),
        (["a", None], ("prompts[1]=None", FORMS)),
        (["a", b"b"], ("prompts[1]=b'b'", FORMS)),
        ([[]], ("prompts[0]", "no token at all")),
        (["a", ()], ("prompts[1]", "no token at all")),
        ({"token_ids": []}, ("prompt['token_ids']", "no token at all")),
        ([5, -1], ("prompt[1]=-1", "[0, 2147483647]")),
        ([5, 2**31], ("prompt[1]=2147483648", "[0, 2147483647]")),
        ([5, True], ("prompt[1]=True", "token id")),
        ([True, False], ("prompt[0]=True", "token id")),
        ([5.0, 6], ("prompt[0]=5.0", "token id")),
        ([5, None], ("prompt[1]=None", "token id")),
        ([None, 5], ("prompt[0]=None", "token id")),
        (np.array([1.0]), ("prompt[0]=1.0", "token id")),
        (torch.tensor([True]), ("prompt[0]=True", "token id")),
        ([[1], [2, 3.5]], ("prompts[1][1]=3.5", "token id")),
        ([[1], ["a"]], ("prompts[1] mixes token ids with 'a'", "[[5, 6], 'text']")),
        ([5, "a"], ("prompt mixes token ids with 'a'", "[[5, 6], 'text']")),
        (["a", 5], ("prompt mixes token ids with 'a'", "[[5, 6], 'text']")),
        ([5, [6]], ("prompt mixes token ids with [6]", "[[5, 6], 'text']")),
        ([[[5]]], ("prompts[0] mixes token ids with [5]",)),
        (np.array([[1, 2]]), ("prompts is an array of 2 dimensions", "without padding")),
        (torch.tensor(5), ("prompts is an array of 0 dimensions",)),
        ([torch.tensor([[5]])], ("prompts[0] is an array of 2 dimensions",)),
        ({"token_ids": "abc"}, ("prompt['token_ids']='abc'", "a list of token ids")),
        ({"text": 5}, ("prompt['text']=5", "a string")),
        ({"text": ["a"]}, ("prompt['text']=['a']", "a string")),
        ({}, ("prompt has neither text nor token ids", "exactly one of", "text", "token_ids")),
        ({"images": ["x"]}, ("neither text nor token ids",)),
        ({"text": None}, ("neither text nor token ids",)),
        ({"text": "a", "token_ids": [1]}, ("prompt has 'text' and 'token_ids'", "exactly one")),
        ({"text": "a", "prompt": "a"}, ("'text' and 'prompt'", "exactly one")),
        ([{"txt": "a"}], ("prompts[0]", "unknown key 'txt'", "Did you mean 'text'?", "images")),
        ({5: "a"}, ("unknown key 5", "Known: text")),
        ([{"role": "user", "content": "Hi"}], ("prompts[0]", "'role'", "llm.chat")),
        ({"text": "a", "multi_modal_data": {}}, ("'multi_modal_data'", "use images")),
        ({"input_ids": [1], "attention_mask": [1]}, ("'attention_mask'", "without padding")),
        (Prompt(), ("neither text nor token ids",)),
        (Prompt(text="a", token_ids=(1,)), ("'text' and 'token_ids'",)),
        (Prompt(token_ids=(-1,)), ("prompt['token_ids'][0]=-1",)),
        (["ok", "a\ud800b"], ("prompts[1]=", "character 1", "surrogate")),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompts, words):
    with pytest.raises(InvalidRequestError) as caught:
        normalize_prompts(prompts)
    for word in words:
        assert word in str(caught.value)
