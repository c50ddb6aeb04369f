"""Chat templates for models whose checkpoints have none that can take images."""

from typing import NamedTuple


class _Registered(NamedTuple):
    template: str
    replaces: bool


# By the class of the processor; `register_chat_template` adds to it.
_TEMPLATES: dict[type, _Registered] = {}


def register_chat_template(processor: type, template: str, *, replaces: bool = True) -> None:
    """Registers a template for the models of a processor, and of those that derive from it.

    It is used where the checkpoint has none that writes images.

    Args:
        processor: a `BaseMultimodalProcessor`.
        template: Jinja, as Hugging Face has them: contents are lists of parts, of which those of
            type "image" are to become the model's own placeholder.
        replaces: whether also where the checkpoint has one, which does not write images: that
            one may speak another format.
    """
    _TEMPLATES[processor] = _Registered(template, replaces)


def registered_template(processor: type, *, has_own: bool) -> str | None:
    """The template for a processor, or for what it derives from; None: there is none.

    Args:
        processor: its class.
        has_own: whether the checkpoint has one, which does not write images.
    """
    for base in processor.__mro__:
        found = _TEMPLATES.get(base)
        if found is not None and (found.replaces or not has_own):
            return found.template
    return None
