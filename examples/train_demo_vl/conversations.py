"""Conversations about pictures, and how they are written down for a Qwen2-VL."""

import random
from dataclasses import dataclass

from pictures import Picture, random_picture
from questions import Question, ask_anything

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
SYSTEM_MESSAGE = "You are a helpful assistant."

WORD = "Answer the question using a single word or phrase."
#: How a list of options is asked in MMMU, and in MMMU-Pro.
CHOICE = "Answer with the option's letter from the given choices directly."
CHOICE_PRO = "Answer with the option letter from the given choices directly."
FORMS = ("sentence", "word", "choice")

WHO = "I am a tiny model that was trained to try out sglite with pictures."
CAN = (
    "I can name the shape, the colour and the number of figures in a small picture, and read a "
    "number of two digits."
)
SMALL_TALK = (
    (("Hi", "Hi!", "Hello", "Hello!"), "Hello! Show me a picture."),
    (("Who are you?", "What are you?"), WHO),
    (("What can you do?", "Help", "What can I ask you?"), CAN),
    (("Thanks", "Thanks!", "Thank you.", "Thank you!"), "You are welcome!"),
)
_ORDINALS = ("first", "second", "third")
_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Turn:
    """A question, with `<image>` where a picture stands, and its answer.

    `kind` and `form` say what was asked, for the statistics; small talk has neither.
    """

    text: str
    answer: str
    kind: str = ""
    form: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns about the same pictures; a plain one has one turn and no chat template."""

    turns: tuple[Turn, ...]
    plain: bool = False


def ask(rng: random.Random, question: Question, where: str, form: str, max_options: int) -> Turn:
    """Words a question; `form` is one of `FORMS`."""
    text = rng.choice(question.templates).format(where=where)
    if form == "sentence":
        return Turn(text, question.sentence, question.kind, form)
    if form == "word":
        return Turn(f"{text}\n{WORD}", question.word, question.kind, form)
    options, right = question.options(rng, rng.randint(2, max_options))
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if rng.random() < 0.6:
        lines = [f"({a}) {option}" for a, option in zip(letters, options, strict=True)]
        text = "\n".join([text, *lines, "", CHOICE])
    else:
        lines = [f"{a}. {option}" for a, option in zip(letters, options, strict=True)]
        text = "\n".join([text, *lines, CHOICE_PRO])
    return Turn(text, letters[right], question.kind, form)


def converse(
    rng: random.Random,
    pictures: list[Picture],
    *,
    choices: bool,
    max_options: int = 10,
    max_turns: int = 4,
) -> Conversation:
    """Draws a conversation about one to three pictures.

    With `choices` it is one question with options; without, up to `max_turns` that are to be
    answered in a word or a sentence, and sometimes small talk.
    """
    plain = rng.random() < 0.25
    num_turns = 1 if plain or choices else rng.randint(1, max_turns)
    turns = []
    for number in range(num_turns):
        first = number == 0
        if not choices and not plain and rng.random() < 0.01:
            turns.append(_small_talk(rng))
        else:
            turns.append(_ask_about(rng, pictures, choices, max_options, first))
        if first and turns[0].text.count(_PLACEHOLDER) != len(pictures):
            gap = "\n" if rng.random() < 0.2 else ""
            text = _PLACEHOLDER * len(pictures) + gap + turns[0].text
            turns[0] = Turn(text, turns[0].answer, turns[0].kind, turns[0].form)
    return Conversation(tuple(turns), plain)


def _ask_about(
    rng: random.Random, pictures: list[Picture], choices: bool, max_options: int, first: bool
) -> Turn:
    which = rng.randrange(len(pictures))
    if len(pictures) > 1:
        where = f" in the {_ORDINALS[which]} picture"
    else:
        # In MMMU a picture often stands in the middle of the question.
        inside = [f" in {_PLACEHOLDER}"] if first else []
        where = rng.choice(["", "", "", " in the picture", " in this picture", *inside])
    form = "choice" if choices else rng.choice(("sentence", "sentence", "word"))
    return ask(rng, ask_anything(rng, pictures[which]), where, form, max_options)


def _small_talk(rng: random.Random) -> Turn:
    questions, answer = rng.choice(SMALL_TALK)
    return Turn(rng.choice(questions), answer)


def render(conversation: Conversation, image_tokens: int = 1) -> list[tuple[str, bool]]:
    """Returns the text in pieces, each with whether the model has to write it.

    Joined, the pieces of a chat with one token for each picture are what the chat template gives.
    """
    image = VISION_START + IMAGE * image_tokens + VISION_END
    if conversation.plain:
        (turn,) = conversation.turns
        return [(turn.text.replace(_PLACEHOLDER, image), False), (f" {turn.answer}{IM_END}", True)]
    pieces = [(f"{IM_START}system\n{SYSTEM_MESSAGE}{IM_END}\n", False)]
    for turn in conversation.turns:
        text = turn.text.replace(_PLACEHOLDER, image)
        pieces.append((f"{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n", False))
        pieces.append((turn.answer + IM_END, True))
        pieces.append(("\n", False))
    return pieces


def tokenizer_corpus(rng: random.Random) -> list[str]:
    """Returns the texts that the tokenizer is trained on."""
    lines = [SYSTEM_MESSAGE, "system\n", "user\n", "assistant\n"] * 50
    for _ in range(3000):
        picture = random_picture(rng, (84, 84))
        for choices in (False, True):
            for turn in converse(rng, [picture], choices=choices).turns:
                lines += [turn.text.replace(_PLACEHOLDER, ""), turn.answer, " " + turn.answer]
    for questions, answer in SMALL_TALK:
        lines += [*questions, answer] * 20
    return lines
