"""Any causal language model of Hugging Face's, run by its own class over the paged cache.

For architectures that have no file here. The class's own code runs, on the flattened tokens of the
whole batch; its attention is `RadixAttention`, its linear layers, norms and output head the
library's. What its layers need is learned by `transformers_probe`; what cannot be right is refused
by name at load.
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sglite.cache.kv_pool import LayerSpec
from sglite.interface import checks
from sglite.interface.errors import ConfigError, UnsupportedModelError
from sglite.interface.generation_defaults import GenerationDefaults
from sglite.layers.attention import RadixAttention
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.logits import LogitsProcessorOutput
from sglite.layers.porting import PPProxyTensors, refuse_pipeline_and_embedding
from sglite.models.checkpoint import Checkpoint
from sglite.models.config import check_counts, end_token_ids_of, resolve_dtype
from sglite.models.loaded_model import LoadedModel, check_room
from sglite.models.quantization import AT_LOAD
from sglite.models.safetensors_file import SafetensorsFile
from sglite.models.transformers_attention import (
    IMPLEMENTATION,
    SLOT,
    AttentionSlot,
    RunningBatch,
    use_implementation,
)
from sglite.models.transformers_experts import EXPERTS_IMPLEMENTATION
from sglite.models.transformers_fusion import Fuser, Fusions
from sglite.models.transformers_layers import replace_layers
from sglite.models.transformers_live import share_module
from sglite.models.transformers_parts import InvariantLinears
from sglite.models.transformers_probe import (
    AttentionFacts,
    forward_arguments,
    logits_of,
    probe,
)
from sglite.models.transformers_refusals import refuse_config, refuse_modules, refuse_rope
from sglite.models.transformers_vision import (
    SeesImages,
    learn_images,
    read_image_processor,
    refuse_vision,
    takes_images,
)
from sglite.models.transformers_weights import (
    build_empty,
    find_class,
    find_config,
    read_model,
)
from sglite.multimodal.keys import pad_input_ids


@dataclass(frozen=True)
class TransformersInfo:
    """What was found in a Hugging Face model and done to it.

    Attributes:
        layers: its attention modules, in the order in which they run.
        fusions: what was put in place of its parts.
        shared: whether the parameters are a live module's.
    """

    layers: tuple[AttentionFacts, ...]
    fusions: Fusions
    shared: bool


class Origin:
    """The live module whose parameters a model shares.

    Args:
        module: it is not kept alive.
    """

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)
        self._ids = {name: id(parameter) for name, parameter in module.named_parameters()}

    def check(self) -> None:
        """Refuses parameters that were replaced by others: those are not shared.

        Raises:
            ConfigError: naming one.
        """
        module = self._module()
        if module is None:
            return
        ids = {name: id(parameter) for name, parameter in module.named_parameters()}
        for name in self._ids.keys() | ids.keys():
            if self._ids.get(name) != ids.get(name):
                raise ConfigError(
                    f"the live module's parameter {name} is another object than when the LLM was "
                    f"made: change parameters in place, or make a new LLM"
                )


class TransformersModel(nn.Module):
    """A Hugging Face model as the engine runs it.

    Args:
        inner: the Hugging Face model, in evaluation mode, with its weights; its parts are replaced.
        num_positions: the longest context that it speaks of; None: it does not.
        shared: whether its parameters stay where they lie; else linear layers are packed.
        device: where it runs.
        quantization: how packed weights are stored; None: plainly.
        keeps_layers: whether decoder layers stay the model's own, for the sake of their positions.
        left: paths of parts that stay as they are.

    Attributes:
        info: what was found and done.
        kv_layers: what each attention layer stores per token.
        vocab_size: width of the logits.
        origin: the live module whose parameters these are; None: they are the model's own.
        can_be_batch_invariant: False on a GPU, whose products are torch's, and where GPT-2's
            Conv1D, a product of torch's as well, runs over a live module's weights.
        cuda_graphs: False: Hugging Face's code may look at the values of its tensors.
    """

    cuda_graphs = False

    def __init__(
        self,
        inner: nn.Module,
        num_positions: int | None,
        *,
        shared: bool,
        device: torch.device,
        quantization: str | None = None,
        keeps_layers: bool = False,
        left: Collection[str] = (),
    ):
        super().__init__()
        self.origin: Origin | None = None
        self._running = RunningBatch()
        inner.config.get_text_config()._experts_implementation_internal = EXPERTS_IMPLEMENTATION
        found = probe(inner, num_positions)
        use_implementation(inner, IMPLEMENTATION)
        self.kv_layers = self._place_slots(inner, found.layers)
        self.vocab_size = found.vocab_size
        whole_layers = 0
        if not (shared or keeps_layers):
            whole_layers = replace_layers(
                inner, found, self.kv_layers, self._running, device, quantization
            )
        fuser = Fuser(
            inner,
            found.calls,
            self._running,
            shared=shared,
            device=device,
            quantization=quantization,
            left=left,
        )
        fusions = fuser.run()
        fusions.whole_layers = whole_layers
        self.info = TransformersInfo(found.layers, fusions, shared)
        self.can_be_batch_invariant = device.type == "cpu" and "Conv1D" not in fusions.kept
        if not shared:
            _leave_files(inner)
        self.inner = inner
        self._arguments = forward_arguments(inner)
        self._has_head = inner.get_output_embeddings() is not None
        has_other_weights = device.type == "cpu" and bool(self.info.fusions.kept)
        self._context = InvariantLinears if has_other_weights else nullcontext

    def _place_slots(
        self, inner: nn.Module, layers: Sequence[AttentionFacts]
    ) -> tuple[LayerSpec, ...]:
        """Hangs every attention module's slot on it; gives the layers of the cache."""
        modules = dict(inner.named_modules())
        layer_ids: dict[str, int] = {}
        specs = []
        for facts in layers:
            head_dim = max(facts.head_dim, facts.v_head_dim)
            if facts.shares is None:
                layer_ids[facts.path] = len(specs)
                specs.append(LayerSpec(facts.num_kv_heads, head_dim))
            attention = RadixAttention(
                facts.num_heads,
                head_dim,
                facts.scaling,
                facts.num_kv_heads,
                layer_ids[facts.shares or facts.path],
                logit_cap=facts.soft_cap,
                sliding_window=facts.window,
                prefix=facts.path,
            )
            attention.has_sinks = facts.has_sinks
            modules[facts.path]._modules[SLOT] = AttentionSlot(
                attention,
                facts.head_dim,
                facts.v_head_dim,
                self._running,
                writes=facts.shares is None,
            )
        return tuple(specs)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
        get_embedding: bool = False,
    ) -> LogitsProcessorOutput:
        """Next-token logits of the rows that the batch wants.

        Args:
            input_ids: [T] int64.
            positions: [T] int64, of each token in its own sequence.
            forward_batch: whose tokens these are, and the cache.
            input_embeds: [T, hidden_size], instead of the embedding of `input_ids`.
            pp_proxy_tensors: must be None.
            get_embedding: must be False.
        """
        refuse_pipeline_and_embedding(pp_proxy_tensors, get_embedding)
        tokens = {"input_ids": input_ids[None]}
        if input_embeds is not None:
            tokens = {"inputs_embeds": input_embeds[None]}
        position_ids = positions[None]
        if forward_batch.mrope_positions is not None:
            # One row where the three are equal, in decode steps.
            position_ids = forward_batch.mrope_positions.expand(3, -1)[:, None]
        with self._running.of(forward_batch, positions), self._context():
            output = self.inner(**tokens, position_ids=position_ids, **self._arguments)
        logits = logits_of(output)[0]
        if not self._has_head:
            logits = logits.index_select(0, forward_batch.logits_rows)
        return LogitsProcessorOutput(next_token_logits=logits.float())


