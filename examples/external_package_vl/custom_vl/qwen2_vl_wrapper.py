"""Qwen2-VL, its positive logits replaced by their square roots."""

import torch
from transformers import Qwen2VLConfig

from sglite.layers import ForwardBatch, LogitsProcessorOutput, PPProxyTensors, QuantizationConfig
from sglite.models.qwen2_vl import Qwen2VLForConditionalGeneration


class CustomQwen2VL(Qwen2VLForConditionalGeneration):
    """Serves checkpoints whose `config.json` has "architectures": ["CustomQwen2VL"]."""

    def __init__(
        self,
        config: Qwen2VLConfig,
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
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
        get_embedding: bool = False,
    ) -> LogitsProcessorOutput:
        """As `Qwen2VLForConditionalGeneration.forward`."""
        res = super().forward(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors, get_embedding
        )
        logits = res.next_token_logits
        res.next_token_logits = torch.where(logits > 0, logits.sqrt(), logits)
        return res


EntryClass = CustomQwen2VL
