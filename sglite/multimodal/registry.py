"""Which processor serves which model."""

import importlib
import os

from sglite.interface.errors import UnsupportedModelError
from sglite.interface.packages import scan_package

#: Names an architecture that takes images, of a model from outside; it then must have a processor.
ARCHITECTURE_VARIABLE = "SGLITE_EXTERNAL_MM_MODEL_ARCH"
#: Names a package whose modules define processors, with `models = [...]`.
PACKAGE_VARIABLE = "SGLITE_EXTERNAL_MM_PROCESSOR_PACKAGE"

# The families that come with the library: modules that register when they are imported.
_BUILT_IN = (
    "sglite.multimodal.gemma3",
    "sglite.multimodal.llava",
    "sglite.multimodal.qwen_vl",
    # The last one, which goes first: a model run by Hugging Face's class has no other of these.
    "sglite.multimodal.hugging_face",
)

_classes: list[type] = []  # those with `models`, the newest last
_by_name: dict[str, type] = {}  # those given to `sglite.register(name, processor=...)`


def register_processor(processor: type, architecture: str | None = None) -> None:
    """Registers a processor for its `models`, or for the architecture of a name.

    What was registered last goes first, so that a notebook's cell may run twice.
    """
    if architecture is None:
        _classes.append(processor)
    else:
        _by_name[architecture] = processor


def forget_processor(architecture: str) -> None:
    """Takes back what was registered for a name, whose class has been replaced."""
    _by_name.pop(architecture, None)


def find_processor(model_class: type, architecture: str) -> type | None:
    """The processor of a model: by the name, by its class, or by a class that it derives from.

    None where the model takes no images.

    Raises:
        UnsupportedModelError: the environment says that it does take images and nothing serves it,
            or its package cannot be imported.
    """
    if architecture in _by_name:
        return _by_name[architecture]
    takes_images = hasattr(model_class, "get_image_feature")
    is_declared = os.environ.get(ARCHITECTURE_VARIABLE, "").strip() == architecture
    if not (takes_images or is_declared):
        return None
    for module in _BUILT_IN:
        importlib.import_module(module)
    _import_package(os.environ.get(PACKAGE_VARIABLE, "").strip())
    for base in model_class.__mro__:
        for processor in _newest_first():
            if any(_is_of(base, architecture, model) for model in processor.models):
                return processor
        if base.__name__ in _by_name:
            return _by_name[base.__name__]
    if is_declared:
        raise UnsupportedModelError(
            f"{ARCHITECTURE_VARIABLE} says that {architecture} takes images, but no processor is "
            f"registered for it: name its package in {PACKAGE_VARIABLE}, and its class in the "
            f"`models` of a processor there"
        )
    raise UnsupportedModelError(
        f"{architecture} takes images (it has get_image_feature), but no processor is "
        f"registered for it: @register({architecture!r}, processor=...), or `models = "
        f"[{model_class.__name__}]` in a BaseMultimodalProcessor"
    )


def _newest_first() -> list[type]:
    """Those with `models`, the library's own last, whenever each was imported."""
    newest_first = _classes[::-1]
    newest_first.sort(key=lambda kind: -_place_of(kind.__module__))
    return newest_first


def _place_of(module: str) -> int:
    return _BUILT_IN.index(module) if module in _BUILT_IN else len(_BUILT_IN)


def _is_of(base: type, architecture: str, model: type | str) -> bool:
    if isinstance(model, str):
        return model in (base.__name__, architecture)
    # By name as well: a module that is loaded again makes its classes anew.
    return model is base or (
        model.__name__ == base.__name__ and model.__module__ == base.__module__
    )


def _import_package(name: str) -> None:
    """Imports a package and all modules in it: their processors register themselves."""
    if not name:
        return
    try:
        for _ in scan_package(name, importlib.import_module):
            pass
    except (Exception, SystemExit) as error:  # whatever a module of someone else's raises
        raise UnsupportedModelError(
            f"{PACKAGE_VARIABLE}={name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
