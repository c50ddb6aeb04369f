"""Which class runs which architecture."""

import importlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TypeVar

from torch import nn

from sglite.interface.errors import UnsupportedModelError, suggest
from sglite.models.external import ExternalModels
from sglite.multimodal.registry import forget_processor, register_processor

ModelClass = TypeVar("ModelClass", bound=type[nn.Module])

# The families that come with the library. A module is imported when its architecture is asked for,
# so that importing the library stays quick.
_BUILT_IN = {
    "Cohere2ForCausalLM": "sglite.models.cohere2",
    "Gemma2ForCausalLM": "sglite.models.gemma2",
    "Gemma3ForCausalLM": "sglite.models.gemma3",
    "Gemma3ForConditionalGeneration": "sglite.models.gemma3_vl",
    "GlmForCausalLM": "sglite.models.glm",
    "Glm4ForCausalLM": "sglite.models.glm4",
    "GraniteForCausalLM": "sglite.models.granite",
    "LlamaForCausalLM": "sglite.models.llama",
    "LlavaForConditionalGeneration": "sglite.models.llava",
    "LlavaNextForConditionalGeneration": "sglite.models.llava_next",
    "LlavaOnevisionForConditionalGeneration": "sglite.models.llava_next",
    "MistralForCausalLM": "sglite.models.mistral",
    "MixtralForCausalLM": "sglite.models.mixtral",
    "Olmo2ForCausalLM": "sglite.models.olmo2",
    "Phi3ForCausalLM": "sglite.models.phi3",
    "Qwen2ForCausalLM": "sglite.models.qwen2",
    "Qwen2VLForConditionalGeneration": "sglite.models.qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "sglite.models.qwen2_5_vl",
    "Qwen2MoeForCausalLM": "sglite.models.qwen2_moe",
    "Qwen3ForCausalLM": "sglite.models.qwen3",
    "Qwen3MoeForCausalLM": "sglite.models.qwen3_moe",
    "SmolLM3ForCausalLM": "sglite.models.smollm3",
    "Starcoder2ForCausalLM": "sglite.models.starcoder2",
}


class _ModelTable(MutableMapping[str, type[nn.Module]]):
    """Architecture name to class. Setting a name again replaces what it had.

    What was set goes before the classes of other packages, and those before what the library has.

    Args:
        external: the classes of other packages.
    """

    def __init__(self, external: ExternalModels):
        self._external = external
        self._classes: dict[str, type[nn.Module] | str] = dict(_BUILT_IN)
        self._set: set[str] = set()

    def __getitem__(self, name: str) -> type[nn.Module]:
        external = self._external.classes()  # first, since it may set some
        if name in external and name not in self._set:
            return external[name]
        found = self._classes[name]
        if isinstance(found, str):
            found = self._classes[name] = getattr(importlib.import_module(found), name)
        return found

    def __setitem__(self, name: str, model_class: type[nn.Module]) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"an architecture's name must be a string, got {name!r}")
        if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
            raise TypeError(
                f"{name!r} must be registered with a class that derives from torch.nn.Module, got "
                f"{model_class!r}"
            )
        self._classes[name] = model_class
        self._set.add(name)

    def __delitem__(self, name: str) -> None:
        del self._classes[name]
        self._set.discard(name)

    def __contains__(self, name: object) -> bool:  # without importing one of the library's
        return name in self._external.classes() or name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter({**self._external.classes(), **self._classes})

    def __len__(self) -> int:
        return len(self._external.classes().keys() | self._classes.keys())

    def __repr__(self) -> str:
        return f"{{{', '.join(sorted(self))}}}"


class _ModelRegistry:
    """Which class runs which architecture: `ModelRegistry.models[name] = cls`.

    The one object `ModelRegistry` of this module serves the whole process.

    Attributes:
        models: a mapping from architecture names to classes.
    """

    def __init__(self):
        self._external = ExternalModels()
        self.models = _ModelTable(self._external)

    def find(self, architectures: Sequence[str]) -> type[nn.Module] | None:
        """The class of the first of the names that is known; None where none is.

        Packages of others that were broken are looked at again: they may have been mended.
        """
        self._external.retry()
        return next((self.models[name] for name in architectures if name in self.models), None)

    def warn_of_broken_packages(self) -> None:
        """Warns of what is broken in the packages of others, once of each problem."""
        self._external.warn()

    def resolve(self, architectures: Sequence[str]) -> tuple[str, type[nn.Module]]:
        """The first of the names that is known, and its class.

        Raises:
            UnsupportedModelError: none is known; the message lists what is, and the packages of
                others that are broken.
        """
        for name in architectures:
            if name in self.models:
                return name, self.models[name]
        known = sorted(self.models)
        wanted = " or ".join(repr(name) for name in architectures)
        hint = suggest(architectures[0], known) if architectures else ""
        problems = self._external.problems()
        broken = f" Broken: {'; '.join(problems)}." if problems else ""
        raise UnsupportedModelError(
            f"no model class is registered for the architecture {wanted}.{hint}{broken} Known: "
            f"{', '.join(known)}. Register your own with @sglite.register({architectures[0]!r})."
        )


ModelRegistry = _ModelRegistry()


def register(
    architecture: str, *, processor: type | None = None
) -> Callable[[ModelClass], ModelClass]:
    """Registers the decorated class for an architecture; works on the next line.

    ```python
    @register("LlamaWrapper")
    class LlamaWrapper(LlamaForCausalLM): ...

    LLM("llama_ckpt", architecture="LlamaWrapper")
    ```

    Args:
        architecture: the name, as in `architectures` of a checkpoint's `config.json`. A name that
            is registered again (a notebook cell run twice) gets the new class.
        processor: a `sglite.multimodal.BaseMultimodalProcessor`, for a model that takes images;
            None: what its class has by a processor's `models`, or by the class it derives from.

    Returns:
        The decorator, which gives back the class itself.

    Raises:
        TypeError: what is decorated is no class derived from `torch.nn.Module`.
    """
    if not isinstance(architecture, str):
        raise TypeError(
            f"register takes the architecture's name, as in @register('MyModel'), got "
            f"{architecture!r}"
        )

    def decorate(model_class: ModelClass) -> ModelClass:
        ModelRegistry.models[architecture] = model_class
        forget_processor(architecture)
        if processor is not None:
            register_processor(processor, architecture)
        return model_class

    return decorate
