"""From hidden states to logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglite import ops
from sglite.layers.embedding import Embedding, LMHead
from sglite.layers.forward_batch import ForwardBatch, take_rows


@dataclass(slots=True)
class LogitsProcessorOutput:
    """What a model's forward returns. A model may change it before it does."""

    next_token_logits: Tensor  # [R, vocab_size] float32


class LogitsProcessor(nn.Module):
    """Applies the output head to the rows whose logits are wanted.

    Args:
        config: where it has `final_logit_softcapping`, logits become
            `cap * tanh(logits / cap)` (Gemma 2).
        logit_scale: factor on the logits, before the cap (Cohere).
    """

    def __init__(self, config: Any = None, logit_scale: float | None = None):
        super().__init__()
        self.logit_cap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = logit_scale

    def forward(
        self,
        input_ids: Tensor,
        hidden_states: Tensor,
        lm_head: nn.Module,
        forward_batch: ForwardBatch,
    ) -> LogitsProcessorOutput:
        """Gives the logits of `forward_batch.logits_rows`, [R, vocab_size] float32.

        Args:
            input_ids: [T]; not used.
            hidden_states: [T, hidden_size], or [R, hidden_size] of the wanted rows alone.
            lm_head: an `LMHead`, any module from hidden states to logits, or a tied `Embedding`.
            forward_batch: says which rows.
        """
        hidden_states = take_rows(hidden_states, forward_batch.logits_rows)
        out = None
        if hidden_states.is_cpu and (type(lm_head) is LMHead or isinstance(lm_head, Embedding)):
            shape = (hidden_states.shape[0], lm_head.matrix.shape[0])
            out = forward_batch.spare_memory.empty(shape, torch.float32)
        if isinstance(lm_head, Embedding):
            logits = ops.linear(
                hidden_states,
                lm_head.matrix.stored,
                out_dtype=torch.float32,
                out=out,
                batch_invariant=lm_head.batch_invariant,
            )
        elif out is not None:
            logits = lm_head(hidden_states, out)
        else:
            logits = lm_head(hidden_states).float()
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = ops.soft_cap(logits, self.logit_cap)
        return LogitsProcessorOutput(next_token_logits=logits)
