"""Which chat template a conversation is rendered with, and in which form that takes contents."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sglite.engine.tokenizer import Tokenizer
from sglite.interface.errors import RequestError
from sglite.multimodal.chat_templates import registered_template

_log = logging.getLogger(__name__)

# What a template is tried with: no template changes digits, or has these.
_MARKS = ("27182818284590", "31415926535897")
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "f",
        "parameters": {"type": "object", "properties": {}},
    },
}
# Of templates and roles whose forms are remembered, at most.
_MOST_KNOWN = 256


class Forms(NamedTuple):
    """Whether a template keeps the text of contents that are strings, or lists of parts."""

    strings: bool
    parts: bool


class _Use(NamedTuple):
    template: str
    has_tools: bool


class ChatTemplates:
    """The templates of one model.

    Templates differ in what they take: many of text models want strings and print a list of parts
    as Python would, many of vision-language models walk over parts and make nothing of a string,
    and some do either by role. None of that is an error to them, so that it is tried out.

    Args:
        tokenizer: has a chat template, mostly.
        processor: a `sglite.multimodal.BaseMultimodalProcessor`, which may have another; None: the
            model takes text only.
    """

    def __init__(self, tokenizer: Tokenizer, processor: Any = None):
        self._tokenizer = tokenizer
        self._processor = processor
        # Another one later on is the caller's, who knows what he wants.
        self._loaded = self._tokenizers_own
        self._forms: dict[tuple[_Use, str], Forms] = {}
        self._writing: dict[str, bool] = {}
        self._has_said = False

    @property
    def _tokenizers_own(self) -> Any:
        return getattr(self._tokenizer.hf, "chat_template", None)

    def choose(self, model: str, has_media: bool, tools: Sequence | None) -> str | None:
        """The template of a conversation; None: there is none.

        That is the tokenizer's where the caller has set it. Else, of a model that takes images, the
        first that writes them: the processor's, which Hugging Face's
        `AutoProcessor.apply_chat_template` takes too, the tokenizer's, the one that is registered
        for the family. Where none does, text alone has the first that there is.

        Args:
            model: how messages call the model.
            has_media: whether the conversation has images or videos.
            tools: what it gives to the template: there may be another one for that.
        """
        own = self._tokenizers_own
        if self._processor is None or own != self._loaded:
            return _named(own, tools)
        found = [_named(self._processor.own_chat_template, tools), _named(own, tools)]
        found = [template for template in found if template is not None]
        for template in found:
            if self.writes_images(template):
                return template
        registered = registered_template(type(self._processor), has_own=bool(found))
        if registered is None or (found and not has_media):
            return found[0] if found else None
        if not self._has_said:
            self._has_said = True
            _log.warning(
                "%s has no chat template that writes pictures: chat() uses the one that is "
                "registered for %s",
                model,
                type(self._processor).__name__,
            )
        return registered

    def writes_images(self, template: str) -> bool:
        """Whether a template writes the model's placeholder for an image."""
        if template not in self._writing:
            content = [{"type": "image"}, {"type": "text", "text": "?"}]
            use = _Use(template, has_tools=False)
            text = self._render([{"role": "user", "content": content}], use)
            _make_room(self._writing)
            self._writing[template] = self._processor.count_placeholders(text, "image") > 0
        return self._writing[template]

    def adapt(self, messages: Sequence, template: str, tools: Sequence | None) -> list:
        """Messages with contents in a form that the template keeps; others stay as they are.

        Args:
            messages: contents are strings, or lists of parts.
            template: which they are for.
            tools: what it gets beside them.
        """
        use = _Use(template, bool(tools))
        return [self._adapted(message, use) for message in messages]

    def _adapted(self, message: Any, use: _Use) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            forms = self._forms_of(use, message.get("role", "user"))
            if forms.parts and not forms.strings:
                return {**message, "content": _as_parts(content)}
        elif isinstance(content, list) and all(_is_text(part) for part in content):
            forms = self._forms_of(use, message.get("role", "user"))
            if forms.strings and not forms.parts:
                return {**message, "content": "".join(part["text"] for part in content)}
        return message

    def _forms_of(self, use: _Use, role: str) -> Forms:
        """What a template keeps of the messages of a role."""
        key = (use, role)
        if key not in self._forms:
            string = self._render(self._around(role, " ".join(_MARKS), use), use)
            # Of several parts all must be there.
            parts = [part for mark in _MARKS for part in _as_parts(mark)]
            listed = self._render(self._around(role, parts, use), use)
            # A list that is printed as it is has its texts in quotes.
            is_printed = _is_quoted(listed) and not _is_quoted(string)
            _make_room(self._forms)
            self._forms[key] = Forms(_has_marks(string), _has_marks(listed) and not is_printed)
        return self._forms[key]

    def _around(self, role: str, content: Any, use: _Use) -> list[dict[str, Any]]:
        """A conversation in which a message of a role has its place."""
        message = {"role": role, "content": content}
        if role == "user":
            return [message]
        user = self._adapted({"role": "user", "content": "?"}, use)
        if role in ("system", "developer"):
            return [message, user]
        if role == "assistant":
            return [user, message, user]
        asking = self._adapted({"role": "assistant", "content": "?"}, use)
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
        answer = {"name": "f", "tool_call_id": call["id"]}
        return [user, {**asking, "tool_calls": [call]}, {**message, **answer}]

    def _render(self, messages: list, use: _Use) -> str:
        """A conversation as text; empty where the template refuses it."""
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=[_TOOL] if use.has_tools else None,
                add_generation_prompt=True,
                **self.arguments(use.template),
            )
        except RequestError:  # the tokenizer's own fault
            raise
        except Exception:  # whatever a template raises on a form that it does not take
            return ""

    def arguments(self, template: str) -> dict[str, Any]:
        """How the tokenizer is told of a template; not at all of its own."""
        return {} if template == self._tokenizers_own else {"chat_template": template}


def _named(template: Any, tools: Sequence | None) -> Any:
    """One of several templates, as Hugging Face chooses among them."""
    if not isinstance(template, Mapping):
        return template
    return template.get("tool_use" if tools and "tool_use" in template else "default")


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_text(part: Any) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _has_marks(text: str) -> bool:
    return all(mark in text for mark in _MARKS)


def _is_quoted(text: str) -> bool:
    return any(f"{quote}{_MARKS[0]}" in text for quote in "'\"")


def _make_room(known: dict) -> None:
    """Forgets all where a caller has a new template for every conversation."""
    if len(known) >= _MOST_KNOWN:
        known.clear()
