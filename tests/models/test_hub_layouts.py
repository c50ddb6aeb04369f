"""Checkpoints as they lie on the Hub: config.json and tensor names of older transformers versions.

Each entry of `HUB` has the keys of a real model's file, none left out that a model could read and
none added, with small numbers in place of the large ones.
"""

import json
import random
from typing import Any

import pytest
from safetensors import safe_open

from tests.checkpoints import VOCAB_SIZE, hugging_face, hugging_face_logits, make_checkpoint
from tests.forward import assert_near
from tests.models.loading import load, logits_of

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": VOCAB_SIZE,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DECODER = {
    **_SIZES,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
}
_GEMMA = {
    **_DECODER,
    "attention_bias": False,
    "head_dim": 24,
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 40,
    "rms_norm_eps": 1e-6,
    "sliding_window": 17,
}
_GLM = {
    **_DECODER,
    "attention_bias": True,
    "eos_token_id": [1, 2, 3],
    "head_dim": 16,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_LONGROPE = {
    "long_factor": [1.0, 2.0, 4.5, 9.0],
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "type": "longrope",
}

#: Per model of the Hub: of `tests.checkpoints.CONFIGS` what its weights are drawn for, overrides of
#: that, `config.json`, and some of the names that its tensors have.
HUB: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "huggyllama/llama-7b": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": None},
        {
            **_SIZES,
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "max_sequence_length": 512,
            "model_type": "llama",
            "pad_token_id": 0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        ["model.layers.2.self_attn.q_proj.weight", "lm_head.weight"],
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama-tied",
        {},
        {
            **_DECODER,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 16,
            "mlp_bias": False,
            "model_type": "llama",
            "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        ["model.embed_tokens.weight"],
    ),
    "mistralai/Mistral-7B-v0.1": (
        "mistral",
        {},
        {
            **_DECODER,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": 17,
            "tie_word_embeddings": False,
        },
        ["model.layers.0.mlp.gate_proj.weight"],
    ),
    "mistralai/Mixtral-8x7B-v0.1": (
        "mixtral",
        {},
        {
            **_DECODER,
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_local_experts": 5,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        [
            "model.layers.0.block_sparse_moe.experts.4.w1.weight",
            "model.layers.0.block_sparse_moe.experts.0.w2.weight",
            "model.layers.0.block_sparse_moe.experts.0.w3.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ],
    ),
    "Qwen/Qwen2-1.5B": (
        "qwen2",
        {},
        {
            **_DECODER,
            "architectures": ["Qwen2ForCausalLM"],
            "max_window_layers": 2,
            "model_type": "qwen2",
            "sliding_window": 17,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        ["model.layers.0.self_attn.q_proj.bias"],
    ),
    "Qwen/Qwen3-4B": (
        "qwen3",
        {},
        {
            **_DECODER,
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 32,
            "max_window_layers": 3,
            "model_type": "qwen3",
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        ["model.layers.0.self_attn.q_norm.weight"],
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        "qwen2-moe",
        {},
        {
            **_DECODER,
            **_EXPERTS,
            "architectures": ["Qwen2MoeForCausalLM"],
            "max_window_layers": 2,
            "model_type": "qwen2_moe",
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 56,
            "sliding_window": 17,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        [
            "model.layers.0.mlp.experts.6.down_proj.weight",
            "model.layers.0.mlp.shared_expert.up_proj.weight",
            "model.layers.0.mlp.shared_expert_gate.weight",
        ],
    ),
    "Qwen/Qwen3-30B-A3B": (
        "qwen3-moe",
        {},
        {
            **_DECODER,
            **_EXPERTS,
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "head_dim": 32,
            "max_window_layers": 3,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "rope_scaling": None,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        ["model.layers.0.mlp.experts.6.gate_proj.weight", "model.layers.0.mlp.gate.weight"],
    ),
    "google/gemma-2-2b": (
        "gemma2",
        {},
        {
            **_GEMMA,
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": 3.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 10.0,
            "hidden_act": "gelu_pytorch_tanh",
            "model_type": "gemma2",
        },
        ["model.layers.0.pre_feedforward_layernorm.weight"],
    ),
    "google/gemma-3-1b-it": (
        "gemma3",
        {},
        {
            **_GEMMA,
            "architectures": ["Gemma3ForCausalLM"],
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 32,
            "model_type": "gemma3_text",
            "rope_local_base_freq": 100,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window_pattern": 2,
        },
        ["model.layers.0.self_attn.q_norm.weight"],
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        "phi3",
        {},
        {
            **_DECODER,
            "architectures": ["Phi3ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "embd_pdrop": 0.0,
            "model_type": "phi3",
            "original_max_position_embeddings": 512,
            "pad_token_id": 2,
            "resid_pdrop": 0.0,
            "rope_scaling": None,
            "sliding_window": 17,
            "tie_word_embeddings": False,
        },
        [
            "model.layers.0.self_attn.qkv_proj.weight",
            "model.layers.0.mlp.gate_up_proj.weight",
        ],
    ),
    "microsoft/Phi-4-mini-instruct": (
        "phi3-long",
        {"tie_word_embeddings": True},
        {
            **_DECODER,
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
            "model_type": "phi3",
            "original_max_position_embeddings": 160,
            "pad_token_id": 2,
            "partial_rotary_factor": 0.5,
            "resid_pdrop": 0.0,
            "rope_scaling": _LONGROPE,
            "sliding_window": 512,
            "tie_word_embeddings": True,
        },
        ["model.layers.0.self_attn.qkv_proj.weight"],
    ),
    "allenai/OLMo-2-1124-7B": (
        "olmo2",
        {},
        {
            **_DECODER,
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "model_type": "olmo2",
            "pad_token_id": 2,
            "rope_scaling": None,
            "tie_word_embeddings": False,
        },
        ["model.layers.0.post_feedforward_layernorm.weight"],
    ),
    "ibm-granite/granite-3.1-2b-instruct": (
        "granite",
        {"tie_word_embeddings": True},
        {
            **_DECODER,
            "architectures": ["GraniteForCausalLM"],
            "attention_bias": False,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 12.0,
            "logits_scaling": 3.0,
            "mlp_bias": False,
            "model_type": "granite",
            "pad_token_id": 0,
            "residual_multiplier": 0.22,
            "rope_scaling": None,
            "tie_word_embeddings": True,
        },
        ["model.norm.weight"],
    ),
    "zai-org/glm-4-9b-chat-hf": (
        "glm",
        {},
        {**_GLM, "architectures": ["GlmForCausalLM"], "model_type": "glm"},
        ["model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.self_attn.q_proj.bias"],
    ),
    "zai-org/GLM-4-9B-0414": (
        "glm4",
        {"attention_bias": True, "tie_word_embeddings": False},
        {
            **_GLM,
            "architectures": ["Glm4ForCausalLM"],
            "head_dim": 24,
            "model_type": "glm4",
            "partial_rotary_factor": 0.5,
        },
        ["model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.post_mlp_layernorm.weight"],
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        "smollm3",
        {},
        {
            **_DECODER,
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": False,
            "layer_types": ["full_attention"] * 3,
            "max_window_layers": 3,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 0, 1],
            "pad_token_id": 2,
            "pretraining_tp": 2,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        ["model.layers.0.mlp.up_proj.weight"],
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": (
        "cohere2",
        {},
        {
            **{key: value for key, value in _DECODER.items() if key != "rms_norm_eps"},
            "architectures": ["Cohere2ForCausalLM"],
            "attention_bias": False,
            "cache_implementation": "hybrid",
            "head_dim": 16,
            "layer_norm_eps": 1e-5,
            "layer_switch": 2,
            "logit_scale": 0.25,
            "model_type": "cohere2",
            "order_of_interleaved_layers": "local_attn_first",
            "pad_token_id": 0,
            "position_embedding_type": "rope_gptj",
            "rope_scaling": None,
            "rotary_pct": 1.0,
            "sliding_window": 17,
            "sliding_window_pattern": 2,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": True,
        },
        ["model.layers.0.input_layernorm.weight"],
    ),
    "bigcode/starcoder2-3b": (
        "starcoder2",
        {},
        {
            **{key: value for key, value in _DECODER.items() if key != "rms_norm_eps"},
            "architectures": ["Starcoder2ForCausalLM"],
            "activation_function": "gelu",
            "attention_softmax_in_fp32": True,
            "embedding_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-5,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-5,
            "norm_type": "layer_norm",
            "residual_dropout": 0.0,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "sliding_window": 17,
            "use_bias": True,
        },
        ["model.layers.0.mlp.c_fc.bias", "model.layers.0.mlp.c_proj.weight"],
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_checkpoint_as_on_the_hub(name, tmp_path):
    base, overrides, config, tensors = HUB[name]
    make_checkpoint(tmp_path, base, **overrides)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(tensors) <= set(file.keys())
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    draw = random.Random(0)
    token_ids = [draw.randrange(VOCAB_SIZE) for _ in range(100)]
    expected = hugging_face_logits(hugging_face(tmp_path), token_ids)
    assert_near(logits_of(load(tmp_path), token_ids), expected)
