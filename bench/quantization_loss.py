"""What quantising loses: `python -m bench.quantization_loss demo llama-135m --out FILE.md`.

Perplexity and KL divergence against the same checkpoint in its own dtype, over texts drawn from the
model itself (`sglite.tools.quantization_loss`). A name of `bench.models` is made with random
weights first.
"""

import argparse
import tempfile
from pathlib import Path

from bench.checkpoints import make_checkpoint
from bench.models import CONFIGS
from sglite.models.checkpoint import resolve_checkpoint
from sglite.tools.quantization_loss import quantization_loss

_HEADER = (
    "| model | weights | perplexity | plain | KL, mean (nats) | KL, largest | same best token |\n"
    "|---|---|---:|---:|---:|---:|---:|\n"
)


def rows_of(name: str, folder: Path) -> str:
    """The table's rows of one model."""
    model: str | Path = name
    if name in CONFIGS:
        model = folder / name
        make_checkpoint(CONFIGS[name], model)
    rows = ""
    for method in ("int8", "int4"):
        loss = quantization_loss(resolve_checkpoint(model), method)
        rows += (
            f"| {name} | {method} | {loss.perplexity:.3f} | {loss.plain_perplexity:.3f} | "
            f"{loss.kl:.2e} | {loss.largest_kl:.2e} | {loss.same_best:.1%} |\n"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="a folder, a hub id, or a name of bench.models")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = "".join(rows_of(name, Path(folder)) for name in options.models)
    command = f"python -m bench.quantization_loss {' '.join(options.models)} --out {options.out}"
    options.out.write_text(
        f"# What quantising loses\n\nAgainst the checkpoint as it is, over 8 texts of 128 tokens "
        f"drawn from it.\n\n{_HEADER}{rows}\nBy `{command}`.\n",
        encoding="utf-8",
    )
    print(rows)


if __name__ == "__main__":
    main()
