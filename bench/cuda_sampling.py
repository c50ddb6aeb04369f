"""Measures sampling on a GPU beside a sort in torch: `python -m bench.cuda_sampling`.

Microseconds of one call, from graphs of many calls that rotate over more logits than the L2 cache
holds ("cold"), and over one set of logits ("warm", as in a decode step, which has just written
them). The limit is one read of the logits at the bandwidth that this machine reads memory with.
"""

import argparse
import importlib.util
import json

import torch
from torch import Tensor

from bench.cuda_limits import graph_microseconds, read_gigabytes_per_second
from sglite import ops

KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "top-k + top-p": {"top_k": 50, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "top-k 1000": {"top_k": 1000},
    "logprobs 5": None,
}
NONE = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": -1}
ROTATED_BYTES = 160e6


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32000, 131072, 151936])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", help="also writes the figures to this file")
    return parser.parse_args()


def draw_logits(batch: int, vocab: int) -> list[Tensor]:
    """Sets of logits as peaked as a model's, rounded like a bfloat16 model's."""
    count = max(2, int(ROTATED_BYTES / (batch * vocab * 4)))
    return [(torch.randn(batch, vocab, device="cuda") * 3).bfloat16().float() for _ in range(count)]


def ours(logits: list[Tensor], kind: str):
    """One call of our op for each set of logits."""
    batch, vocab = logits[0].shape
    workspace = ops.sampling_workspace(vocab, batch, "cuda")
    if KINDS[kind] is None:
        tokens = torch.randint(vocab, (batch,), device="cuda")
        return [lambda x=x: ops.log_probs(x, tokens, 5, workspace=workspace) for x in logits]
    values = NONE | KINDS[kind]
    reals = torch.tensor(
        [[values["temperature"], values["top_p"], values["min_p"], 1.0, 0.0, 0.0]] * batch,
        device="cuda",
    )
    integers = torch.tensor([[values["top_k"], 7, r, 3] for r in range(batch)], device="cuda")
    out = (
        torch.empty(batch, dtype=torch.int64, device="cuda"),
        torch.empty(batch, dtype=torch.int32, device="cuda"),
    )
    return [
        lambda x=x: ops.sample(x, reals, integers, workspace=workspace, out=out) for x in logits
    ]


def torch_sample(logits: Tensor, top_k=-1, top_p=1.0, min_p=0.0, temperature=1.0) -> Tensor:
    """What is commonly done: sort, mask, an exponential race."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k > 0 or top_p < 1:
        ordered, ids = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        if top_k > 0:
            probabilities[:, top_k:] = 0
        if top_p < 1:
            sums = probabilities.cumsum(-1)
            probabilities[sums - probabilities >= top_p * sums[:, -1:]] = 0
    else:
        ids, probabilities = None, logits.softmax(-1)
        if min_p > 0:
            top = probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < min_p * top, 0)
    place = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return place if ids is None else ids.gather(1, place[:, None])[:, 0]


def flashinfer_calls(logits: list[Tensor], kind: str):
    """The same for FlashInfer, where it is installed and has the filter."""
    if kind != "top-k + top-p" or importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    return [lambda x=x: top_k_top_p_sampling_from_logits(x, 50, 0.9) for x in logits]


def main():
    options = arguments()
    bandwidth = read_gigabytes_per_second() * 1e3  # bytes per microsecond
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e6:.2f} TB/s")
    print(f"{'':>22}{'cold':>8}{'warm':>8}{'limit':>8}{'torch':>9}{'FlashInfer':>12}")
    figures = []
    for vocab in options.vocabularies:
        for batch in options.batches:
            logits = draw_logits(batch, vocab)
            print(f"batch {batch} x {vocab}")
            for kind in options.kinds:
                calls = ours(logits, kind)
                row = {
                    "batch": batch,
                    "vocab": vocab,
                    "kind": kind,
                    "cold": graph_microseconds(calls[:200]),
                    "warm": graph_microseconds(calls[:1] * 50),
                    "limit": batch * vocab * 4 / bandwidth,
                }
                if not options.no_peers and KINDS[kind] is not None:
                    values = KINDS[kind]
                    row["torch"] = graph_microseconds(
                        [lambda x=x, v=values: torch_sample(x, **v) for x in logits[:4]]
                    )
                    peer = flashinfer_calls(logits[:20], kind)
                    row["flashinfer"] = graph_microseconds(peer) if peer else None
                figures.append(row)
                numbers = [row["cold"], row["warm"], row["limit"], row.get("torch")]
                text = "".join("       -" if n is None else f"{n:8.1f}" for n in numbers)
                peer = row.get("flashinfer")
                print(f"  {kind:>20}{text}" + (f"{peer:12.1f}" if peer else ""), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
