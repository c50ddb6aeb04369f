"""Any causal language model of Hugging Face's, run by its own class over the paged cache.

For architectures that have no file here. The class's own code runs, on the flattened tokens of the
whole batch; its attention is `RadixAttention`, its linear layers, norms and output head the
library's. What its layers need is learned by `transformers_probe`; what cannot be right is refused
by name at load.
"""

import weakref
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglite.cache.kv_pool import LayerSpec
from sglite.interface.errors import ConfigError
from sglite.layers.attention import RadixAttention
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.logits import LogitsProcessorOutput
from sglite.layers.porting import PPProxyTensors, refuse_pipeline_and_embedding
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
from sglite.models.transformers_parts import InvariantLinears
from sglite.models.transformers_probe import forward_arguments, logits_of, probe
from sglite.models.transformers_recorder import AttentionFacts
from sglite.models.transformers_vision import SeesImages, learn_images
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
            inner.to(device)  # where what was fused is already
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
