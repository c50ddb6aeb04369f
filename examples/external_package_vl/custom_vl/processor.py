"""The processor of `CustomQwen2VL`: pictures are made into pixels as for Qwen2-VL."""

from typing import Any

from custom_vl.qwen2_vl_wrapper import CustomQwen2VL
from sglite.multimodal.qwen_vl import QwenVLImageProcessor


class CustomProcessor(QwenVLImageProcessor):
    """Registered for `CustomQwen2VL` by its `models`."""

    models = [CustomQwen2VL]  # noqa: RUF012

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
