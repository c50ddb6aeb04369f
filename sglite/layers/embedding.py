"""Token embedding and output head."""

import torch
from torch import Tensor

from sglite import ops
from sglite.layers.linear import Linear
from sglite.layers.porting import QuantizationConfig, refuse_quantization
from sglite.layers.weight import WeightModule


class Embedding(WeightModule):
    """`y[i] = weight[ids[i]]`, times `scale` where there is one.

    The table is packed like a linear layer's weight, since a tied output head reads the same one.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: width of a row.
        quant_config: must be None.
        prefix: module path, for messages.
        scale: factor on the rows; rounded to their dtype first, as in Hugging Face (Gemma). An
            output head that reads the same table does not see it.

    Attributes:
        batch_invariant: as for `Linear`, where this table is also the output head.
    """

    batch_invariant: bool = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        scale: float | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, prefix)
        refuse_quantization(quant_config, prefix)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scale = scale

    def forward(self, input_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, embedding_dim]. Raises IndexError for an id outside the table."""
        rows = ops.embedding(input_ids, self.matrix.stored)
        if self.scale is None:
            return rows
        return rows.mul_(torch.tensor(self.scale, dtype=rows.dtype, device="cpu").item())

    def extra_repr(self) -> str:
        """The part of the module's repr in brackets."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LMHead(Linear):
    """The linear layer from hidden states to logits, which stay float32.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: width of a hidden state.
        bias, quant_config, prefix: as for `Linear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__(embedding_dim, num_embeddings, bias, quant_config, prefix)

    def tie_weights(self, embedding: Embedding) -> None:
        """Uses an embedding's table as the weight from now on; neither has a copy."""
        if embedding.matrix.shape != self.matrix.shape:
            raise ValueError(
                f"tie_weights: expected an embedding {list(self.matrix.shape)}, got "
                f"{list(embedding.matrix.shape)}"
            )
        self.matrix = embedding.matrix

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, embedding_dim] -> [R, num_embeddings] float32, not rounded to the dtype of `x`.

        Args:
            x: hidden states.
            out: where to write the logits; None: into a new tensor.
        """
        return ops.linear(
            x,
            self.matrix.stored,
            self.bias,
            out_dtype=torch.float32,
            out=out,
            batch_invariant=self.batch_invariant,
        )
