"""A model of one's own: Llama with the square root of its positive logits.

Written in the shape in which SGLang's models are written, optional arguments included, so that it
shows what a file ported from there looks like. `python examples/llama_wrapper.py` runs it on the
checkpoint that ships, by both ways: named in the call, and named in `config.json`.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

import sglite
from sglite import LLM, register
from sglite.layers import (
    ForwardBatch,
    LogitsProcessorOutput,
    PPProxyTensors,
    QuantizationConfig,
)
from sglite.models.llama import LlamaForCausalLM


@register("LlamaWrapper")
class LlamaWrapper(LlamaForCausalLM):
    """Llama, its positive logits replaced by their square roots."""

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
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        pp_proxy_tensors: PPProxyTensors | None = None,
        input_embeds: Tensor | None = None,
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


# Where a package of models is scanned, this is what it is scanned for.
EntryClass = LlamaWrapper


def main() -> None:
    question = "What is 17 + 25?"
    shipped = Path(sglite.__file__).parent / "checkpoints" / "demo"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(shipped, Path(folder) / "llama_ckpt"))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaWrapper"]}))
        for title, llm in {
            "plain": LLM("demo"),
            "named in the call": LLM("demo", architecture="LlamaWrapper"),
            "named in config.json": LLM(copy),
        }.items():
            with llm:
                output = llm.generate(question, temperature=0, logprobs=1)
                first = output.logprobs[0][output.token_ids[0]].logprob
                print(f"{title:22} {output.text.strip():14} first token's logprob {first:.4f}")


if __name__ == "__main__":
    main()
