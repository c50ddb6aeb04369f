"""Measure a checkpoint on pictures that were never trained on, through Hugging Face transformers.

    python examples/train_demo_vl/evaluate.py sglite/checkpoints/demo-vl

Pictures go through the checkpoint's own preprocessing, and answers are generated greedily. An
answer counts only if it is right to the letter and followed by the end token. `sentence`, `word`
and `choice` are the forms in which a question is asked: alone, with MMMU's request for a single
word, and with two to ten options.
"""

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from conversations import FORMS, IMAGE, converse, render
from pictures import SIZES, draw, random_picture
from PIL import Image
from questions import KINDS
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

BATCH_SIZE = 32
_MAX_NEW_TOKENS = 24
_ONE, _SEVERAL = "all, one picture", "several pictures"


@dataclass(frozen=True)
class Prompt:
    """A question as the tokenizer gets it, with one placeholder token for each picture."""

    kind: str
    form: str
    text: str
    images: list[Image.Image]
    expected: str  # ends with the end token


def held_out_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Draws pictures with seeds of their own, and questions about them; one in eight about two."""
    rng = random.Random(f"held out/{seed}")
    prompts = []
    while len(prompts) < count:
        several = rng.random() < 0.125
        size = SIZES[0] if several else rng.choice(SIZES)
        pictures = [random_picture(rng, size) for _ in range(2 if several else 1)]
        choices = rng.random() < 1 / len(FORMS)
        conversation = converse(rng, pictures, choices=choices, max_turns=1)
        (turn,) = conversation.turns
        pieces = render(conversation)
        text = "".join(piece for piece, _ in takewhile(lambda pair: not pair[1], pieces))
        expected = next(piece for piece, is_answer in pieces if is_answer)
        if turn.kind:  # small talk has none
            images = [draw(picture) for picture in pictures]
            prompts.append(Prompt(turn.kind, turn.form, text, images, expected))
    return prompts


def model_inputs(
    tokenizer: PreTrainedTokenizerBase, image_processor: Any, prompts: list[Prompt]
) -> dict[str, torch.Tensor]:
    """What the model takes, padded on the left; each placeholder becomes as many as it needs."""
    images = [image for prompt in prompts for image in prompt.images]
    inputs = dict(image_processor(images=images, return_tensors="pt"))
    merged = image_processor.merge_size**2
    counts = iter((inputs["image_grid_thw"].prod(-1) // merged).tolist())
    texts = []
    for prompt in prompts:
        pieces = prompt.text.split(IMAGE)
        texts.append(pieces[0] + "".join(IMAGE * next(counts) + piece for piece in pieces[1:]))
    inputs |= tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    is_image = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)
    inputs["mm_token_type_ids"] = is_image.int()
    return inputs


@torch.inference_mode()
def wrong_answers(
    model: Qwen2VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    prompts: list[Prompt],
) -> list[tuple[Prompt, str]]:
    """Generates greedily and returns every prompt that was answered wrongly, with what came."""
    wrong = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        inputs = model_inputs(tokenizer, image_processor, batch)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        for prompt, text in zip(batch, texts, strict=True):
            answer = text.split(tokenizer.pad_token)[0]
            if answer != prompt.expected:
                wrong.append((prompt, answer))
    return wrong


def accuracy_table(prompts: list[Prompt], wrong: list[tuple[Prompt, str]]) -> str:
    """Returns a Markdown table of right answers, by kind and form; several pictures apart."""
    asked: Counter[tuple[str, str]] = Counter()
    missed: Counter[tuple[str, str]] = Counter()
    for counts, counted in ((asked, prompts), (missed, [prompt for prompt, _ in wrong])):
        for prompt in counted:
            rows = (prompt.kind, _ONE) if len(prompt.images) == 1 else (_SEVERAL,)
            counts.update((row, prompt.form) for row in rows)
    lines = [f"| kind | {' | '.join(FORMS)} |", "|---|" + "---|" * len(FORMS)]
    for kind in [*KINDS, _ONE, _SEVERAL]:
        cells = []
        for form in FORMS:
            total = asked[kind, form]
            right = total - missed[kind, form]
            cells.append(f"{100 * right / total:.1f} % of {total}" if total else "")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-least", type=float, default=0.95, help="fail below this accuracy")
    arguments = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.checkpoint)
    image_processor = AutoImageProcessor.from_pretrained(arguments.checkpoint)
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        arguments.checkpoint, dtype=torch.bfloat16
    )
    prompts = held_out_prompts(arguments.questions, arguments.seed)
    started = time.monotonic()
    wrong = wrong_answers(model, tokenizer, image_processor, prompts)
    print(accuracy_table(prompts, wrong))
    for prompt, answer in wrong[:20]:
        print(f"wrong: {prompt.text!r} -> {answer!r}, expected {prompt.expected!r}")
    single = [prompt for prompt in prompts if len(prompt.images) == 1]
    accuracy = 1 - sum(len(prompt.images) == 1 for prompt, _ in wrong) / len(single)
    print(
        f"{len(single)} questions about one picture, {accuracy:.2%} right; {len(prompts)} in all, "
        f"{1 - len(wrong) / len(prompts):.2%} right; {time.monotonic() - started:.0f} s"
    )
    sys.exit(accuracy < arguments.at_least)


if __name__ == "__main__":
    main()
