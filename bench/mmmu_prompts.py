"""The prompts of MMMU and MMMU-Pro (direct, without reasoning), as their evaluations word them."""

import io
import re
from typing import Any

from PIL import Image

from bench.mmmu_questions import Question

#: A prompt: texts, and the bytes of pictures where they stand.
Prompt = list[str | bytes]

_CHOICE = "Answer with the option's letter from the given choices directly."
_OPEN = "Answer the question using a single word or phrase."
_PRO_STANDARD = "Answer with the option letter from the given choices directly."
_PRO_VISION = (
    "Answer with the option letter from the given choices directly. The last line of your response "
    "should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of "
    "options."
)
_REFERENCE = re.compile(r"<image\s+(\d+)>")


def prompt_text(question: Question) -> str:
    """The wording; `<image N>` marks where the pictures of a question stand."""
    if question.setting == "pro-vision":
        return f"<image 1>{_PRO_VISION}"
    pairs = list(zip(question.letters, question.options, strict=True))
    if question.setting == "pro-standard":
        lines = [f"{letter}. {option}" for letter, option in pairs]
        return "\n".join([question.text, *lines, _PRO_STANDARD])
    if question.is_choice:
        lines = [f"({letter}) {option}" for letter, option in pairs]
        return "\n".join([question.text, *lines, "", _CHOICE])
    return f"{question.text}\n{_OPEN}"


def make_prompt(question: Question) -> Prompt:
    """The prompt with its pictures in place.

    A picture that the text refers to stands at each such place; one that it does not mention
    stands in front. A reference to a picture that the data lack stays as text.
    """
    pieces = _REFERENCE.split(prompt_text(question))
    prompt: Prompt = []
    mentioned = set()
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            if piece:
                prompt.append(piece)
        elif int(piece) in question.images:
            mentioned.add(int(piece))
            prompt.append(question.images[int(piece)])
        else:
            prompt.append(f"<image {piece}>")
    return [image for number, image in question.images.items() if number not in mentioned] + prompt


def as_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A conversation of one message, with the parts that chat templates know.

    Pictures are opened and not yet decoded: that is left to the engines.
    """
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": Image.open(io.BytesIO(part))}
        for part in prompt
    ]
    return [{"role": "user", "content": content}]
