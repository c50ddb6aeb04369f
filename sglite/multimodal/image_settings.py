"""`LLM(..., image_processor={...})`: settings of Hugging Face's image processor, checked."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from sglite.interface.errors import ConfigError, suggest

# Of a call, and not of a processor.
_OF_CALLS = {"data_format", "device", "disable_grouping", "input_data_format", "return_tensors"}
# What the library, or the model's own shape, decides.
_DECIDED = {"do_convert_rgb", "image_seq_length", "merge_size", "patch_size", "temporal_patch_size"}


def with_settings(
    image_processor: Any, folder: Any, settings: Mapping[str, Any], fixed: frozenset[str]
) -> Any:
    """The image processor of a checkpoint with some settings changed.

    Args:
        image_processor: as the checkpoint has it.
        folder: the checkpoint's.
        settings: keywords of the image processor's class, such as `max_pixels`.
        fixed: those that cannot be changed for the model's family.

    Raises:
        ConfigError: the class knows no such setting, or refuses the value.
    """
    kind = type(image_processor)
    known = getattr(getattr(kind, "valid_kwargs", None), "__annotations__", None)
    known = sorted(set(known or image_processor.to_dict()) - _OF_CALLS - _DECIDED - fixed)
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"image_processor has {name!r}, which is no setting of {kind.__name__} that can be "
                f"changed.{suggest(name, known)} Known: {', '.join(known)}."
            )
    changed = dict(settings)
    if "size" in changed:
        # The checkpoint's file may have the same under older names, which would go first.
        older = {"min_pixels", "max_pixels"} & set(known) - set(changed)
        changed |= dict.fromkeys(older)
    try:
        made = kind.from_pretrained(folder, local_files_only=True, **changed)
        made(images=[Image.new("RGB", (64, 48))], return_tensors="pt")
    except Exception as error:  # of whatever kind the class's own code raises
        raise ConfigError(
            f"image_processor={dict(settings)}: {kind.__name__} refuses this: {error}"
        ) from error
    return made
