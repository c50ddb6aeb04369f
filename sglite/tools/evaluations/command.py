"""`python -m sglite eval`: the harness's own command line, with sglite as its model."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate


def run_harness(
    model: str, llm_arguments: Mapping[str, Any], harness_arguments: Sequence[str]
) -> None:
    """Runs `lm-eval run` on a model.

    The model is known to the harness because this package was imported, which its own `lm-eval`
    never does: it finds models in a table of its own, and nothing else.

    Args:
        model: a folder, a hub id or "demo".
        llm_arguments: further arguments of `SGLiteLM`, and through it of `LLM`.
        harness_arguments: everything else, as typed: `--tasks`, `--num_fewshot`, `--limit`, ...;
            they win over what is set here.

    Raises:
        SGLiteError: the model cannot be loaded or run. What the harness raises is passed on.
    """
    arguments = dict(llm_arguments)
    # The harness passes the device apart from the model's arguments, "cuda:0" if it is not told.
    device = arguments.pop("device", "auto")
    own = ["--model", "sglite", "--device", str(device)]
    own += ["--model_args", json.dumps({"pretrained": model, **arguments})]
    before = sys.argv  # which is the only thing that the harness's parser reads
    sys.argv = ["lm-eval", "run", *own, *harness_arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
