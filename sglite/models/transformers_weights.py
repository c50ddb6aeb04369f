"""From a checkpoint to a Hugging Face module, through Hugging Face's own loading.

The names of weights in transformers 5 differ from those in checkpoints (experts are stacked,
prefixes moved), and only `from_pretrained` knows how.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from sglite.interface.errors import CheckpointError
from sglite.models.checkpoint import Checkpoint

_NAMES_SHOWN = 5
_REPORTED = {
    "missing_keys": "missing",
    "unexpected_keys": "not used by the model",
    "mismatched_keys": "of the wrong shape",
    "error_msgs": "errors",
    "conversion_errors": "not converted",
}


def find_config(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any | None:
    """The Hugging Face config object; None for a `model_type` that transformers does not know.

    Raises:
        CheckpointError: the values are not what the config class allows.
    """
    has_own_code = "AutoConfig" in (checkpoint.config.get("auto_map") or {})
    known = checkpoint.config.get("model_type") in transformers.CONFIG_MAPPING
    if not known and not (has_own_code and trust_remote_code):
        return None
    try:
        return AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # validation differs from class to class, and by version
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {error}") from error


def find_class(
    checkpoint: Checkpoint, names: Sequence[str], config: Any, *, trust_remote_code: bool
) -> type[PreTrainedModel] | None:
    """The Hugging Face class of a checkpoint; None if there is none.

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
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    mapped = mapping[type(config)] if type(config) in mapping else None
    if mapped is not None and mapped.__name__ in names:
        return mapped
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return mapped if isinstance(mapped, type) else None


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
    """
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
        names = [str(name) for name in report.get(key) or ()]
        if names:
            shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
            rest = len(names) - _NAMES_SHOWN
            problems.append(f"{title}: {shown}" + (f", and {rest} more" if rest > 0 else ""))
    if problems:
        raise CheckpointError(
            f"the tensors in {checkpoint.folder} do not fit the model that its config.json "
            f"describes:\n  " + "\n  ".join(problems)
        )
