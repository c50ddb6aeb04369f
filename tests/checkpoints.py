"""Small real checkpoints with random weights, and Hugging Face as the oracle for them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

import sglite
from tests.cancelling import let_sums_cancel

VOCAB_SIZE = 384
# What the tokenizer is trained on, which decides the ids of every prompt that is a text.
_TEXT = """
What is 17 + 25? The capital of France is Paris, and the seas around it are cold. A sentence that
is long enough has the same words more than once: the words of the others, and of those that come
after them. Numbers are words as well: 1, 2, 3, 10, 100, 1000. Whoever reads this line has read
the one before, and there is another one below. def forward(self, hidden_states): return self.norm
"""
#: The checkpoint that ships.
DEMO_FOLDER = Path(sglite.__file__).parent / "checkpoints" / "demo"
_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_NARROW = {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}
_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}

#: Per name the config class and what is special about it, against `_SMALL`.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-24": ("LlamaConfig", {"head_dim": 24, "hidden_size": 96, "num_attention_heads": 6}),
    "llama-head-80": ("LlamaConfig", {"head_dim": 80, "intermediate_size": 150}),
    "mistral": ("MistralConfig", {"sliding_window": 17}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3Config", {"head_dim": 40, "attention_bias": True}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 24,
            "sliding_window": 17,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma2-plain": (
        "Gemma2Config",
        {
            **_NARROW,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 9,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "gemma3-cap": (
        "Gemma3TextConfig",
        {**_NARROW, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    ),
    "phi3": ("Phi3Config", {"sliding_window": 17}),
    "phi3-partial": (
        "Phi3Config",
        {"rope_parameters": {"partial_rotary_factor": 0.75}, "tie_word_embeddings": True},
    ),
    "phi3-long": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 160,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 4.5, 9.0],
            },
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo2-bias": ("Olmo2Config", {"attention_bias": True, "tie_word_embeddings": True}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "glm4": ("Glm4Config", {"head_dim": 24, "attention_bias": False, "tie_word_embeddings": True}),
    "glm4-bias": ("Glm4Config", {"head_dim": 32, "num_key_value_heads": 1}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": (
        "SmolLM3Config",
        {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
        },
    ),
    "granite-biases": (
        "GraniteConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "cohere2": (
        "Cohere2Config",
        {
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "cohere2-bias": ("Cohere2Config", {"attention_bias": True, "tie_word_embeddings": False}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 17}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "sliding_window": 17}),
    "mixtral-one": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 56}),
    "qwen2-moe-some": (
        "Qwen2MoeConfig",
        {
            **_EXPERTS,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3-moe-some": (
        "Qwen3MoeConfig",
        {
            **_EXPERTS,
            "head_dim": 24,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "starcoder2-plain": ("Starcoder2Config", {"use_bias": False, "tie_word_embeddings": False}),
}
#: One configuration of each family: names of `CONFIGS`.
FAMILIES = list({CONFIGS[name][0]: name for name in reversed(CONFIGS)}.values())


def make_checkpoint(
    folder: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    config_json: dict[str, Any] | None = None,
    cancels: bool = False,
    **overrides: Any,
) -> Path:
    """Writes a checkpoint as Hugging Face writes it, with a tokenizer; returns the folder.

    Args:
        folder: where to; made if it is not there.
        name: a key of `CONFIGS`.
        seed: of the weights.
        dtype: of the weights.
        shard_size: "20KB", say, gives several files and an index.
        config_json: values to set in the written `config.json`; None removes one.
        cancels: whether sums of products cancel, see `tests.cancelling`.
        **overrides: of the config.
    """
    model = make_model(name, seed=seed, **overrides)
    if cancels:
        let_sums_cancel(model)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(folder)
    if config_json:
        edit_json(folder / "config.json", config_json)
    return folder


def make_model(name: str = "llama", *, seed: int = 0, **overrides: Any) -> nn.Module:
    """The Hugging Face model of a `CONFIGS` entry, with weights drawn so that logits differ."""
    class_name, special = CONFIGS[name]
    config = getattr(transformers, class_name)(**{**_SMALL, **special, **overrides})
    # The default attention ignores soft caps.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                parameter.copy_(1 + 0.2 * draw)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * draw)
            else:
                parameter.copy_(draw / math.sqrt(parameter.shape[-1]))
    return model.eval()


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
            "\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        ),
    )


def edit_json(path: Path, values: dict[str, Any]) -> None:
    """Sets values in a JSON file; None removes one."""
    contents = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        if value is None:
            contents.pop(key, None)
        else:
            contents[key] = value
    path.write_text(json.dumps(contents), encoding="utf-8")


def hugging_face(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint in Hugging Face, with eager attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def hugging_face_logits(model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """Logits of every position, [len(token_ids), vocabulary] float32."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0].float()
