"""The decoder: layers of attention and MLP between embedding and final norm."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sglite.layers.attention import SelfAttention
from sglite.layers.composite import is_plain, runs_only
from sglite.layers.embedding import Embedding
from sglite.layers.forward_batch import ForwardBatch, take_rows
from sglite.layers.logits import LogitsProcessor
from sglite.layers.mlp import GatedMLP
from sglite.layers.norm import RMSNorm
from sglite.layers.porting import refuse_pipeline_and_embedding
from sglite.layers.whole_layers import find_whole, find_whole_run, run_whole


class DecoderLayer(nn.Module):
    """`x += self_attn(input_layernorm(x))`, then `x += mlp(post_attention_layernorm(x))`.

    Args:
        self_attn: `(positions, hidden_states, forward_batch)` -> [T, hidden_size].
        mlp: `(hidden_states)` -> [T, hidden_size].
        input_layernorm: in front of attention.
        post_attention_layernorm: in front of the MLP.
    """

    def __init__(
        self,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ):
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: ForwardBatch
    ) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the input stays as it is."""
        whole = find_whole(self, hidden_states)
        if whole is not None:
            return run_whole([whole], positions, hidden_states, forward_batch)
        attention, norm = self.self_attn, self.input_layernorm
        if is_plain(attention, SelfAttention):
            hidden_states = attention.forward(
                positions, hidden_states, forward_batch, residual=hidden_states, norm=norm
            )
        else:
            out = attention(positions, norm(hidden_states), forward_batch)
            hidden_states = hidden_states + out
        mlp, norm = self.mlp, self.post_attention_layernorm
        if is_plain(mlp, GatedMLP):
            return mlp.forward(hidden_states, residual=hidden_states, norm=norm)
        return hidden_states + mlp(norm(hidden_states))


def run_layers(
    layers: nn.ModuleList,
    positions: Tensor,
    hidden_states: Tensor,
    forward_batch: ForwardBatch,
    rows: Tensor | None = None,
) -> Tensor:
    """`hidden_states = layer(positions, hidden_states, forward_batch)` for each layer.

    Whole layers that follow each other are run in one call, with the same bits.

    Args:
        layers: the layers.
        positions: [T] int64, or [3, T] for M-RoPE.
        hidden_states: [T, hidden_size].
        forward_batch: whose tokens these are, and the cache.
        rows: [R] int64, ascending, the rows to give: whole layers compute no more than that. None:
            all.

    Returns:
        [R, hidden_size], or [T, hidden_size] without `rows`.
    """
    run = find_whole_run(layers, hidden_states, DecoderLayer.forward)
    if run is not None:
        return run.run(positions, hidden_states, forward_batch, rows)
    together = []
    for layer in layers:
        is_plain_layer = runs_only(layer, DecoderLayer.forward)
        whole = find_whole(layer, hidden_states) if is_plain_layer else None
        if whole is not None:
            together.append(whole)
            continue
        if together:
            hidden_states = run_whole(together, positions, hidden_states, forward_batch)
            together = []
        hidden_states = layer(positions, hidden_states, forward_batch)
    if together:
        hidden_states = run_whole(together, positions, hidden_states, forward_batch)
    return hidden_states if rows is None else take_rows(hidden_states, rows)


class DecoderModel(nn.Module):
    """Everything below the output head.

    Args:
        embed_tokens: token ids to hidden states.
        layers: `(positions, hidden_states, forward_batch)` -> hidden states, each.
        norm: behind the last layer.
    """

    def __init__(self, embed_tokens: Embedding, layers: Iterable[nn.Module], norm: nn.Module):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: Any = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states behind the final norm, [T, hidden_size], or [R, hidden_size] with `rows`.

        Args:
            input_ids: [T] int64.
            positions: [T] int64, of each token in its own sequence; or [3, T] for M-RoPE.
            forward_batch: whose tokens these are, and the cache.
            input_embeds: [T, hidden_size], instead of the embedding of `input_ids`.
            pp_proxy_tensors: must be None.
            rows: [R] int64, ascending, the tokens to give; the norm sees no others. None: all.
        """
        refuse_pipeline_and_embedding(pp_proxy_tensors, False)
        hidden_states = input_embeds
        if hidden_states is None:
            hidden_states = forward_batch.with_images(self.embed_tokens(input_ids))
        hidden_states = run_layers(self.layers, positions, hidden_states, forward_batch, rows)
        return self.norm(hidden_states)


def run_for_logits(
    model: nn.Module,
    logits_processor: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    forward_batch: ForwardBatch,
    input_embeds: Tensor | None,
) -> Tensor:
    """`model(input_ids, positions, forward_batch, input_embeds)` for this logits processor.

    [R, hidden_size], the rows whose logits are wanted, where nobody can tell: the model's end and
    the processor do what the library's do, and nothing else. Elsewhere [T, hidden_size].
    """
    arguments = (input_ids, positions, forward_batch, input_embeds)
    if (
        runs_only(model, DecoderModel.forward)
        and is_plain(model.norm, RMSNorm)
        and is_plain(logits_processor, LogitsProcessor)
    ):
        return model.forward(*arguments, rows=forward_batch.logits_rows)
    return model(*arguments)
