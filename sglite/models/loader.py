"""From a checkpoint to a model that is ready to run."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sglite.cache.kv_pool import LayerSpec
from sglite.interface import checks
from sglite.interface.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    foreign_errors_as,
)
from sglite.interface.generation_defaults import GenerationDefaults
from sglite.layers.attention import RadixAttention
from sglite.layers.rotary import RotaryEmbedding, set_context_length
from sglite.layers.weight import WeightModule
from sglite.models.checkpoint import Checkpoint
from sglite.models.config import (
    architectures_of,
    check_counts,
    end_token_ids_of,
    read_config,
    resolve_dtype,
)
from sglite.models.loaded_model import LoadedModel, check_room
from sglite.models.packed_checkpoint import entries_of, map_weights, packed_settings
from sglite.models.quantization import AT_LOAD, quantize_at_load, resolve_quantization
from sglite.models.registry import ModelRegistry
from sglite.models.safetensors_file import SafetensorsFile, TensorEntry
from sglite.models.weights import load_weights

#: As `architecture`: the Hugging Face class, also where a class is registered.
BY_HUGGING_FACE = "transformers"

_CPU = torch.device("cpu")
# So many more than the files hold do no harm; then the comparison of names says what is wrong.
_HARMLESS_PARAMETERS = 1 << 24


def load_model(
    checkpoint: Checkpoint,
    *,
    architecture: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: torch.device = _CPU,
    room: int | None = None,
    quantization: str | None = None,
    context_length: int | None = None,
    batch_invariant: bool = False,
    trust_remote_code: bool = False,
    before_reading: Callable[[], Any] | None = None,
) -> LoadedModel:
    """Builds the model that a checkpoint describes, and reads its weights.

    The tensors that the files' headers announce are compared with the whole model before memory is
    taken and anything is read.

    Args:
        checkpoint: what `resolve_checkpoint` found.
        architecture: a registered name to use instead of what `config.json` says, or
            "transformers" for Hugging Face's own class.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: where the weights go.
        room: bytes that they may take there; None: it is not known.
        quantization: "int8" or "int4" quantises the weights while they are read; the name of what
            the checkpoint holds is allowed as well. None: as the checkpoint has them.
        context_length: positions that may come up; None: what the checkpoint speaks of.
        batch_invariant: whether layers are told to use one arithmetic for every number of rows.
        trust_remote_code: whether the config's own Python code may run.
        before_reading: called once, when everything but the weights is there; what it starts on
            another thread has the interpreter to itself while weights are packed.

    Raises:
        CheckpointError: a file cannot be read, or does not fit the model.
        UnsupportedModelError: something that the checkpoint asks for is not implemented.
        ConfigError: a packed checkpoint is asked for in another way than it was packed;
            `context_length` is above the model's limit, `batch_invariant` asked for with
            float32 on a GPU, or `quantization` unknown, or not what the checkpoint holds.
        OutOfMemoryError: the weights do not fit into the room.
    """
    packed = packed_settings(checkpoint, dtype=dtype, quantization=quantization, device=device)
    if packed is None:
        quantization, quantized_format = resolve_quantization(quantization, checkpoint)
    else:
        dtype, quantization, quantized_format = packed.dtype, packed.quantization, None
    if quantization is not None and device.type != "cpu":
        raise UnsupportedModelError(
            f"quantised weights ({quantization}) run on the CPU alone: pass device='cpu'"
        )
    names, registered, is_native = find_class(checkpoint, architecture)
    if not is_native:
        if packed is not None:
            raise UnsupportedModelError(
                f"{' or '.join(names)} runs by Hugging Face's class here, which takes no packed "
                f"weights: register the class that they were packed for, or pass the original "
                f"checkpoint"
            )
        # Imported here, since few need it: it imports Hugging Face's modelling code.
        from sglite.models.transformers_loading import load_unregistered

        found = load_unregistered(
            checkpoint,
            names,
            dtype=dtype,
            device=device,
            room=room,
            quantization=quantization,
            context_length=context_length,
            trust_remote_code=trust_remote_code,
            before_reading=before_reading,
            model_class=registered,
        )
        if found is not None:
            ModelRegistry.warn_of_broken_packages()
            return found
    name, model_class = ModelRegistry.resolve(names)
    ModelRegistry.warn_of_broken_packages()
    whole_config = read_config(checkpoint, model_class, trust_remote_code=trust_remote_code)
    config = whole_config.get_text_config()
    generation_defaults = GenerationDefaults.from_generation_config(checkpoint.generation_config)
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in checkpoint.weight_files]
        if packed is None:
            entries = {entry.name: entry for file in files for entry in file.entries.values()}
        else:
            entries = entries_of(files[0])
        check_counts(whole_config, entries)
        takes_whole = getattr(model_class, "takes_whole_config", False)
        model = _build(model_class, name, whole_config if takes_whole else config, checkpoint)
        _check_parameters(model, entries)
        run_dtype = resolve_dtype(dtype, checkpoint, entries)
        if batch_invariant and device.type == "cuda" and run_dtype == torch.float32:
            raise ConfigError(
                "batch_invariant=True is for bfloat16 and float16 on a GPU, but the model would "
                "run in float32: pass another dtype"
            )
        _set_dtype(model, run_dtype)
        if packed is None and quantization in AT_LOAD:
            quantize_at_load(model, quantization)
        if room is not None:
            _check_room(model, device, room)
        model.to(device)
        max_positions = _max_positions(model, config, context_length)
        if max_positions is not None:
            set_context_length(model, context_length or max_positions)
        kv_layers = kv_layers_of(model)
        if packed is not None:
            files[0].keep_mapped()  # which begins before another thread has the interpreter
        if before_reading is not None:
            before_reading()
        mapped_bytes = 0
        if packed is None:
            load_weights(model, files, quantized_format)
        else:
            mapped_bytes = map_weights(model, files[0], run_dtype)
    for module in model.modules():
        if hasattr(module, "batch_invariant"):
            module.batch_invariant = batch_invariant
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        config=config,
        whole_config=whole_config,
        architecture=name,
        dtype=run_dtype,
        quantization=quantization,
        vocab_size=config.vocab_size,
        max_positions=max_positions,
        kv_layers=kv_layers,
        generation_defaults=generation_defaults,
        end_token_ids=generation_defaults.eos_token_ids or end_token_ids_of(config),
        mapped_bytes=mapped_bytes,
    )


def find_class(
    checkpoint: Checkpoint, architecture: str | None
) -> tuple[Sequence[str], type[nn.Module] | None, bool]:
    """Which class runs a checkpoint.

    Args:
        checkpoint: whose `config.json` names its architectures.
        architecture: as for `load_model`.

    Returns:
        The architectures; the registered class of one of them, None where there is none or
        Hugging Face's was asked for; whether it is a class of this library's kind.

    Raises:
        CheckpointError: no architecture is named.
    """
    by_hugging_face = architecture == BY_HUGGING_FACE
    names = architectures_of(checkpoint, None if by_hugging_face else architecture)
    found = ModelRegistry.find(names)
    registered = None if by_hugging_face else found
    return names, registered, registered is not None and not _is_hugging_face(registered)


def _is_hugging_face(model_class: type[nn.Module]) -> bool:
    """Whether a class is one for transformers; told by name, as the import takes a second."""
    return any(base.__name__ == "PreTrainedModel" for base in model_class.__mro__)


def kv_layers_of(model: nn.Module) -> tuple[LayerSpec, ...]:
    """What each attention layer of a model stores per token, found in its `RadixAttention` parts.

    Raises:
        UnsupportedModelError: there is none, or the `layer_id`s are not 0, 1, ... once each.
    """
    parts = {
        path: module for path, module in model.named_modules() if isinstance(module, RadixAttention)
    }
    if not parts:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no RadixAttention: there is nothing to cache"
        )
    by_id: dict[int, str] = {}
    for path, module in parts.items():
        if module.layer_id in by_id:
            raise UnsupportedModelError(
                f"{by_id[module.layer_id]} and {path} both have layer_id {module.layer_id}; each "
                f"RadixAttention needs one of its own"
            )
        by_id[module.layer_id] = path
    if sorted(by_id) != list(range(len(by_id))):
        raise UnsupportedModelError(
            f"the layer_ids of the RadixAttention parts are {sorted(by_id)}; they must be 0 to "
            f"{len(by_id) - 1}"
        )
    ordered = (parts[by_id[layer_id]] for layer_id in range(len(by_id)))
    return tuple(LayerSpec(part.num_kv_heads, part.head_dim) for part in ordered)


def _build(
    model_class: type[nn.Module], name: str, config: Any, checkpoint: Checkpoint
) -> nn.Module:
    what = f"{name} cannot be built from {checkpoint.folder / 'config.json'}"
    with foreign_errors_as(CheckpointError, what):
        if model_class.__module__.startswith("sglite."):
            return model_class(config)
        # The first values of somebody's own layers are drawn, and not from the host's numbers.
        with torch.random.fork_rng(devices=[]):
            return model_class(config)


def _check_parameters(model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Refuses parameters that the files cannot fill, before a byte of them is touched.

    Those of `WeightModule`s take no memory yet, and are compared with the headers one by one.
    """
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(entry.shape) for entry in entries.values())
    if needed > held + _HARMLESS_PARAMETERS:
        raise CheckpointError(
            f"config.json: it describes a model with {needed} parameters beside the matrices of "
            f"its layers, but the weight files hold {held} numbers in all"
        )


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the dtype of all weights. Buffers keep theirs: a model chose it for them."""
    for module in model.modules():
        if isinstance(module, WeightModule):
            module.matrix.convert(lambda tensor: tensor.to(dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _check_room(model: nn.Module, device: torch.device, room: int) -> None:
    """Refuses weights that there is no room for, before any of them is read."""
    sizes = {
        id(module.matrix): module.matrix.nbytes
        for module in model.modules()
        if isinstance(module, WeightModule)
    }
    needed = sum(sizes.values()) + sum(parameter.nbytes for parameter in model.parameters())
    check_room(needed, device, room)


def _max_positions(model: nn.Module, config: Any, asked: int | None) -> int | None:
    """The longest context: what the checkpoint speaks of, or more where it was asked for."""
    rotary = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    if rotary:
        default = min(module.default_context_length for module in rotary)
        largest = min(module.max_context_length for module in rotary)
    else:
        default = largest = getattr(config, "max_position_embeddings", None)
    if asked is None or largest is None:
        return default
    if asked > largest:
        checks.refuse("context_length", asked, f"at most {largest}, the model's limit", ConfigError)
    return max(default, asked)
