"""Writes `docs/supported_models.md` from the registry and from the tables of the tests.

    python -m docs.supported_models

`tests/docs/test_supported_models.py` fails when the page is not what this would write.
"""

import ast
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from sglite.models.registry import _BUILT_IN
from tests import vision_strangers
from tests.checkpoints import CONFIGS
from tests.models.unregistered import REFUSED, RUN
from tests.vision_checkpoints import RECIPES

PAGE = Path(__file__).with_suffix(".md")

# By what the message of a refusal is known by in the tests.
_REASONS = {
    "state-space": "state-space layers, whose state the KV cache cannot hold",
    "state": "layers that carry a state from token to token, which the KV cache cannot hold",
    "'conv'": "convolution layers, whose state the KV cache cannot hold",
    "computes attention itself": "its class computes attention itself, so that it cannot be "
    "replaced by attention over the cache",
    "attends twice": "attention modules that attend twice, and would need a cache for each time",
    "mask of the model's own making": "a mask of its own making",
    "chunk": "attention in chunks",
    "encoder-decoder": "an encoder-decoder; models that continue a text are implemented",
}

_HEAD = """\
# Supported models

<!-- Written by `python -m docs.supported_models`; not to be edited by hand. -->

A checkpoint's architecture is what `architectures` in its `config.json` says. What is listed here
is run by the tests on small checkpoints with random weights, against Hugging Face in float32 with
eager attention: logits of every position, in chunks mixed with decodes, and 32 greedy tokens of a
batch of mixed lengths with the prefix cache on, and `sglite.compare`, which looks at every layer.
`python -m sglite compare FOLDER` checks a checkpoint of yours. For models of your own see
[new_models.md](new_models.md). Those whose names end in `ForConditionalGeneration` take images as
well ([vision.md](vision.md)), and are tested with text, one picture, several of different sizes,
and chunks that cut pictures, but not by `compare`.

## With a file of their own

{native}

## Through Hugging Face's class

Any other causal language model of transformers is run by its own class, its attention replaced by
sglite's over the same cache, or is refused by name. `LLM(..., architecture="transformers")` asks
for it where there is a file as well. {num_run} architectures are tested, of which {num_without}
have no file:

{run}

### That see

Vision-language models get a picture's embeddings from their class's `get_image_features`, and its
placeholders from Hugging Face's processor; videos are not taken. A live module
(`LLM(hf_module, tokenizer=...)`) takes text only.

{seeing}

Refused, with the reason when they are loaded: those with features in several layers (deepstack),
cross-attention, sounds, tokens that see what follows them, processors that do not tell what a
picture becomes in a prompt, and processors that need a package which is not there. The tests have:
{blind}.

## Refused

What could not be right is refused when the model is loaded, by name. Of each reason the tests have
examples:

{refused}

RoPE of the kinds "dynamic" and "longrope" changes with the longest sequence of a batch; through
Hugging Face's class it is run up to the original length (for "longrope" pass `context_length=`),
and refused beyond. Phi-3 has a file, which reads "longrope" for any length.
"""


def page() -> str:
    """The whole text."""
    native_configs = {
        name: [key for key, (config, _) in CONFIGS.items() if architecture_of(config) == name]
        + [key for key, recipe in RECIPES.items() if recipe.model_class == name]
        for name in _BUILT_IN
    }
    run = sorted({architecture_of(config): config for config in RUN}, key=str.lower)
    return _HEAD.format(
        native=_table(
            ("architecture", "file", "what it is", "tested as"),
            (
                (f"`{name}`", _file_link(module), _summary(module), ", ".join(native_configs[name]))
                for name, module in _BUILT_IN.items()
            ),
        ),
        num_run=len(run),
        num_without=sum(name not in _BUILT_IN for name in run),
        run=_table(
            ("architecture", "a file as well"),
            ((f"`{name}`", "yes" if name in _BUILT_IN else "") for name in run),
        ),
        seeing=_table(
            ("architecture", "tested as"),
            ((f"`{one.model_class}`", name) for name, one in vision_strangers.RUN.items()),
        ),
        blind=", ".join(f"`{one.model_class}`" for one, _ in vision_strangers.REFUSED.values()),
        refused=_table(
            ("architecture", "why"),
            (
                (f"`{architecture_of(config)}`", _REASONS[message])
                for config, _, message in REFUSED.values()
            ),
        ),
    )


def architecture_of(config_name: str) -> str:
    """The class that transformers has for a config class, by their names."""
    model_type = getattr(transformers, config_name).model_type
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        if model_type in names:
            return names[model_type]
    raise ValueError(f"transformers has no language model for {config_name}")


def _summary(module: str) -> str:
    """The first line of a module's docstring, less a paper that is cited in it."""
    docstring = ast.get_docstring(ast.parse(Path(_origin(module)).read_text(encoding="utf-8")))
    return re.sub(r" \([^()]*\d{4}\.\)", "", docstring.splitlines()[0]).rstrip(".")


def _file_link(module: str) -> str:
    name = Path(_origin(module)).name
    return f"[{name}](../sglite/models/{name})"


def _origin(module: str) -> str:
    return importlib.util.find_spec(module).origin


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
