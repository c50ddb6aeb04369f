"""Conversations as prompts, by the checkpoint's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from sglite.engine.tokenizer import Tokenizer
from sglite.interface.errors import InvalidRequestError
from sglite.interface.prompts import Prompt


def render_conversations(
    tokenizer: Tokenizer,
    model: str,
    messages: Sequence,
    tools: Sequence | None,
    template_arguments: Mapping[str, Any] | None,
) -> tuple[list[Prompt], bool]:
    """The prompts of one conversation or of a list of them, and whether it was one.

    Args:
        tokenizer: whose template it is.
        model: how messages call the checkpoint.
        messages: dicts with `role` and `content`, or a list of such lists.
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
    if conversations and not getattr(tokenizer.hf, "chat_template", None):
        raise InvalidRequestError(
            f"{model} has no chat template; use generate(), or set llm.tokenizer.chat_template"
        )
    arguments = {"add_generation_prompt": True, **(template_arguments or {})}
    return [_render(tokenizer, one, tools, arguments) for one in conversations], is_single


def _render(tokenizer: Tokenizer, conversation: Sequence, tools, arguments: Mapping) -> Prompt:
    try:
        text = tokenizer.apply_chat_template(conversation, tools=tools, **arguments)
    except Exception as error:
        raise InvalidRequestError(f"the chat template refuses the conversation: {error}") from error
    # The template writes the special tokens itself, a BOS among them.
    return Prompt(text=text, token_ids=tuple(tokenizer.encode(text, add_special_tokens=False)))
