"""Checkpoints of vision-language models in the layouts that are about."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglite import CheckpointError
from sglite.models.checkpoint import resolve_checkpoint
from sglite.models.loader import load_model
from tests.vision_checkpoints import make_vision_checkpoint

#: Per layout the checkpoint, and patterns that make it of what transformers 5 saves.
LAYOUTS = {
    "qwen2-vl, in memory": (
        "qwen2-vl",
        {r"^visual\.": "model.visual.", r"^model\.(?!visual)": "model.language_model."},
    ),
    "llava, hub": ("llava", {r"^vision_tower\.": "vision_tower.vision_model."}),
    "llava, in memory": (
        "llava",
        {
            r"^language_model\.model\.": "model.language_model.",
            r"^language_model\.lm_head": "lm_head",
            r"^(vision_tower|multi_modal_projector)\.": r"model.\1.",
        },
    ),
    "llava-onevision, in memory": (
        "llava-onevision",
        {
            r"^language_model\.model\.": "model.language_model.",
            r"^language_model\.lm_head": "lm_head",
            r"^(vision_tower\.|multi_modal_projector\.|image_newline)": r"model.\1",
        },
    ),
    "gemma3, hub": ("gemma3", {r"^vision_tower\.": "vision_tower.vision_model."}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout, tmp_path):
    name, patterns = LAYOUTS[layout]
    folder = make_vision_checkpoint(tmp_path, name)
    before = weights_of(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in patterns.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors")
    after = weights_of(folder)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def weights_of(folder):
    model = load_model(resolve_checkpoint(folder)).model
    stored = {
        path: module.weight for path, module in model.named_modules() if hasattr(module, "matrix")
    }
    return stored | dict(model.named_parameters())


def test_parts_that_are_not_asked_for_may_be_there(tmp_path):
    folder = make_vision_checkpoint(tmp_path, "gemma3")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"vision_tower.vision_model.head.probe": torch.zeros(1, 1, 24)},
        folder / "model.safetensors",
    )
    load_model(resolve_checkpoint(folder))
    save_file(tensors | {"vision_tower.tail": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not used by the model: vision_tower.tail"):
        load_model(resolve_checkpoint(folder))


def test_a_missing_part_of_the_tower_is_named(tmp_path):
    folder = make_vision_checkpoint(tmp_path, "qwen2-vl")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual.patch_embed.proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: visual\.patch_embed\.proj\.weight"):
        load_model(resolve_checkpoint(folder))
