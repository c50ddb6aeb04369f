"""Chat templates for models whose checkpoints have none that can take images."""

# By the class of the processor; `register_chat_template` adds to it.
_TEMPLATES: dict[type, str] = {}


def register_chat_template(processor: type, template: str) -> None:
    """Registers a template for the models of a processor, and of those that derive from it.

    Args:
        processor: a `BaseMultimodalProcessor`.
        template: Jinja, as Hugging Face has them: contents are lists of parts, of which those of
            type "image" are to become the model's own placeholder.
    """
    _TEMPLATES[processor] = template


def fallback_template(processor: type) -> str | None:
    """The template for a processor, or for what it derives from; None: there is none."""
    return next((_TEMPLATES[base] for base in processor.__mro__ if base in _TEMPLATES), None)
