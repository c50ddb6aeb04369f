"""The parts that models are built from."""

from sglite.layers.attention import RadixAttention, SelfAttention
from sglite.layers.decoder import DecoderLayer, DecoderModel
from sglite.layers.embedding import Embedding, LMHead
from sglite.layers.experts import Router, SparseMLP
from sglite.layers.forward_batch import ForwardBatch
from sglite.layers.linear import GateUpLinear, Linear, QKVLinear, StackedLinear
from sglite.layers.logits import LogitsProcessor, LogitsProcessorOutput
from sglite.layers.mlp import GatedMLP, GeluAndMul, PlainMLP, SiluAndMul
from sglite.layers.norm import LayerNorm, RMSNorm
from sglite.layers.porting import PPProxyTensors, QuantizationConfig, add_prefix
from sglite.layers.rotary import RotaryEmbedding, get_rope, rope_from_config

__all__ = [
    "DecoderLayer",
    "DecoderModel",
    "Embedding",
    "ForwardBatch",
    "GateUpLinear",
    "GatedMLP",
    "GeluAndMul",
    "LMHead",
    "LayerNorm",
    "Linear",
    "LogitsProcessor",
    "LogitsProcessorOutput",
    "PPProxyTensors",
    "PlainMLP",
    "QKVLinear",
    "QuantizationConfig",
    "RMSNorm",
    "RadixAttention",
    "RotaryEmbedding",
    "Router",
    "SelfAttention",
    "SiluAndMul",
    "SparseMLP",
    "StackedLinear",
    "add_prefix",
    "get_rope",
    "rope_from_config",
]
