"""Llama, its positive logits replaced by their square roots."""

import torch
from transformers import LlamaConfig

from sglite.layers import (
    ForwardBatch,
    LogitsProcessorOutput,
    PPProxyTensors,
    QuantizationConfig,
)
from sglite.models.llama import LlamaForCausalLM


class LlamaWrapper(LlamaForCausalLM):
    """Serves checkpoints whose `config.json` has "architectures": ["LlamaWrapper"]."""

    def __init__(
        self,
        config: LlamaConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config=config, quant_config=quant_config, prefix=prefix)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        pp_proxy_tensors: PPProxyTensors | None = None,
        input_embeds: torch.Tensor | None = None,
        get_embedding: bool = False,
    ) -> LogitsProcessorOutput:
        """As `LlamaForCausalLM.forward`."""
        hidden_states = self.model(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors=pp_proxy_tensors
        )
        res = self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)
        logits = res.next_token_logits
        res.next_token_logits = torch.where(logits > 0, logits.sqrt(), logits)
        return res


EntryClass = LlamaWrapper
