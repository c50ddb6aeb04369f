"""Train the small model that ships with sglite, on data made here.

    python examples/train_demo/train.py --out DIR --seed 0

It writes a Hugging Face checkpoint (bfloat16 safetensors, config, generation config, tokenizer
with chat template) that `LLM(DIR)` and transformers load. `--steps 2` is a quick smoke run.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from conversations import ConversationSampler
from questions import Split
from tokenizer import VOCAB_SIZE, render, train_tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORED = -100  # label of a position whose token the model need not predict
CONTEXT_LENGTH = 1024
# Kinds of batch: share of the steps, turns of a chat, sequences, and the share of plain prompts.
BATCH_KINDS = (
    (0.70, (1, 1), 64, 0.5),
    (0.24, (2, 5), 16, 0.0),
    (0.06, (8, 36), 3, 0.0),
)
BATCHES_SORTED_TOGETHER = 8


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama with grouped-query attention, rotary positions and tied embeddings: 1.8 M weights."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.07,  # about hidden_size ** -0.5: attention is not flat at the start
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]) -> tuple[list, list]:
    """Return ids and labels; pieces are encoded one by one, as prompt and answer are in use."""
    ids, labels = [], []
    encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
    for piece, (_, is_answer) in zip(encoded, pieces, strict=True):
        ids += piece
        labels += piece if is_answer else [IGNORED] * len(piece)
    return ids[:CONTEXT_LENGTH], labels[:CONTEXT_LENGTH]


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels, both [sequences, length] int64, padded on the right, without end.

    Sequences of like length share a batch, so that little of a step goes into padding.
    """
    sampler = ConversationSampler(Split(), rng)
    waiting: list[list] = [[] for _ in BATCH_KINDS]
    shares = [share for share, *_ in BATCH_KINDS]
    while True:
        kind = rng.choices(range(len(BATCH_KINDS)), shares)[0]
        _, turns, num_sequences, plain_share = BATCH_KINDS[kind]
        if not waiting[kind]:
            drawn = [
                sampler.plain() if rng.random() < plain_share else sampler.chat(rng.randint(*turns))
                for _ in range(num_sequences * BATCHES_SORTED_TOGETHER)
            ]
            encoded = [encode(tokenizer, render(conversation)) for conversation in drawn]
            encoded.sort(key=lambda pair: len(pair[0]))
            waiting[kind] = [
                encoded[i : i + num_sequences] for i in range(0, len(encoded), num_sequences)
            ]
            rng.shuffle(waiting[kind])
        batch = waiting[kind].pop()
        length = max(len(ids) for ids, _ in batch)
        pad = tokenizer.pad_token_id
        yield (
            torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in batch]),
            torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in batch]),
        )


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of the answers.

    ids and labels are [sequences, length] int64. Padding stands on the right of a causal model, so
    it needs no attention mask; the head runs on the positions that count only.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted])


def make_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for embeddings and norms.

    Muon needs about half of AdamW's steps here: copying a number out of the question, on which
    everything else rests, is learned much sooner.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def learning_rate_factor(step: int, steps: int) -> float:
    """Rise over the first 100 steps, stay, and fall linearly to zero over the second half."""
    return min(1.0, step / 100, 2 * (1 - (step - 1) / steps))


def train(
    steps: int, learning_rate: float, seed: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a new model for `steps` steps and return it, in float32, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    optimizers = make_optimizers(model, learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda done: learning_rate_factor(done + 1, steps))
        for o in optimizers
    ]
    print(f"{sum(p.numel() for p in model.parameters())} weights, {steps} steps")
    started, losses = time.monotonic(), []
    stream = batches(tokenizer, random.Random(seed))
    for step in range(1, steps + 1):
        loss = answer_loss(model, *next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step}: loss {recent:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model, tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint, rounded to bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = train(arguments.steps, arguments.learning_rate, arguments.seed)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
