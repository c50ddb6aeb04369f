"""Questions about a picture, each with a sentence and a word for an answer, and wrong words.

A question has a place for where to look, `{where}`: empty, " in the picture", or, with several
pictures, " in the second picture".
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pictures import COLOURS, MAX_COUNT, NUMBERS, SHAPES, Picture

KINDS = ("shape", "colour", "count", "number")

# Offered as wrong answers only, so that ten options are to be had.
_OTHER_SHAPES = ("ring", "heart", "oval", "hexagon", "arrow", "line")
_OTHER_COLOURS = ("white", "grey", "brown", "pink")


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        kind: of `KINDS`.
        templates: wordings, each with `{where}` in it.
        word: the answer in a word.
        sentence: the answer in a sentence.
    """

    kind: str
    templates: tuple[str, ...]
    word: str
    sentence: str

    def options(self, rng: random.Random, count: int) -> tuple[list[str], int]:
        """Draws `count` different options, the right one among them; also its index."""
        wrong = [word for word in _WORDS[self.kind] if word != self.word]
        if self.kind == "number" and rng.random() < 0.7:  # those that share a digit are harder
            alike = [w for w in wrong if sum(a == b for a, b in zip(w, self.word, strict=True))]
            if len(alike) >= count - 1:
                wrong = alike
        options = [*rng.sample(wrong, count - 1), self.word]
        rng.shuffle(options)
        return options, options.index(self.word)


_WORDS = {
    "shape": (*SHAPES, *_OTHER_SHAPES),
    "colour": (*COLOURS, *_OTHER_COLOURS),
    "count": tuple(str(count) for count in range(10)),
    "number": tuple(str(number) for number in NUMBERS),
}


def questions_about(picture: Picture) -> dict[str, list[Question]]:
    """Returns all questions that have one answer, by kind."""
    found: dict[str, list[Question]] = {}
    asked = _about_number(picture) if picture.number is not None else _about_figures(picture)
    for question in asked:
        found.setdefault(question.kind, []).append(question)
    return found


def ask_anything(rng: random.Random, picture: Picture) -> Question:
    """Draws a question, each kind with the same probability."""
    by_kind = questions_about(picture)
    return rng.choice(by_kind[rng.choice(list(by_kind))])


def _about_number(picture: Picture) -> Iterator[Question]:
    number = str(picture.number)
    yield Question(
        "number",
        (
            "What number is this{where}?",
            "What number is shown{where}?",
            "Which number do you see{where}?",
            "What is the number{where}?",
            "Read the number{where}.",
            "What is this{where}?",
        ),
        number,
        f"The number is {number}.",
    )
    yield Question(
        "colour",
        (
            "What colour is the number{where}?",
            "What color is the number{where}?",
            "Which colour does the number have{where}?",
        ),
        picture.colour,
        f"The number is {picture.colour}.",
    )


def _about_figures(picture: Picture) -> Iterator[Question]:
    figures = picture.figures
    shapes = Counter(figure.shape for figure in figures)
    colours = Counter(figure.colour for figure in figures)
    yield _count("figure", len(figures))
    if len(set(figures)) == 1:
        yield from _about_all(len(figures), figures[0].shape, figures[0].colour)
        return
    # Of what is absent one each, or most answers would be "no".
    absent = random.Random(picture.seed)
    for shape in [*shapes, *_one_other(absent, SHAPES, shapes)]:
        yield _count(shape, shapes[shape])
    for colour in [*colours, *_one_other(absent, COLOURS, colours)]:
        yield _count(f"{colour} figure", colours[colour])
    for figure in figures:
        if shapes[figure.shape] == 1:
            yield _colour_of(figure.shape, figure.colour)
        if colours[figure.colour] == 1:
            yield _shape_of(figure.colour, figure.shape)


def _one_other(rng: random.Random, words: Iterable[str], seen: Counter[str]) -> list[str]:
    others = [word for word in words if word not in seen]
    return [rng.choice(others)] if others else []


def _about_all(count: int, shape: str, colour: str) -> Iterator[Question]:
    """About figures that are alike, or one that is alone."""
    if count == 1:
        article = "an" if colour[0] in "aeiou" else "a"
        yield Question(
            "shape",
            (
                "What shape is this{where}?",
                "What shape is the figure{where}?",
                "Which shape do you see{where}?",
                "Name the shape{where}.",
            ),
            shape,
            f"It is a {shape}.",
        )
        yield Question(
            "shape",
            ("What is this{where}?", "What do you see{where}?"),
            shape,
            f"It is {article} {colour} {shape}.",
        )
        yield Question(
            "colour",
            (
                "What colour is this{where}?",
                "What color is this{where}?",
                "What colour is the figure{where}?",
                "Which colour is it{where}?",
                "Name the colour{where}.",
            ),
            colour,
            f"It is {colour}.",
        )
        yield _colour_of(shape, colour)
        yield _shape_of(colour, shape)
        return
    yield Question(
        "shape",
        (
            "What shape are the figures{where}?",
            "Which shape do the figures have{where}?",
            "Which shape do you see{where}?",
        ),
        shape,
        f"They are {shape}{_plural(shape)}.",
    )
    yield Question(
        "colour",
        (
            "What colour are the figures{where}?",
            "What color are the figures{where}?",
            "Which colour do the figures have{where}?",
            f"What colour are the {shape}{_plural(shape)}{{where}}?",
        ),
        colour,
        f"They are {colour}.",
    )
    yield _count(shape, count)
    yield Question(
        "count",
        ("What do you see{where}?",),
        str(count),
        f"There are {count} {colour} {shape}{_plural(shape)}.",
    )


def _colour_of(shape: str, colour: str) -> Question:
    return Question(
        "colour",
        (
            f"What colour is the {shape}{{where}}?",
            f"What color is the {shape}{{where}}?",
            f"Which colour does the {shape} have{{where}}?",
        ),
        colour,
        f"The {shape} is {colour}.",
    )


def _shape_of(colour: str, shape: str) -> Question:
    return Question(
        "shape",
        (
            f"What shape is the {colour} figure{{where}}?",
            f"Which shape is {colour}{{where}}?",
            f"What is the shape of the {colour} figure{{where}}?",
        ),
        shape,
        f"The {colour} figure is a {shape}.",
    )


def _count(noun: str, count: int) -> Question:
    if not 0 <= count <= MAX_COUNT:
        raise ValueError(f"{count} figures were never drawn")
    many = noun + _plural(noun)
    sentence = f"There is 1 {noun}." if count == 1 else f"There are {count or 'no'} {many}."
    return Question(
        "count",
        (
            f"How many {many} are there{{where}}?",
            f"How many {many} do you see{{where}}?",
            f"How many {many} are shown{{where}}?",
            f"Count the {many}{{where}}.",
        ),
        str(count),
        sentence,
    )


def _plural(noun: str) -> str:
    return "es" if noun.endswith("s") else "s"
