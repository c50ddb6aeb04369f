"""The same model in Hugging Face transformers, as the reference."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sglite.interface.errors import CheckpointError, UnsupportedModelError
from sglite.models.checkpoint import Checkpoint

_NAMED = 5  # tensors that a message lists


class Reference:
    """A Hugging Face model with eager attention, which is asked for logits.

    Args:
        model: gives an object with `logits` for token ids [1, n].
        device: where it lies.
    """

    def __init__(self, model: nn.Module, device: torch.device | str):
        self.model = model
        self.device = torch.device(device)

        # A module of the caller's own need not know what a cache is.
        self._options = {"use_cache": False} if isinstance(model, PreTrainedModel) else {}

    @cached_property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return self.logits([0]).shape[-1]

    def logits(self, token_ids: list[int]) -> Tensor:
        """Next-token logits of every position, [n, vocabulary] float32 on the CPU."""
        ids = torch.tensor([token_ids], device=self.device)
        with torch.inference_mode(), eager_attention(self.model):
            return self.model(ids, **self._options).logits[0].float().cpu()

    def continue_greedily(self, token_ids: list[int], count: int) -> list[int]:
        """The most probable tokens that follow, one after the other, end of text or not."""
        ids = list(token_ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :]


def load_reference(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    trust_remote_code: bool = False,
) -> Reference:
    """The checkpoint in Hugging Face's own class, which its `config.json` chooses.

    Raises:
        UnsupportedModelError: transformers has no class for it, or it is packed.
        CheckpointError: transformers cannot load it, or would leave weights at random values.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    advice = (
        "pass reference= with a torch module that computes the same: called with token ids [1, n] "
        "it gives an object with logits [1, n, vocabulary]"
    )
    if checkpoint.is_packed:
        raise UnsupportedModelError(
            f"{checkpoint.name} is packed, which Hugging Face transformers cannot read: compare "
            f"the checkpoint that it was made of, or {advice}"
        )
    try:
        AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"Hugging Face transformers has no class for {checkpoint.name} "
            f"(model_type={checkpoint.config.get('model_type')!r}), so there is nothing to compare "
            f"with: {advice}"
        ) from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the class raises on a file that it cannot read
        raise CheckpointError(
            f"Hugging Face transformers cannot load {checkpoint.name}: {error}; {advice}"
        ) from error
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise CheckpointError(
                f"Hugging Face transformers finds {kind.replace('_', ' ')} in {checkpoint.name} "
                f"and would leave those weights at random: {', '.join(names[:_NAMED])}; {advice}"
            )
    return Reference(model.eval().to(device), device)


def reference_of(module: nn.Module, dtype: torch.dtype, device: torch.device | str) -> Reference:
    """A live module as the reference: itself, or a copy where its dtype or device is another.

    Buffers keep their dtype: a model chose it for them.
    """
    parameters = list(module.parameters())
    device = torch.device(device)
    if any(p.dtype != dtype or p.device.type != device.type for p in parameters):
        module = copy.deepcopy(module).to(device)
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        module.eval()
    return Reference(module, device)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Has a model use eager attention and evaluation mode, and puts back what was there.

    Hugging Face's other kinds of attention ignore soft caps.
    """
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    training = [module for module in model.modules() if module.training]
    changes = before not in (None, "eager") and hasattr(model, "set_attn_implementation")
    if changes:
        model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        if changes:
            model.set_attn_implementation(before)
        for module in training:
            module.training = True
