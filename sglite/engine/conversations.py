"""Conversations as prompts, by the checkpoint's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from sglite.engine.prompt_reader import PromptReader
from sglite.engine.tokenizer import Tokenizer
from sglite.interface import checks
from sglite.interface.errors import InvalidRequestError
from sglite.interface.prompts import Prompt

# Kinds of content parts, by where the picture or the frames lie.
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
_VIDEO_KEYS = ("video", "video_url", "frames")
# Where a string is a URL, and never a file of this machine: such parts come from elsewhere.
_URL_KEYS = ("image_url", "url", "video_url")
_PARTS = {"text": ("text",), "image": _IMAGE_KEYS, "image_url": _IMAGE_KEYS, "video": _VIDEO_KEYS}


def render_conversations(
    tokenizer: Tokenizer,
    reader: PromptReader,
    model: str,
    messages: Sequence,
    tools: Sequence | None,
    template_arguments: Mapping[str, Any] | None,
) -> tuple[list[Prompt], bool]:
    """The prompts of one conversation or of a list of them, and whether it was one.

    Args:
        tokenizer: has the chat template.
        reader: knows the processor, which may have another template.
        model: how messages call the model.
        messages: a list of dicts with `role` and `content`, or a list of such lists. A content may
            be a list of parts, as OpenAI has it: text, images, videos.
        tools: functions or JSON schemas, given to the template.
        template_arguments: its further arguments.

    Raises:
        InvalidRequestError: `messages` is something else, the tokenizer has no chat template, or
            the template refuses a conversation.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequestError(
            f"messages must be a list of dicts with 'role' and 'content', or a list of such "
            f"lists, not {type(messages).__name__}"
        )
    is_single = bool(messages) and isinstance(messages[0], Mapping)
    conversations = [messages] if is_single else messages
    arguments = {"add_generation_prompt": True, **(template_arguments or {})}
    rendered = [_render(tokenizer, reader, model, one, tools, arguments) for one in conversations]
    return rendered, is_single


def _render(
    tokenizer: Tokenizer,
    reader: PromptReader,
    model: str,
    conversation: Sequence,
    tools: Sequence | None,
    arguments: Mapping[str, Any],
) -> Prompt:
    plain, images, videos = _take_media(conversation)
    prompt = Prompt(images=tuple(images), videos=tuple(videos))
    reader.check_takes("the conversation", prompt)
    templates, has_media = reader.templates, bool(images or videos)
    try:
        template = arguments.get("chat_template") or templates.choose(model, has_media, tools)
        if template is not None:
            plain = templates.adapt(plain, template, tools)
            arguments = {**arguments, **templates.arguments(template)}
            text = tokenizer.apply_chat_template(plain, tools=tools, **arguments)
    except Exception as error:
        hint = f". If it takes no pictures, {_remedy(reader)}" if has_media else ""
        raise InvalidRequestError(
            f"the chat template refuses the conversation: {error}{hint}"
        ) from error
    if template is None:
        raise InvalidRequestError(
            f"{model} has no chat template; use generate(), or set llm.tokenizer.chat_template"
        )
    if reader.processor is not None:
        _check_is_written(reader, model, text, prompt)
        text = reader.processor.prepare_text(text, is_rendered=True)
    # The template writes the special tokens itself, a BOS among them.
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    return Prompt(text=text, token_ids=token_ids, images=prompt.images, videos=prompt.videos)


def _check_is_written(reader: PromptReader, model: str, text: str, prompt: Prompt) -> None:
    """Refuses a conversation whose pictures the chat template has left out.

    Raises:
        InvalidRequestError: it has; the caller has no placeholder to add.
    """
    for modality, media in (("image", prompt.images), ("video", prompt.videos)):
        written = reader.processor.count_placeholders(text, modality) if media else 0
        if written < len(media):
            raise InvalidRequestError(
                f"the conversation has {len(media)} {modality}s, but the chat template of {model} "
                f"writes {written} of them: {_remedy(reader)}"
            )


def _remedy(reader: PromptReader) -> str:
    kind = type(reader.processor).__name__
    return (
        f"register another one with sglite.multimodal.register_chat_template({kind}, ...), set "
        f"llm.tokenizer.chat_template, or write the whole prompt, with <image>, for generate()"
    )


def _take_media(conversation: Sequence) -> tuple[Sequence, list[Any], list[Any]]:
    """The conversation with empty parts in the places of images and videos, and these."""
    images: list[Any] = []
    videos: list[Any] = []
    messages = []
    for message in conversation:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            parts = [_take_part(part, images, videos) for part in content]
            message = {**message, "content": parts}
        messages.append(message)
    return messages, images, videos


def _take_part(part: Any, images: list[Any], videos: list[Any]) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PARTS:
        raise InvalidRequestError(
            f"a content part of a message must be a dict with 'type' text, image, image_url or "
            f"video, not {checks.shorten(part)}"
        )
    if kind == "text":
        return part
    found = [key for key in _PARTS[kind] if part.get(key) is not None]
    if len(found) != 1:
        raise InvalidRequestError(
            f"a content part of type {kind!r} must have one of {', '.join(_PARTS[kind])}; it has "
            f"{', '.join(found) or 'none'}"
        )
    (key,) = found
    value = part[key]
    is_url = key in _URL_KEYS or (kind == "image_url" and key != "base64")
    if isinstance(value, Mapping) and "url" in value:  # OpenAI's {"url": ..., "detail": ...}
        value, is_url = value["url"], True
    if is_url:
        _check_urls(kind, value)
    if kind == "video":
        if part.get("fps") is not None:
            value = {"frames": value, "fps": part["fps"]}
        videos.append(value)
        return {"type": "video"}
    images.append(f"data:;base64,{value}" if key == "base64" else value)
    return {"type": "image"}


def _check_urls(kind: str, value: Any) -> None:
    """Refuses files of this machine in parts that may be somebody else's, who would read them."""
    for url in value if isinstance(value, list | tuple) else [value]:
        if isinstance(url, str) and not url[:8].lower().startswith(
            ("data:", "http://", "https://")
        ):
            raise InvalidRequestError(
                f"a content part of type {kind!r} has the URL {checks.shorten(url)}: it must "
                f"begin with data:, http:// or https://, since no file is opened for a URL of a "
                f"message; for a file of your own pass {{'type': 'image', 'image': path}}"
            )
