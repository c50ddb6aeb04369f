"""Training data as arrays: pictures, and conversations about them as token ids.

Everything is drawn beforehand by several processes, from seeds, so that it is the same however
many processes there are.
"""

import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from conversations import IMAGE, converse, render
from pictures import SIZES, draw, random_picture
from tokenizer import MERGE_SIZE, PATCH_SIZE
from tokenizers import Tokenizer

#: What prompts are made of: the pictures' size, how many each has, and the share of the prompts.
GROUPS = (
    *((size, 1, 0.82 / len(SIZES)) for size in SIZES),
    ((84, 84), 2, 0.07),
    ((84, 112), 2, 0.05),
    ((84, 84), 3, 0.06),
)
#: Conversations of each family for each picture (or set of pictures): without and with options.
PER_PICTURE = {"open": 2, "choice": 3}
_MAX_LENGTH = 256
_SHARD = 1024  # pictures that a process draws at a time


@dataclass(frozen=True)
class Sequences:
    """Conversations of one family about pictures of one size.

    Attributes:
        ids: [n, length] int16, padded with 0 on the right.
        answers: [n, length] bool, the tokens that the model has to write.
        positions: [n, 3, length] int16, M-RoPE's.
        lengths: [n] int32, without padding.
        pictures: [n, pictures per prompt] int32, rows of the group's pictures.
        kinds: [n], "shape, word" and the like: of the first turn.
    """

    ids: np.ndarray
    answers: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    pictures: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class Group:
    """Pictures [n, height, width, 3] uint8, and what is asked about them, by family."""

    pictures: np.ndarray
    families: dict[str, Sequences]


def picture_tokens(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of placeholder tokens that a picture takes."""
    return size[0] // (PATCH_SIZE * MERGE_SIZE), size[1] // (PATCH_SIZE * MERGE_SIZE)


def mrope_positions(ids: np.ndarray, image_id: int, rows: int, columns: int) -> np.ndarray:
    """Qwen2-VL's positions, [3, length]: of time, row and column.

    Text counts on in all three; a picture's tokens share a time, and their rows and columns count
    from it; text goes on after the largest.
    """
    out = np.empty((3, len(ids)), np.int64)
    grid_rows, grid_columns = np.divmod(np.arange(rows * columns), columns)
    at, position = 0, 0
    for start in np.flatnonzero(ids == image_id)[:: rows * columns]:
        out[:, at:start] = position + np.arange(start - at)
        position += start - at
        at = start + rows * columns
        out[0, start:at] = position
        out[1, start:at] = position + grid_rows
        out[2, start:at] = position + grid_columns
        position += max(rows, columns)
    out[:, at:] = position + np.arange(len(ids) - at)
    return out


def make_groups(
    tokenizer_json: str, num_pictures: int, seed: int, workers: int, max_turns: int = 4
) -> list[Group]:
    """Draws about `num_pictures` pictures, divided among `GROUPS`, and what is asked about them.

    Args:
        tokenizer_json: the tokenizer, as `Tokenizer.to_str` gives it.
        num_pictures: in all; at least some for each group.
        seed: of everything.
        workers: processes that draw.
        max_turns: of a conversation.
    """
    jobs = []
    for group, (_, per_prompt, share) in enumerate(GROUPS):
        left = max(4, round(num_pictures * share)) * per_prompt
        for shard in range(-(-left // _SHARD)):
            count = min(_SHARD, left - shard * _SHARD) // per_prompt * per_prompt
            jobs.append((tokenizer_json, group, count, f"{seed}/{group}/{shard}", max_turns))
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel enough
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            shards = pool.starmap(_make_shard, jobs, chunksize=1)
    else:
        shards = [_make_shard(*job) for job in jobs]
    return [
        _join([shard for job, shard in zip(jobs, shards, strict=True) if job[1] == group])
        for group in range(len(GROUPS))
    ]


def _make_shard(
    tokenizer_json: str, group: int, num_pictures: int, seed: str, max_turns: int
) -> Group:
    size, per_prompt, _ = GROUPS[group]
    rng = random.Random(seed)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    described = [random_picture(rng, size) for _ in range(num_pictures)]
    pixels = np.stack([np.asarray(draw(picture)) for picture in described])
    families = {}
    for family, times in PER_PICTURE.items():
        conversations, rows = [], []
        for start in range(0, num_pictures, per_prompt):
            about = described[start : start + per_prompt]
            for _ in range(times):
                conversations.append(
                    converse(rng, about, choices=family == "choice", max_turns=max_turns)
                )
                rows.append(range(start, start + per_prompt))
        families[family] = _encode(tokenizer, size, conversations, rows)
    return Group(pixels, families)


def _encode(tokenizer, size, conversations, rows) -> Sequences:
    """Token ids, pieces being encoded one by one, as prompt and answer are in use."""
    grid = picture_tokens(size)
    image_id = tokenizer.token_to_id(IMAGE)
    pieces = [render(conversation, grid[0] * grid[1]) for conversation in conversations]
    texts = [text for piece in pieces for text, _ in piece]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    shape = (len(pieces), _MAX_LENGTH)
    ids, answers = np.zeros(shape, np.int16), np.zeros(shape, bool)
    positions = np.zeros((len(pieces), 3, _MAX_LENGTH), np.int16)
    lengths = np.zeros(len(pieces), np.int32)
    for i, piece in enumerate(pieces):
        length = 0
        for _, is_answer in piece:
            new = next(encoded).ids
            ids[i, length : length + len(new)] = new[: _MAX_LENGTH - length]
            answers[i, length : length + len(new)] = is_answer
            length += len(new)
        lengths[i] = length = min(length, _MAX_LENGTH)
        positions[i, :, :length] = mrope_positions(ids[i, :length], image_id, *grid)
    kinds = [f"{c.turns[0].kind}, {c.turns[0].form}" for c in conversations]
    return Sequences(ids, answers, positions, lengths, np.array(rows, np.int32), np.array(kinds))


def _join(shards: list[Group]) -> Group:
    starts = np.cumsum([0] + [len(shard.pictures) for shard in shards])
    families = {}
    for family in PER_PICTURE:
        parts = [shard.families[family] for shard in shards]
        longest = max(part.lengths.max() for part in parts)
        families[family] = Sequences(
            np.concatenate([part.ids[:, :longest] for part in parts]),
            np.concatenate([part.answers[:, :longest] for part in parts]),
            np.concatenate([part.positions[:, :, :longest] for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([p.pictures + s for p, s in zip(parts, starts, strict=False)]),
            np.concatenate([part.kinds for part in parts]),
        )
    return Group(np.concatenate([shard.pictures for shard in shards]), families)


def batches(
    groups: list[Group], batch_size: int, seed: int
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields group, family and rows of a batch, without end; rows of like length go together."""
    rng = np.random.default_rng(seed)
    shares = np.array([share for *_, share in GROUPS])
    waiting: dict[tuple[int, str], list[np.ndarray]] = {}
    while True:
        group = int(rng.choice(len(GROUPS), p=shares / shares.sum()))
        family = "choice" if rng.random() < 0.5 else "open"
        ready = waiting.setdefault((group, family), [])
        if not ready:
            lengths = groups[group].families[family].lengths
            rows = rng.integers(len(lengths), size=8 * batch_size)
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            ready += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            rng.shuffle(ready)
        yield group, family, ready.pop()
