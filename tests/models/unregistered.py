"""Small checkpoints of architectures that have no file of their own."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.checkpoints import VOCAB_SIZE, make_tokenizer

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

# The last two of five layers read keys and values of the layers before them.
_SHARED_KV = {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", *(["sliding_attention", "full_attention"] * 2)],
    "sliding_window": 9,
    "activation_sparsity_pattern": [0.0] * 5,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "laurel_rank": 8,
}

_LONGCAT = {
    **_MLA,
    "num_layers": 2,
    "head_dim": 8,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 2,
    "zero_expert_num": 2,
}

#: Per config class what is special about it, against `_SMALL`.
RUN: dict[str, dict[str, Any]] = {
    "GPT2Config": _GPT2,
    "GPTBigCodeConfig": _GPT2,
    "GPTNeoXConfig": {"num_key_value_heads": 4},
    "GPTJConfig": {**_GPT2, "rotary_dim": 8},
    "CodeGenConfig": {**_GPT2, "rotary_dim": 8},
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "BioGptConfig": {},
    "PhiConfig": {"partial_rotary_factor": 0.5},
    "StableLmConfig": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "GemmaConfig": {"head_dim": 16},
    "Gemma2Config": {"head_dim": 16, **_WINDOWED, "query_pre_attn_scalar": 24},
    "Gemma3TextConfig": {"head_dim": 16, **_WINDOWED},
    "OlmoConfig": {"clip_qkv": 2.0},
    "Olmo2Config": {},
    "Olmo3Config": {**_WINDOWED},
    "OlmoeConfig": {**_MOE},
    "GraniteConfig": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "GraniteMoeConfig": {**_MOE, "logits_scaling": 3.0},
    "MixtralConfig": {**_MOE, "sliding_window": 11},
    "Qwen2MoeConfig": {**_MOE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "Qwen3MoeConfig": {**_MOE, "moe_intermediate_size": 32, "head_dim": 16},
    "CohereConfig": {"logit_scale": 0.3, "use_qk_norm": True},
    "Cohere2Config": {"logit_scale": 0.3, **_WINDOWED},
    "Starcoder2Config": {"sliding_window": 13},
    "GlmConfig": {"head_dim": 12},
    "Glm4Config": {"head_dim": 12},
    "SmolLM3Config": {"no_rope_layers": [1, 0]},
    "NemotronConfig": {},
    "PersimmonConfig": {},
    "HeliumConfig": {"head_dim": 12},
    "MinistralConfig": {"head_dim": 12, **_WINDOWED},
    "Ernie4_5Config": {"head_dim": 12},
    "SeedOssConfig": {"head_dim": 12},
    "ApertusConfig": {},
    "ArceeConfig": {"head_dim": 12},
    "Exaone4Config": {**_WINDOWED},
    "HunYuanDenseV1Config": {"head_dim": 12},
    "BitNetConfig": {},
    "DeepseekV2Config": {**_MLA, "topk_method": "greedy"},
    "DeepseekV3Config": _MLA,
    "PhimoeConfig": {**_MOE},
    "Phi3Config": {},
    "GptOssConfig": {**_MOE, "head_dim": 12, **_WINDOWED},  # attention sinks
    "Gemma3nTextConfig": _SHARED_KV,
    "LongcatFlashConfig": _LONGCAT,  # attends twice in a layer, and has experts that do nothing
    "GraniteMoeSharedConfig": {**_MOE, "shared_intermediate_size": 32},
}


#: What cannot be right: config class, what is special about it, and what the message says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mamba": ("MambaConfig", {}, "state-space"),
    "Jamba": ("JambaConfig", {"num_experts": 2, "use_mamba_kernels": False}, "state"),
    "Bamba": ("BambaConfig", {"mamba_n_heads": 8, "mamba_d_head": 12}, "state"),
    "FalconH1": ("FalconH1Config", {"mamba_d_ssm": 96, "mamba_n_heads": 8}, "state"),
    "Qwen3Next": ("Qwen3NextConfig", {**_MOE, "moe_intermediate_size": 32}, "state"),
    "RecurrentGemma": ("RecurrentGemmaConfig", {"lru_width": 48}, "state"),
    "Lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "'conv'"),
    "MiniMax": ("MiniMaxConfig", _MOE, "state"),
    "Bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, "computes attention itself"),
    "Falcon": ("FalconConfig", {}, "computes attention itself"),
    "GPTNeo": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "computes attention itself",
    ),
    "Llama4": ("Llama4TextConfig", {**_MOE, "head_dim": 12}, "chunk"),
    "DiffLlama": ("DiffLlamaConfig", {}, "attends twice"),
    "Doge": ("DogeConfig", {}, "mask of the model's own making"),
    "T5": ("T5Config", {"d_model": 48, "num_layers": 2}, "encoder-decoder"),
}


def make_model(config: Any, model_class: type[nn.Module] | None = None) -> nn.Module:
    """A model with weights drawn so that logits differ, with eager attention."""
    config._attn_implementation = "eager"
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        if model_class is None and not config.is_encoder_decoder
        else transformers.AutoModelForSeq2SeqLM.from_config(config)
        if model_class is None
        else model_class(config)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(draw / math.sqrt(parameter.shape[-1]))
            elif "norm" in name or "ln" in name:
                parameter.copy_(parameter + 0.2 * draw)
            else:
                parameter.copy_(0.3 * draw)
    return model.eval()


def make_config(name: str, **overrides: Any) -> Any:
    """The config of an entry of `RUN`, or of a class that is not in it."""
    config_class = getattr(transformers, name)
    special = RUN.get(name, {})
    base = {} if "n_embd" in special else _SMALL
    return config_class(**{**base, **special, **overrides})


def save(model: nn.Module, folder: Path) -> Path:
    """Writes a checkpoint with a tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
