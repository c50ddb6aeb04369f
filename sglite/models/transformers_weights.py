"""From a checkpoint to a Hugging Face module, through Hugging Face's own loading.

The names of weights in transformers 5 differ from those in checkpoints (experts are stacked,
prefixes moved), and only `from_pretrained` knows how.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.models.checkpoint import Checkpoint
from sglite.models.weights import HARMLESS

_NAMES_SHOWN = 5
# transformers reads weights from wherever it says.
_ADAPTER_FILE = "adapter_config.json"
_REPORTED = {
    "missing_keys": "missing",
    "unexpected_keys": "not used by the model",
    "mismatched_keys": "of the wrong shape",
    "error_msgs": "errors",
    "conversion_errors": "not converted",
}


def find_config(
    checkpoint: Checkpoint, model_class: type[nn.Module] | None, *, trust_remote_code: bool
) -> Any | None:
    """The Hugging Face config object; None for a `model_type` that nobody knows.

    Args:
        checkpoint: whose config it is.
        model_class: a class of the caller's own, which knows its config's class.
        trust_remote_code: whether the config's own Python code may run.

    Raises:
        CheckpointError: the values are not what the config class allows.
    """
    own_class = getattr(model_class, "config_class", None)
    has_own_code = "AutoConfig" in (checkpoint.config.get("auto_map") or {})
    known = checkpoint.config.get("model_type") in transformers.CONFIG_MAPPING
    try:
        if own_class is not None:
            return own_class.from_pretrained(checkpoint.folder, local_files_only=True)
        if known or (has_own_code and trust_remote_code):
            return AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # validation differs from class to class, and by version
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {error}") from error
    return None


def find_class(
    checkpoint: Checkpoint, names: Sequence[str], config: Any, *, trust_remote_code: bool
) -> type[PreTrainedModel] | None:
    """The Hugging Face class of a checkpoint, which has one of its architectures' names.

    None if there is none. A class of another name is none, though the config is its own: that
    would be another model.

    Args:
        checkpoint: whose `auto_map` may name a class of its own.
        names: its architectures.
        config: its config object.
        trust_remote_code: whether that class's code may run.
    """
    own = (checkpoint.config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if own and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own, checkpoint.folder)
    mapped = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    for name in names:
        if getattr(mapped, "__name__", None) == name:
            return mapped
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def build_empty(model_class: type[PreTrainedModel], config: Any) -> nn.Module:
    """The model on the meta device: its structure and shapes, no memory.

    Raises:
        CheckpointError: the class cannot be built from the config.
    """
    try:
        with torch.device("meta"):
            return model_class(copy.deepcopy(config))
    except Exception as error:  # a value of the config that the class cannot work with
        raise CheckpointError(
            f"{model_class.__name__} cannot be built from its config: "
            f"{type(error).__name__}: {error}"
        ) from error


def read_model(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, config: Any, dtype: torch.dtype
) -> nn.Module:
    """A model with its weights, plain, on the CPU.

    Args:
        model_class: the Hugging Face class.
        checkpoint: where the weights are.
        config: its config object, which becomes the model's.
        dtype: of the weights; a class may keep some in float32.

    Raises:
        CheckpointError: weights are missing, left over or misshapen; the message names them.
        UnsupportedModelError: the checkpoint is an adapter of another one.
    """
    if (checkpoint.folder / _ADAPTER_FILE).exists():
        raise UnsupportedModelError(
            f"{checkpoint.folder / _ADAPTER_FILE} names another checkpoint, which this one is an "
            f"adapter of: adapters are not implemented; merge it, or remove the file"
        )
    try:
        model, report = model_class.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:  # of whatever kind the class's own code raises
        raise CheckpointError(
            f"{model_class.__name__} cannot be loaded from {checkpoint.folder}: "
            f"{type(error).__name__}: {error}"
        ) from error
    _check_report(report, checkpoint)
    return model.eval()


def _check_report(report: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    problems = []
    for key, title in _REPORTED.items():
        names = [str(name) for name in report.get(key) or () if not HARMLESS.search(str(name))]
        if names:
            shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
            rest = len(names) - _NAMES_SHOWN
            problems.append(f"{title}: {shown}" + (f", and {rest} more" if rest > 0 else ""))
    if problems:
        raise CheckpointError(
            f"the tensors in {checkpoint.folder} do not fit the model that its config.json "
            f"describes:\n  " + "\n  ".join(problems)
        )
