"""From a prompt with images to token ids, pixel tensors and spans: what all families share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sglite.interface.errors import (
    CheckpointError,
    InvalidRequestError,
    SGLiteError,
    UnsupportedModelError,
)
from sglite.multimodal.hub_processor import PROCESSOR_FILES
from sglite.multimodal.images import Fetcher, read_image
from sglite.multimodal.inputs import MultimodalInputs, MultimodalItem, ProcessedMedia
from sglite.multimodal.placeholders import Place, expand, find_places
from sglite.multimodal.registry import register_processor
from sglite.multimodal.sources import Fetched, Sources
from sglite.multimodal.videos import Video, read_video

#: Stands for one picture in the text of a prompt, with every model; and for one video.
IMAGE, VIDEO = "<image>", "<video>"


class BaseMultimodalProcessor:
    """Makes token ids and pixels of prompts with images, for the models of one family.

    A family says which token stands for an image (`image_token`), what a whole placeholder looks
    like (`image_placeholder`), and how pixels are made (`process_image`). A class that has `models`
    of its own is registered for them when it is defined.

    Args:
        hf_config: the checkpoint's whole Hugging Face config.
        server_args: what was passed to `LLM`, an `LLMOptions`. (The name is SGLang's.)
        _processor: the checkpoint's `HubProcessor`.
        *args, **kwargs: not used; here so that a constructor written for SGLang fits.

    Attributes:
        models: classes of models, or their names, that this processor is for. Subclasses of a
            model's class have its processor too.
    """

    models: ClassVar[Sequence[type | str]] = ()

    #: The token that is repeated for each row of an image's embeddings; None: no images.
    image_token: str | None = None
    #: What `<image>` becomes: the text around one `image_token`, and the token itself.
    image_placeholder: str | None = None
    #: The same for videos; None: the model takes none.
    video_token: str | None = None
    video_placeholder: str | None = None
    #: Settings of the image processor that `LLM(..., image_processor={...})` cannot change.
    fixed_settings: ClassVar[frozenset[str]] = frozenset()
    #: Whether the tokens of an image see each other both ways.
    whole_spans: bool = False

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        if vars(cls).get("models"):
            register_processor(cls)

    def __init__(
        self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ):
        self.hf_config = hf_config
        self.server_args = server_args
        self._processor = _processor
        self.tokenizer = _processor.tokenizer
        self.image_processor = _processor.image_processor
        self._ids: dict[str, int | None] = {}

    def bind(self, model: Any) -> None:
        """Told once which model the processor is for, whose weights it must not keep alive."""

    # -- what a family has of its own ------------------------------------------------------------

    def process_image(self, image: Image.Image) -> ProcessedMedia:
        """Pixels of an RGB image."""
        raise NotImplementedError(f"{type(self).__name__} has no process_image")

    def process_images(self, images: Sequence[Image.Image]) -> list[ProcessedMedia]:
        """Pixels of all images of a prompt, where one depends on how many there are."""
        return [self.process_image(image) for image in images]

    def process_videos(self, videos: Sequence[Video]) -> list[ProcessedMedia]:
        """Pixels of all videos of a prompt."""
        return [self.process_video(frames) for frames in videos]

    def process_video(self, frames: Video) -> ProcessedMedia:
        """Pixels of a video's frames, a list of at least one, with the rate `frames.fps`."""
        raise UnsupportedModelError(f"{type(self).__name__} takes no videos")

    def positions(
        self, token_ids: Sequence[int], items: Sequence[MultimodalItem]
    ) -> tuple[NDArray[np.int64] | None, int]:
        """`positions` and `position_offset` of `MultimodalInputs`; here they simply count."""
        return None, 0

    def prepare_text(self, text: str, *, is_rendered: bool = False) -> str:
        """The text with one `image_token` for each image, as Hugging Face would tokenize it.

        Args:
            text: with `<image>` or the model's own placeholders.
            is_rendered: whether a chat template has made it, which writes the model's own: then
                "<image>" is what somebody wrote.
        """
        if is_rendered:
            return text
        for generic, token, placeholder in (
            (IMAGE, self.image_token, self.image_placeholder),
            (VIDEO, self.video_token, self.video_placeholder),
        ):
            if token is not None and generic != token:
                text = text.replace(generic, placeholder)
        return text

    def count_placeholders(self, text: str, modality: str) -> int:
        """How many images or videos a chat template has written into a text.

        Args:
            text: as the template gave it.
            modality: "image" or "video".
        """
        token = self.image_token if modality == "image" else self.video_token
        return self.prepare_text(text, is_rendered=True).count(token) if token else 0

    # -- what all families share -----------------------------------------------------------------

    @property
    def own_chat_template(self) -> Any:
        """The chat template of the checkpoint's processor; None: it has none."""
        return self._processor.chat_template

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Ids that stand for images and videos alone."""
        tokens = (self.image_token, self.video_token)
        ids = (self._known_id_of(token) for token in tokens if token is not None)
        return tuple(token_id for token_id in ids if token_id is not None)

    def process(
        self,
        name: str,
        token_ids: Sequence[int],
        images: Sequence[Any],
        videos: Sequence[Any],
        fetch: Fetcher | None = None,
    ) -> tuple[list[int], MultimodalInputs | None]:
        """Puts images in the place of their placeholders.

        Args:
            name: how messages call the prompt.
            token_ids: with one `image_token` for each image; or with as many as the image has rows
                of embeddings, as Hugging Face's processors give it.
            images: in the order of their placeholders, as `read_image` takes them.
            videos: likewise, as `read_video` takes them.
            fetch: as for `read_image`.

        Returns:
            The token ids with a placeholder for each row of embeddings, and the inputs; None where
            there are no images.

        Raises:
            InvalidRequestError: an image cannot be read, there are more or fewer of them than
                placeholders, or there are videos for a model that takes none.
        """
        if videos and self.video_token is None:
            raise InvalidRequestError(
                f"{name} has videos, but this model takes images only: pass frames as images"
            )
        if (images or videos) and self.image_processor is None:
            kind = "images" if images else "videos"
            raise InvalidRequestError(
                f"{name} has {kind}, but the checkpoint has no image processor "
                f"({' or '.join(PROCESSOR_FILES)}): it can be used for text alone"
            )
        fetch = Fetched(fetch) if fetch else None
        pictures = [
            read_image(f"{name}: images[{index}]", image, fetch)
            for index, image in enumerate(images)
        ]
        frames = [
            read_video(f"{name}: videos[{index}]", video, fetch)
            for index, video in enumerate(videos)
        ]
        found = {
            "image": _processed(name, "images", self.process_images, pictures),
            "video": _processed(name, "videos", self.process_videos, frames),
        }
        token_ids = list(token_ids)
        places: list[Place] = []
        for modality, token in (("image", self.image_token), ("video", self.video_token)):
            if token is not None:
                places += self._places(name, modality, token, token_ids, found[modality])
        expanded, items = expand(token_ids, places)
        if not items:
            return token_ids, None
        positions, offset = self.positions(expanded, items)
        inputs = MultimodalInputs(items, positions, offset, self.whole_spans)
        if not videos:
            sources = Sources(images, pictures, fetch or {}, self._pixels)
            # The smaller of the two is kept while the prompt waits, and until it ends.
            if sources.num_bytes < inputs.num_pixel_bytes:
                inputs = replace(inputs, remake=sources.pixels)
        return expanded, inputs

    def _pixels(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        return [medium.pixel_values for medium in self.process_images(pictures)]

    def _places(
        self,
        name: str,
        modality: str,
        token: str,
        token_ids: Sequence[int],
        media: Sequence[ProcessedMedia],
    ) -> list[Place]:
        """The tokens that each medium takes the place of."""
        token_id = self._id_of(token) if media else self._known_id_of(token)
        places = find_places(token_ids, token_id, media)
        if places is not None:
            return places
        generic = IMAGE if modality == "image" else VIDEO
        own = f" or {token}" if token != generic else ""
        count = token_ids.count(token_id)
        raise InvalidRequestError(
            f"{name} has {count} placeholders for {modality}s ({generic}{own}), and "
            f"{len(media)} {modality}s: there must be one placeholder for each"
        )

    def _id_of(self, token: str) -> int:
        found = self._known_id_of(token)
        if found is None:
            raise CheckpointError(
                f"the tokenizer has no token {token!r}, which stands for an image in the prompts "
                f"of this model"
            )
        return found

    def _known_id_of(self, token: str) -> int | None:
        if token not in self._ids:
            found = self.tokenizer.convert_tokens_to_ids(token)
            is_known = found is not None and found != getattr(self.tokenizer, "unk_token_id", None)
            self._ids[token] = found if is_known else None
        return self._ids[token]


def _processed(
    name: str,
    kind: str,
    process: Callable[[Sequence[Any]], list[ProcessedMedia]],
    media: Sequence[Any],
) -> list[ProcessedMedia]:
    try:
        return process(media) if media else []
    except SGLiteError:
        raise
    except Exception as error:  # what Hugging Face refuses: a ratio of sides of 200, say
        raise InvalidRequestError(f"{name}: its {kind} cannot be processed: {error}") from error
