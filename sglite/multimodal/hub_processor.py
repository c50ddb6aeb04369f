"""What a checkpoint's folder has for images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglite.interface.errors import CheckpointError
from sglite.interface.files import read_json
from sglite.multimodal.image_settings import with_settings
from sglite.multimodal.image_sizes import check_sizes

#: What says how pictures become pixels: one of them has to be there.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_FURTHER_FILES = (
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class HubProcessor:
    """What a checkpoint's folder has for images, the parts of Hugging Face's own processor.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        image_processor: Hugging Face's, always the variant on Pillow, so that pixels do not depend
            on what else is installed; None where the folder has no file for one: then there can
            be text alone.
        settings: the contents of `processor_config.json`; empty if there is none.
        video_settings: those of its video processor, or of the file that holds them.
        chat_template: the one that Hugging Face's processor would use, or several by name; None:
            it has none.
    """

    tokenizer: Any
    image_processor: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    chat_template: Any = None

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: Any,
        *,
        trust_remote_code: bool = False,
        image_settings: Mapping[str, Any] | None = None,
        fixed_settings: frozenset[str] = frozenset(),
    ) -> "HubProcessor":
        """Reads the files of a checkpoint.

        Args:
            folder: the checkpoint's.
            tokenizer: the Hugging Face tokenizer.
            trust_remote_code: whether Python code of the checkpoint may run.
            image_settings: what of the image processor the caller wants otherwise.
            fixed_settings: what of it cannot be changed.

        Raises:
            CheckpointError: what is there cannot be read.
            ConfigError: `image_settings` has an unknown name, or a value that is not allowed.
        """
        for name in (*PROCESSOR_FILES, *_FURTHER_FILES):
            if (folder / name).exists() and not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is no regular file")  # read forever, maybe
        if not any((folder / name).exists() for name in PROCESSOR_FILES):
            return cls(tokenizer, None)
        # Not the class of that name in `transformers` itself, which asks for torchvision.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            image_processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code, backend="pil"
            )
        except Exception as error:  # whatever its code raises on a broken or missing file
            raise CheckpointError(
                f"the image processor in {folder} ({' or '.join(PROCESSOR_FILES)}) cannot be "
                f"read: {error}"
            ) from error
        check_sizes(image_processor, folder)
        if image_settings:
            image_processor = with_settings(image_processor, folder, image_settings, fixed_settings)
        settings = read_json(folder / "processor_config.json") or {}
        video_settings = (
            settings.get("video_processor")
            or read_json(folder / "video_preprocessor_config.json")
            or read_json(folder / "preprocessor_config.json")
            or {}
        )
        template = _template_in(folder, settings)
        return cls(tokenizer, image_processor, settings, video_settings, template)


def _template_in(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template among a processor's files, in the order of Hugging Face's processors."""
    template = settings.get("chat_template")
    template = template or (read_json(folder / "chat_template.json") or {}).get("chat_template")
    file = folder / "chat_template.jinja"
    if template is None and file.exists():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return template
