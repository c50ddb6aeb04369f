"""Checkpoints of vision-language models in the layouts that are about."""

import json
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


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_the_flat_config_of_the_hub(name, tmp_path):
    folder = make_vision_checkpoint(tmp_path, name)
    before = load_model(resolve_checkpoint(folder))
    path = folder / "config.json"
    values = json.loads(path.read_text())
    text = values.pop("text_config")
    parameters = text.pop("rope_parameters")
    text["rope_theta"] = parameters["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": parameters["mrope_section"]}
    del text["model_type"], text["layer_types"]
    path.write_text(json.dumps({**text, **values}))
    after = load_model(resolve_checkpoint(folder))
    rotary = [loaded.model.model.layers[0].self_attn.rotary_emb for loaded in (before, after)]
    assert rotary[0].mrope_section == rotary[1].mrope_section == (2, 3, 3)
    assert rotary[0].parameters == rotary[1].parameters
    heads = [loaded.model.lm_head.matrix for loaded in (before, after)]
    embeddings = [loaded.model.model.embed_tokens.matrix for loaded in (before, after)]
    is_tied = name == "qwen2.5-vl"
    assert [a is b for a, b in zip(heads, embeddings, strict=True)] == [is_tied, is_tied]


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
