"""A language model of any family that sees through a tower beside it."""

import copy
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sglite.interface.errors import UnsupportedModelError
from sglite.layers import ForwardBatch, LogitsProcessorOutput, QuantizationConfig, add_prefix
from sglite.models.vision_towers import tower_class
from sglite.multimodal.inputs import MultimodalItem
from sglite.multimodal.keys import pad_input_ids

# The language models that may be inside, by the `model_type` of their config.
_LANGUAGE_MODELS = {
    "llama": ("sglite.models.llama", "LlamaForCausalLM"),
    "mistral": ("sglite.models.mistral", "MistralForCausalLM"),
    "qwen2": ("sglite.models.qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("sglite.models.qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("sglite.models.gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("sglite.models.gemma3", "Gemma3ForCausalLM"),
}


class VisionLanguageModel(nn.Module):
    """A vision tower, and the language model that a config's `text_config` describes.

    A family makes `multi_modal_projector`, and has `get_image_feature`.

    Args:
        config: has `vision_config` and `text_config`.
        quant_config, prefix: as for `LlamaForCausalLM`.

    Attributes:
        language_model: with its output head.
    """

    takes_whole_config: ClassVar[bool] = True
    # As this class has it, and the hub; transformers 5 also has the names on the left.
    checkpoint_renames: ClassVar[dict[str, str]] = {
        r"^model\.language_model\.": "language_model.model.",
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.(?=vision_tower|multi_modal_projector|image_newline)": "",
        r"^vision_tower\.vision_model\.": "vision_tower.",
    }
    # In checkpoints of towers that can do more than this model asks of them.
    unused_tensors: ClassVar[str] = r"^vision_tower\.(head\.|embeddings\.position_ids$)"

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ):
        super().__init__()
        self.config = config
        text = text_config_of(config)
        self.language_model = _language_model_class(text)(
            text, quant_config, add_prefix("language_model", prefix)
        )
        self.vision_tower = tower_class(config.vision_config)(
            config.vision_config, quant_config, add_prefix("vision_tower", prefix)
        )
        self.stacked_params = {
            **self.language_model.stacked_params,
            "qkv": ("q_proj", "k_proj", "v_proj"),
            "proj": ("out_proj",),
        }

    pad_input_ids = staticmethod(pad_input_ids)

    @property
    def model(self) -> nn.Module:
        """Everything below the output head."""
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Module:
        """The output head."""
        return self.language_model.lm_head

    @property
    def logits_processor(self) -> nn.Module:
        """What applies the output head."""
        return self.language_model.logits_processor

    def get_image_feature(self, items: Sequence[MultimodalItem]) -> Tensor:
        """Embeddings of images, one behind the other: [their tokens, hidden_size]."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: Any = None,
        get_embedding: bool = False,
    ) -> LogitsProcessorOutput:
        """As `LlamaForCausalLM.forward`."""
        return self.language_model(
            input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors, get_embedding
        )


def text_config_of(config: Any) -> Any:
    """The config of the language model, which ties its embeddings as the whole config says."""
    text = copy.copy(config.get_text_config())
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def _language_model_class(config: Any) -> type[nn.Module]:
    kind = getattr(config, "model_type", None)
    if kind not in _LANGUAGE_MODELS:
        raise UnsupportedModelError(
            f"a vision-language model around {kind!r} is not implemented; known: "
            f"{', '.join(sorted(_LANGUAGE_MODELS))}"
        )
    module, name = _LANGUAGE_MODELS[kind]
    return getattr(importlib.import_module(module), name)