class TransformersVisionModel(SeesImages, TransformersModel):
    """One that takes pictures; `pad_input_ids` and `get_image_feature` are the engine's.

    Args:
        inner, num_positions, **options: as for `TransformersModel`.
        image_processor: Hugging Face's own of the checkpoint.

    Attributes:
        has_mrope: whether positions have three rows.
        rope: has Hugging Face's `get_rope_index`; None where positions simply count.
    """

    pad_input_ids = staticmethod(pad_input_ids)

    def __init__(
        self, inner: nn.Module, num_positions: int | None, image_processor: Any, **options: Any
    ):
        found = learn_images(inner, image_processor, options["device"])
        super().__init__(
            inner,
            num_positions,
            keeps_layers=found.rope is not None,
            left=found.parts,
            **options,
        )
        self.watch(found)


def _leave_files(model: nn.Module) -> None:
    """Copies what is left in the mapped weight files, so that they are closed."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def load_unregistered(
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    room: int | None,
    quantization: str | None,
    context_length: int | None,
    trust_remote_code: bool,
    before_reading: Callable[[], Any] | None,
    model_class: type[nn.Module] | None = None,
) -> LoadedModel | None:
    """Loads a checkpoint by its Hugging Face class; None if there is none.

    Args: as those of `sglite.models.loader.load_model`; `names` are its architectures, and
        `model_class` is one of the caller's own.

    Raises: as `load_model`; also UnsupportedModelError for all that could not be right.
    """
    config = find_config(checkpoint, model_class, trust_remote_code=trust_remote_code)
    if config is None:
        return None
    model_class = model_class or find_class(
        checkpoint, names, config, trust_remote_code=trust_remote_code
    )
    if model_class is None:
        return None
    name = model_class.__name__
    if quantization is not None and quantization not in AT_LOAD:
        raise UnsupportedModelError(
            f"the weights are quantised ({quantization}), and {name} is run by Hugging Face's own "
            f"class, where that is not implemented: use a checkpoint in bfloat16, float16 or "
            f"float32"
        )
    limit = _limit(name, config, context_length)
    entries = {}
    for path in checkpoint.weight_files:
        with SafetensorsFile(path) as file:
            entries |= file.entries
    check_counts(config, entries, may_be_unused=True)
    refuse_vision(name, model_class, config)
    build = TransformersModel
    if takes_images(model_class, config):
        image_processor = read_image_processor(name, checkpoint.folder)
        build = partial(TransformersVisionModel, image_processor=image_processor)
    empty = build_empty(model_class, config)
    refuse_modules(name, empty)
    run_dtype = resolve_dtype(dtype, checkpoint, entries)
    if room is not None:
        needed = sum(parameter.numel() for parameter in empty.parameters()) * run_dtype.itemsize
        check_room(needed, device, room)
    inner = read_model(model_class, checkpoint, config, run_dtype)
    # Not earlier: transformers' modules must not be imported on two threads at once.
    if before_reading is not None:
        before_reading()
    model = build(inner, limit, shared=False, device=device, quantization=quantization).to(device)
    defaults = GenerationDefaults.from_generation_config(checkpoint.generation_config)
    return _loaded(
        model.requires_grad_(False), config, name, run_dtype, quantization, limit, defaults
    )


def load_module(
    module: nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    context_length: int | None = None,
) -> LoadedModel:
    """Takes a live Hugging Face module as it stands, sharing its parameters where they lie.

    Args:
        module: a causal language model with a config; it is left exactly as it is.
        dtype: "auto", or what the module's weights are.
        quantization: must be None.
        context_length: positions that may come up; None: what the config speaks of.

    Raises:
        UnsupportedModelError: it is no such module, or needs something that is not implemented.
        ConfigError: an argument would need other weights than the module's own.
    """
    name = type(module).__name__
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{name} has no Hugging Face config: a live module is a transformers causal language "
            f"model"
        )
    refuse_modules(name, module)
    limit = _limit(name, config, context_length)
    weights = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weights is None:
        raise UnsupportedModelError(f"{name} has no parameters")
    own_dtype = weights.dtype
    asked = str(dtype).removeprefix("torch.")
    if asked not in ("auto", str(own_dtype).removeprefix("torch.")):
        checks.refuse("dtype", asked, f"{own_dtype}, the live module's own", ConfigError)
    if quantization is not None:
        checks.refuse("quantization", quantization, "None for a live module", ConfigError)
    model = TransformersModel(share_module(module), limit, shared=True, device=weights.device)
    model.origin = Origin(module)
    generation_config = getattr(module, "generation_config", None)
    values = generation_config.to_diff_dict() if generation_config is not None else None
    defaults = GenerationDefaults.from_generation_config(values)
    return _loaded(model, config, name, own_dtype, None, limit, defaults)


def _limit(name: str, config: Any, context_length: int | None) -> int | None:
    """The longest context; refuses configs of models that cannot be run."""
    refuse_config(name, config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = refuse_rope(name, config, context_length) or limit
    if context_length is not None and limit is not None and context_length > limit:
        checks.refuse(
            "context_length", context_length, f"at most {limit}, the model's limit", ConfigError
        )
    return limit


def _loaded(
    model: TransformersModel,
    config: Any,
    name: str,
    dtype: torch.dtype,
    quantization: str | None,
    limit: int | None,
    defaults: GenerationDefaults,
) -> LoadedModel:
    text = config.get_text_config()
    return LoadedModel(
        model=model.eval(),
        config=text,
        whole_config=config,
        architecture=name,
        dtype=dtype,
        quantization=quantization,
        vocab_size=model.vocab_size,
        max_positions=limit,
        kv_layers=model.kv_layers,
        generation_defaults=defaults,
        end_token_ids=defaults.eos_token_ids or end_token_ids_of(text),
        can_be_batch_invariant=model.can_be_batch_invariant,
    )
