"""The model: a Qwen2-VL of 2.7 million weights, and a fast way to train it."""

import torch
from tokenizer import IMAGE_MEAN, IMAGE_STD, MERGE_SIZE, PATCH_SIZE, VOCAB_SIZE
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """Four layers that see and four that read and write, with tied embeddings."""
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 192,
            "num_heads": 4,
            "mlp_ratio": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "initializer_range": 0.07,
        },
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.07,  # about hidden_size ** -0.5: attention is not flat at first
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """[n, height, width, 3], 0 to 255, to [n, 3, height, width] float32, as the processor does."""
    mean = torch.tensor(IMAGE_MEAN, device=pictures.device)
    std = torch.tensor(IMAGE_STD, device=pictures.device)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def picture_features(visual: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The vision tower on pictures of one size: [n, 3, height, width] to [n, tokens, hidden].

    What `visual` computes itself, but there attention runs picture by picture, and here once for
    all of them.
    """
    n, _, height, width = pixels.shape
    p, m = PATCH_SIZE, MERGE_SIZE
    rows, columns = height // p, width // p
    # Patches in the order in which they are merged: blocks of m x m.
    patches = pixels.view(n, 3, rows // m, m, p, columns // m, m, p)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(n, rows * columns, 3, p * p)
    patches = (
        patches[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2)
    )  # a still: one frame twice
    hidden = functional.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = _rotation(visual, rows, columns, pixels.device)
    for block in visual.blocks:
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(hidden)).view(n, rows * columns, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (_rotate(x.float(), cos, sin).to(v.dtype) for x in (q, k))
        seen = functional.scaled_dot_product_attention(q, k, v)
        hidden = hidden + block.attn.proj(seen.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(n, rows * columns // (m * m), -1)


def _rotation(
    visual: torch.nn.Module, rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [patches, head_dim]: a quarter turns by the row, one by the column."""
    m = MERGE_SIZE
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    grid = grid.view(rows // m, m, columns // m, m, 2).transpose(1, 2).reshape(-1, 2).to(device)
    head_dim = visual.config.embed_dim // visual.config.num_heads
    exponents = torch.arange(0, head_dim // 2, 2, device=device) / (head_dim // 2)
    angles = (grid[:, :, None] * 10000.0**-exponents).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def hidden_states(
    model: Qwen2VLForConditionalGeneration,
    ids: torch.Tensor,
    positions: torch.Tensor,
    pixels: torch.Tensor,
) -> torch.Tensor:
    """The last hidden states [n, length, hidden], the pictures' tokens put in place.

    Args:
        model: in training or not.
        ids: [n, length] int64, padded on the right.
        positions: [3, n, length] int64.
        pixels: [n * pictures per prompt, 3, height, width], in the order of the prompts.
    """
    embedded = model.get_input_embeddings()(ids)
    features = picture_features(model.model.visual, pixels).to(embedded.dtype)
    is_image = (ids == model.config.image_token_id)[:, :, None]
    embedded = embedded.masked_scatter(is_image, features)
    return model.model.language_model(
        inputs_embeds=embedded, position_ids=positions, use_cache=False
    ).last_hidden_state
