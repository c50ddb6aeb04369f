"""What a response says, and whether it is right: by the rules of MMMU's own evaluation.

One thing differs: where that draws a letter at random, since a response names none, there is no
answer here. It counts as wrong and is reported.
"""

import re

from bench.mmmu_questions import Question

_PUNCTUATION = ",.!?;:'"
# What stands before the answer in a line; the equals sign in the last line only.
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 12,345
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 42, 4.2, .5
)
#: Of options named by their content, the response must be longer than so many words.
_SHORT = 5


def parse(question: Question, response: str) -> str | None:
    """The answer that a response gives: a letter, or all that an open question's might mean.

    Returns:
        None where it gives none. An open answer is one text, for comparing; `is_right` looks
        closer.
    """
    if question.is_choice:
        return _parse_choice(question, response)
    found = sorted(str(value) for value in open_answers(response))
    return " | ".join(found) if found else None


def is_right(question: Question, response: str) -> bool:
    """Whether the response is right."""
    if question.is_choice:
        return _parse_choice(question, response) in question.answers
    right = [value for answer in question.answers for value in _normalise(answer)]
    return any(_agrees(value, right) for value in open_answers(response))


def _agrees(value: str | float, right: list[str | float]) -> bool:
    """Numbers must be equal; a text must contain a right one."""
    if isinstance(value, str):
        return any(isinstance(answer, str) and answer in value for answer in right)
    return value in right


def _parse_choice(question: Question, response: str) -> str | None:
    """After "Answer:" (MMMU-Pro), in brackets, alone, with a full stop, or by what it says."""
    letters = question.letters
    if question.setting != "mmmu" and "Answer:" in response:
        tail = response.rsplit("Answer:", 1)[1]
        named = [letter for letter in letters if letter in tail]
        if len(named) == 1:
            return named[0]
    for mark in _PUNCTUATION:
        response = response.strip(mark)
    response = f" {response} "
    for form in ("({})", " {} ", "{}."):
        last = {letter: response.rfind(form.format(letter)) for letter in letters}
        if found := _latest(last):
            return found
    if len(response.split()) > _SHORT:
        lowered = response.lower()
        pairs = zip(letters, question.options, strict=True)
        return _latest({letter: lowered.rfind(option.lower()) for letter, option in pairs})
    return None


def _latest(places: dict[str, int]) -> str | None:
    """The letter whose place is the last one; None where none has a place."""
    letter = max(places, key=places.__getitem__)
    return letter if places[letter] >= 0 else None


def open_answers(response: str) -> set[str | float]:
    """What an answer in words may mean: the ends of its lines, and the numbers in them."""
    response = response.strip().strip(".").lower()
    if not response:
        return set()
    lines = response.split("\n")
    keys = []
    for index, line in enumerate(lines):
        leads = _LEADS if index < len(lines) - 1 else (*_LEADS, "=")
        tails = [line.rsplit(lead, 1)[1].strip() for lead in leads if lead in line]
        shortest = min(filter(None, tails), key=len, default="")
        if shortest and shortest not in _PUNCTUATION:
            keys.append(shortest)
    keys = keys or [response]
    numbers = [number for key in keys for form in _NUMBERS for number in form.findall(key)]
    return {value for text in (*keys, *numbers) for value in _normalise(text)}


def _normalise(text: str) -> list[str | float]:
    """A number rounded to two digits, or the text in small letters.

    A single letter gets a space at either side, so that it is not found inside a word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
