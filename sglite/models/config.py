"""Reading a checkpoint's configuration."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from sglite.interface import checks
from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.models.checkpoint import Checkpoint
from sglite.models.safetensors_file import TensorEntry

#: What weights can be, and are computed in.
RUN_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

#: What every decoder reads of a config, and the types of the values.
BASIC_FIELDS: Mapping[str, type] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "max_position_embeddings": int,
    "rope_parameters": dict,
    "tie_word_embeddings": bool,
}
#: What those of Llama's kind read.
DECODER_FIELDS: Mapping[str, type] = {**BASIC_FIELDS, "hidden_act": str, "rms_norm_eps": float}
# Sizes of tensors.
_TENSOR_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
)
# Those of towers beside the language model, whose config may have a vocabulary that nothing uses.
_TOWER_SIZES = (
    *_TENSOR_SIZES[1:],
    "embed_dim",
    "out_hidden_size",
    "num_heads",
    "num_channels",
    "in_channels",
    "patch_size",
)
# Numbers of layers, and for some kinds of towers a list of them.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "depths")
# Null stands for "none" and not for a default in these.
_NULLABLE = (
    "head_dim",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
)


def architectures_of(checkpoint: Checkpoint, architecture: str | None) -> Sequence[str]:
    """The architecture asked for, or those that `config.json` names."""
    if architecture is not None:
        return [architecture]
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: architectures={names!r} names no model class; "
            f"pass architecture="
        )
    return names


def read_config(
    checkpoint: Checkpoint, model_class: type[nn.Module], *, trust_remote_code: bool
) -> Any:
    """The Hugging Face config object, of all parts where there are several.

    A `model_type` that transformers does not know gives a plain `PreTrainedConfig` with the file's
    values, which is all that a registered class of one's own needs. So does a file that holds
    everything that `model_class` says it reads: importing a family's config class costs over a
    second, and is only needed for its defaults.

    Args:
        checkpoint: whose config it is.
        model_class: a class whose own `config_fields` names all that it reads, with types, may get
            a plain config; a subclass may read more, and gets one only if it says so itself. A name
            such as "rope_parameters.factor" is that of a value within another.
        trust_remote_code: whether the config's own Python code may run.

    Raises:
        CheckpointError: the values are not what the config class allows.
    """
    path = checkpoint.folder / "config.json"
    values = dict(checkpoint.config)
    try:
        if trust_remote_code and "AutoConfig" in (values.get("auto_map") or {}):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=True, local_files_only=True
            )
        else:
            fields = vars(model_class).get("config_fields")
            is_plain = fields is not None and _says_everything(values, fields)
            config_class = PreTrainedConfig if is_plain else _config_class(values)
            # A copy, since config classes change the dicts that they are given.
            config = config_class.from_dict(copy.deepcopy(values))
        config.get_text_config()
    except Exception as error:  # validation differs from class to class, and by version
        raise CheckpointError(f"{path}: {error}") from error
    return config


def _says_everything(values: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    """Whether all fields are there, and of the right type; else the config class has to decide."""
    for name, kind in fields.items():
        *outer, own_name = name.split(".")
        table: Any = values
        for part in outer:
            table = table.get(part) if isinstance(table, Mapping) else None
        value = table.get(own_name) if isinstance(table, Mapping) else None
        if value is None and name in values and name in _NULLABLE:
            continue
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            return False
    return True


def _config_class(values: Mapping[str, Any]) -> type[PreTrainedConfig]:
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return CONFIG_MAPPING[model_type] if known else PreTrainedConfig


# What a class of somebody's own may find in its config without having a use for it: so many layers,
# and rows or columns, do no harm.
_HARMLESS_LAYERS, _HARMLESS_SIZE = 512, 1 << 17


def check_counts(
    config: Any, entries: Mapping[str, TensorEntry], *, may_be_unused: bool = False
) -> None:
    """Refuses sizes that the weight files cannot have, before anything is built by them.

    Args:
        config: the whole one; its text part and every other one are looked at.
        entries: the tensors of the weight files.
        may_be_unused: whether the model's class is an unknown one, to which the defaults of its
            config class may mean nothing; then only absurd sizes are refused.

    Raises:
        CheckpointError: naming the size.
    """
    text = config.get_text_config()
    vocab_size = getattr(text, "vocab_size", None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise CheckpointError(f"config.json: vocab_size={vocab_size!r} must be 1 or more")
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and not (isinstance(positions, int) and 1 <= positions < 1 << 62):
        raise CheckpointError(
            f"config.json: max_position_embeddings={positions!r} must be an integer of 1 or more"
        )
    # A layer has at least one tensor.
    most_layers = max(len(entries), _HARMLESS_LAYERS if may_be_unused else 0)
    largest = max((size for entry in entries.values() for size in entry.shape), default=0)
    largest = max(largest, len(entries))  # where every expert has tensors of its own
    largest = max(largest, _HARMLESS_SIZE if may_be_unused else 0)
    has_experts = any("expert" in name for name in entries)
    for place, part in _parts_of(config):
        for name in _LAYER_COUNTS:
            count = _total(_value(part, name))
            if count > most_layers:
                raise CheckpointError(
                    f"config.json: {place}{name}={count}, but the weight files hold "
                    f"{len(entries)} tensors in all"
                )
        sizes = {
            name: _value(part, name)
            for name in (_TENSOR_SIZES if part is text else _TOWER_SIZES)
            # Without experts their number is a config class's default.
            if has_experts or "experts" not in name
        }
        sizes["(image_size / patch_size) ** 2"] = _num_patches(part)
        for name, size in sizes.items():
            if isinstance(size, int) and size > largest:
                raise CheckpointError(
                    f"config.json: {place}{name}={size}, but no tensor of the weight files has "
                    f"more than {largest} rows or columns"
                )


def _parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    """A config and all that are within it, each with what stands before its names."""
    waiting = [("", config)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        values = part if isinstance(part, Mapping) else vars(part)
        for name, value in values.items():
            is_part = isinstance(value, PreTrainedConfig) or (
                isinstance(value, Mapping) and str(name).endswith("config")
            )
            if is_part:
                waiting.append((f"{place}{name}.", value))


def _value(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


def _total(count: Any) -> int:
    """A number, or the sum of a list of them; 0 for anything else."""
    counts = count if isinstance(count, list | tuple) else [count]
    return sum(one for one in counts if isinstance(one, int))


def _num_patches(part: Any) -> int | None:
    """Patches of a picture in the size that a tower is made for: it has a position for each."""
    count = 1
    for axis in (0, 1):
        image, patch = (
            size[axis] if isinstance(size, list | tuple) and len(size) == 2 else size
            for size in (_value(part, "image_size"), _value(part, "patch_size"))
        )
        if not isinstance(image, int) or not isinstance(patch, int) or patch < 1:
            return None
        count *= image // patch
    return count


def resolve_dtype(
    dtype: str | torch.dtype, checkpoint: Checkpoint, entries: Mapping[str, TensorEntry]
) -> torch.dtype:
    """The dtype to run in: what was asked for, or what the checkpoint says or holds.

    Args:
        dtype: "auto", a name in `RUN_DTYPES`, or one of these dtypes.
        checkpoint: whose `config.json` may name one.
        entries: the tensors of the weight files, for a config that names none.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        values = checkpoint.config
        name = next(
            (
                str(found).removeprefix("torch.")
                for key in ("dtype", "torch_dtype")
                for found in (values.get(key), _nested(values, key))
                if found
            ),
            None,
        )
        if name is None:
            floats = (entry.dtype for entry in entries.values())
            first = next((d for d in floats if d is not None and d.is_floating_point), None)
            name = str(first).removeprefix("torch.")
        if name == "float64":
            name = "float32"
    if name not in RUN_DTYPES:
        raise UnsupportedModelError(
            f"dtype {name!r} is not implemented; pass dtype= with one of {', '.join(RUN_DTYPES)}"
        )
    return RUN_DTYPES[name]


def end_token_ids_of(config: Any) -> tuple[int, ...]:
    """Ids that end a text, as a config object says."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list | tuple) else [ids]
    return checks.token_ids(
        "eos_token_id", ids, error=lambda message: CheckpointError(f"config.json: {message}")
    )


def _nested(values: Mapping[str, Any], key: str) -> Any:
    """A value of the text part of a config with several parts."""
    text = values.get("text_config")
    return text.get(key) if isinstance(text, Mapping) else None
