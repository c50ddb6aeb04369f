"""Measure a checkpoint on the held-out questions through Hugging Face transformers.

    python examples/train_demo/evaluate.py sglite/checkpoints/demo

An answer counts only if it is right to the letter and followed by the end token. Every question is
asked in each form that it has: `plain`, as bare text; `chat`, alone in the chat template; and
`conversation`, after one to five other exchanges, in part with a system message.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from conversations import BRIEF_SYSTEM_MESSAGE, ConversationSampler
from questions import Exchange, Split
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

FORMS = ("plain", "chat", "conversation")
BATCH_SIZE = 128


@dataclass(frozen=True)
class Prompt:
    """A held-out question as the tokenizer gets it, special tokens spelt out."""

    group: str
    form: str
    text: str
    expected: str  # ends with the end token


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, exchange: Exchange, form: str, history: ConversationSampler
) -> Prompt | None:
    """Put a question into a form; None where it has no such form."""
    if form == "plain":
        if exchange.after:
            return None
        text, expected = tokenizer.bos_token + exchange.question, " " + exchange.answer
    elif exchange.completion or (form == "chat" and exchange.after):
        return None
    else:
        messages, expected = [], exchange.answer
        if form == "conversation":
            earlier = history.chat(history.rng.randint(1, 5))
            if earlier.system:
                messages.append({"role": "system", "content": earlier.system})
            brief = earlier.system == BRIEF_SYSTEM_MESSAGE
            exchanges = list(earlier.exchanges)
            if brief:
                expected = exchange.brief
            if exchange.after:
                before = exchange.after
                exchanges.append((before.question, before.brief if brief else before.answer))
            for question, answer in exchanges:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": exchange.question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Prompt(exchange.group, form, text, expected + tokenizer.eos_token)


def held_out_prompts(
    tokenizer: PreTrainedTokenizerBase, sample: int | None = None, seed: int = 0
) -> list[Prompt]:
    """Return the held-out questions in all their forms, or a random sample of them."""
    split, rng = Split(), random.Random(seed)
    history = ConversationSampler(split, rng)
    pairs = [(exchange, form) for exchange in split.held_out_exchanges() for form in FORMS]
    rng.shuffle(pairs)
    prompts = []
    for exchange, form in pairs:
        prompt = render_prompt(tokenizer, exchange, form, history)
        if prompt:
            prompts.append(prompt)
        if sample is not None and len(prompts) == sample:
            break
    return prompts


@torch.inference_mode()
def wrong_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> list[tuple[Prompt, str]]:
    """Generate greedily and return every prompt that was answered wrongly, with what came."""
    lengths = [len(ids) for ids in tokenizer([p.expected for p in prompts])["input_ids"]]
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompts[i].text)))
    wrong = []
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        batch = [prompts[i] for i in chosen]
        inputs = tokenizer(
            [prompt.text for prompt in batch],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=max(lengths[i] for i in chosen)
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        for prompt, text in zip(batch, texts, strict=True):
            answer = text.split(tokenizer.pad_token)[0]
            if answer != prompt.expected:
                wrong.append((prompt, answer))
    return wrong


def accuracy_table(prompts: list[Prompt], wrong: list[tuple[Prompt, str]]) -> str:
    """Return a Markdown table of right answers, by group and form."""
    asked, missed = defaultdict(int), defaultdict(int)
    for counts, counted in ((asked, prompts), (missed, [prompt for prompt, _ in wrong])):
        for prompt in counted:
            for group in (prompt.group, "all"):
                counts[group, prompt.form] += 1
    lines = [f"| group | {' | '.join(FORMS)} |", "|---|" + "---|" * len(FORMS)]
    for group in [*sorted({prompt.group for prompt in prompts}), "all"]:
        cells = []
        for form in FORMS:
            total, right = asked[group, form], asked[group, form] - missed[group, form]
            cells.append(f"{100 * right / total:.1f} % of {total}" if total else "")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sample", type=int, help="questions to ask; all of them by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the histories")
    parser.add_argument("--at-least", type=float, default=0.95, help="fail below this accuracy")
    arguments = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.checkpoint)
    model = LlamaForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16)
    prompts = held_out_prompts(tokenizer, arguments.sample, arguments.seed)
    started = time.monotonic()
    wrong = wrong_answers(model, tokenizer, prompts)
    print(accuracy_table(prompts, wrong))
    for prompt, answer in wrong[:20]:
        print(f"wrong: {prompt.text!r} -> {answer!r}, expected {prompt.expected!r}")
    accuracy = 1 - len(wrong) / len(prompts)
    print(f"{len(prompts)} questions, {accuracy:.2%} right, {time.monotonic() - started:.0f} s")
    sys.exit(accuracy < arguments.at_least)


if __name__ == "__main__":
    main()
