"""Train the small vision-language model that ships with sglite, on pictures drawn here.

    python examples/train_demo_vl/train.py --out DIR --seed 0

It writes a Hugging Face checkpoint (bfloat16 safetensors, config, generation config, tokenizer
with chat template, picture preprocessing) that `LLM(DIR)` and transformers load. It runs on a GPU
if there is one. `--steps 2 --pictures 100 --batch 8` is a quick smoke run.
"""

import argparse
import copy
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import Group, Sequences, batches, make_groups
from model import hidden_states, model_config, normalise
from tokenizer import preprocessor_config, train_tokenizer
from torch.nn import functional
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLForConditionalGeneration,
)

_WARM_UP = 200
_PIXEL_NOISE = 5.0  # of 255; pictures that are saved and loaded are never quite the same
_HELD_OUT_SEED = 1_000_000


class DeviceData:
    """A family of sequences and its group's pictures on the device that trains."""

    def __init__(self, group: Group, sequences: Sequences, device: torch.device):
        self._host = sequences
        self._device = device
        self._pictures = torch.from_numpy(group.pictures).to(device)
        self._ids = torch.from_numpy(sequences.ids).to(device)
        self._positions = torch.from_numpy(sequences.positions).to(device)

    def take(
        self, rows: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids [n, length], positions [3, n, length], pixels, and where answers are foretold.

        The last is [tokens of answers] int64, rows of the flattened [n * length] hidden states:
        those before an answer's token.
        """
        length = int(self._host.lengths[rows].max())
        on_device = self._move(rows)
        ids = self._ids[on_device, :length].long()
        positions = self._positions[on_device, :, :length].permute(1, 0, 2).long()
        pixels = normalise(self._pictures[self._move(self._host.pictures[rows].reshape(-1))])
        answers = self._move(np.flatnonzero(self._host.answers[rows, :length]) - 1)
        return ids, positions, pixels, answers

    def _move(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device, non_blocking=True)


def answer_logits(
    model: Qwen2VLForConditionalGeneration,
    ids: torch.Tensor,
    positions: torch.Tensor,
    pixels: torch.Tensor,
    answers: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens of answers, vocabulary] and the right ids; the head runs on no other rows."""
    hidden = hidden_states(model, ids, positions, pixels).flatten(0, 1)
    return model.lm_head(hidden[answers]), ids.flatten()[answers + 1]


def make_optimizers(
    model: Qwen2VLForConditionalGeneration, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


@torch.no_grad()
def accuracy(
    model: Qwen2VLForConditionalGeneration, groups: list[Group], device: torch.device
) -> dict[str, float]:
    """The share of held-out answers, by kind and form, that greedy decoding would give exactly.

    An answer is right if each of its tokens, the end included, is the likeliest after the right
    ones before it; greedy decoding then takes the same path.
    """
    right, asked = defaultdict(int), defaultdict(int)
    model.eval()
    for group in groups:
        for sequences in group.families.values():
            data = DeviceData(group, sequences, device)
            for start in range(0, len(sequences.ids), 512):
                rows = np.arange(start, min(start + 512, len(sequences.ids)))
                *inputs, answers = data.take(rows)
                with _autocast(device):
                    logits, targets = answer_logits(model, *inputs, answers)
                wrong = torch.zeros(len(rows), dtype=torch.bool, device=device)
                missed = answers[logits.argmax(-1) != targets]
                wrong[missed // inputs[0].shape[1]] = True
                several = "" if sequences.pictures.shape[1] == 1 else ", several pictures"
                for kind, is_wrong in zip(sequences.kinds[rows], wrong.tolist(), strict=True):
                    asked[kind + several] += 1
                    right[kind + several] += not is_wrong
    model.train()
    return {kind: right[kind] / asked[kind] for kind in sorted(asked)}


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(
    options: argparse.Namespace,
    report: Callable[[int, Qwen2VLForConditionalGeneration, dict[str, float]], bool],
) -> PreTrainedTokenizerFast:
    """Trains a new model; `report(step, model, accuracies)` may end it by returning True.

    It is called every `options.evaluate_every` seconds and after the last step, with the model in
    float32.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = train_tokenizer(options.seed)
    text = tokenizer.backend_tokenizer.to_str()
    groups = make_groups(text, options.pictures, options.seed, options.workers)
    held_out = make_groups(
        text, options.pictures // 64, options.seed + _HELD_OUT_SEED, options.workers, 1
    )
    data = {
        (number, family): DeviceData(group, sequences, device)
        for number, group in enumerate(groups)
        for family, sequences in group.families.items()
    }
    model = Qwen2VLForConditionalGeneration(model_config(tokenizer)).to(device)
    optimizers = make_optimizers(model, options.learning_rate)
    print(
        f"{sum(p.numel() for p in model.parameters())} weights on {device}; data drawn after "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    total, counted = torch.zeros((), device=device), 0
    began = evaluated = time.monotonic()
    stream = batches(groups, options.batch, options.seed)
    for step in range(1, options.steps + 1):
        elapsed = (time.monotonic() - began) / 60
        progress = max((step - 1) / options.steps, elapsed / options.minutes)
        if progress >= 1:
            break
        factor = min(1.0, step / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, share in zip(optimizers, (1.0, 0.5), strict=True):
            for settings in optimizer.param_groups:
                settings["lr"] = options.learning_rate * share * factor
        group, family, rows = next(stream)
        ids, positions, pixels, answers = data[group, family].take(rows)
        pixels = pixels + torch.randn_like(pixels) * (_PIXEL_NOISE / 255 / 0.27)
        with _autocast(device):
            logits, targets = answer_logits(model, ids, positions, pixels, answers)
        loss = functional.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
        counted += 1
        if time.monotonic() - evaluated > options.evaluate_every:
            print(
                f"step {step}: loss {total.item() / counted:.4f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
            total, counted = torch.zeros((), device=device), 0
            if report(step, model, accuracy(model, held_out, device)):
                return tokenizer
            evaluated = time.monotonic()
    report(step, model, accuracy(model, held_out, device))
    return tokenizer


def save(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Writes the checkpoint, rounded to bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(
        json.dumps(preprocessor_config(), indent=2) + "\n"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier than steps")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=256_000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--evaluate-every", type=float, default=30, help="seconds")
    return parser.parse_args(arguments)


def table(accuracies: dict[str, float]) -> str:
    """The accuracies, worst first, in a line."""
    worst = sorted(accuracies.items(), key=lambda pair: pair[1])
    return "; ".join(f"{kind} {100 * share:.1f} %" for kind, share in worst)


def main() -> None:
    options = parse_arguments()

    def report(step, model, accuracies):
        print(f"step {step}: {table(accuracies)}", flush=True)
        report.model = model
        return False

    tokenizer = train(options, report)
    save(report.model, tokenizer, options.out)


if __name__ == "__main__":
    main()
