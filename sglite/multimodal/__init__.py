"""Images and videos on their way into a prompt.

Reading them, processors that make pixel tensors and placeholders of them, the positions and cache
keys of their tokens, and the registration of processors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglite.multimodal.base_processor import BaseMultimodalProcessor
    from sglite.multimodal.chat_templates import register_chat_template
    from sglite.multimodal.hub_processor import HubProcessor
    from sglite.multimodal.images import read_image
    from sglite.multimodal.inputs import MultimodalInputs, MultimodalItem, ProcessedMedia
    from sglite.multimodal.keys import pad_input_ids
    from sglite.multimodal.qwen_vl import QwenVLImageProcessor
    from sglite.multimodal.registry import find_processor, register_processor

# Loaded on first use: Pillow and Hugging Face's processors are only needed where there are images.
_HOMES = {
    "BaseMultimodalProcessor": "base_processor",
    "HubProcessor": "hub_processor",
    "MultimodalInputs": "inputs",
    "MultimodalItem": "inputs",
    "ProcessedMedia": "inputs",
    "QwenVLImageProcessor": "qwen_vl",
    "find_processor": "registry",
    "pad_input_ids": "keys",
    "read_image": "images",
    "register_chat_template": "chat_templates",
    "register_processor": "registry",
}

__all__ = [
    "BaseMultimodalProcessor",
    "HubProcessor",
    "MultimodalInputs",
    "MultimodalItem",
    "ProcessedMedia",
    "QwenVLImageProcessor",
    "find_processor",
    "pad_input_ids",
    "read_image",
    "register_chat_template",
    "register_processor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
