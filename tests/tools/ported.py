"""Llama as SGLang's model files are written: residuals handed on apart, parts named otherwise.

Registered as "Ported", and with an error in its last layer as "Ported-epsilon" and "Ported-scale".
"""

from torch import nn

from sglite import register
from sglite.layers import (
    Embedding,
    GateUpLinear,
    Linear,
    LMHead,
    LogitsProcessor,
    QKVLinear,
    RadixAttention,
    RMSNorm,
    SiluAndMul,
    get_rope,
)


class Attention(nn.Module):
    def __init__(self, config, layer_id):
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = config.hidden_size // heads
        self.q_size, self.kv_size = heads * head_dim, kv_heads * head_dim
        self.qkv_proj = QKVLinear(config.hidden_size, head_dim, heads, kv_heads, bias=False)
        self.o_proj = Linear(self.q_size, config.hidden_size, bias=False)
        base = config.rope_parameters["rope_theta"]
        self.rotary = get_rope(head_dim, head_dim, config.max_position_embeddings, base)
        self.inner = RadixAttention(heads, head_dim, head_dim**-0.5, kv_heads, layer_id)

    def forward(self, positions, hidden_states, forward_batch):
        qkv = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary(positions, q, k)
        return self.o_proj(self.inner(q, k, v, forward_batch))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = GateUpLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = SiluAndMul()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config, layer_id):
        super().__init__()
        self.self_attn = Attention(config, layer_id)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions, hidden_states, forward_batch, residual):
        if residual is None:
            residual = hidden_states.clone()
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, positions, forward_batch):
        hidden_states, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, forward_batch, residual)
        return self.norm(hidden_states, residual)[0]


@register("Ported")
class Ported(nn.Module):
    stacked_params = {  # noqa: RUF012
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config, quant_config=None, prefix=""):
        super().__init__()
        self.model = Model(config)
        self.lm_head = LMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config)

    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        hidden_states = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


def port(name, change):
    """Registers a `Ported` whose last layer is changed."""

    @register(name)
    class Changed(Ported):
        def __init__(self, config, quant_config=None, prefix=""):
            super().__init__(config, quant_config, prefix)
            change(self.model.layers[-1])


def change_epsilon(layer):
    layer.post_attention_layernorm.eps = 1e-3


def change_scale(layer):
    layer.self_attn.inner.scaling *= 1.05


port("Ported-epsilon", change_epsilon)
port("Ported-scale", change_scale)
