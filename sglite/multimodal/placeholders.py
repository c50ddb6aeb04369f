"""Where in a prompt's tokens its images and videos stand."""

from collections.abc import Iterable, Sequence

from sglite.multimodal.inputs import MultimodalItem, ProcessedMedia

#: The tokens that a medium takes the place of: (start, stop, medium).
Place = tuple[int, int, ProcessedMedia]


def find_places(
    token_ids: Sequence[int], token_id: int | None, media: Sequence[ProcessedMedia]
) -> list[Place] | None:
    """The places of media, each of which has one placeholder or as many as rows of embeddings.

    Args:
        token_ids: of the prompt.
        token_id: the placeholder; None: the tokenizer does not know it.
        media: in the order of their placeholders.

    Returns:
        One for each medium; None if there are more or fewer placeholders, or some stand apart.
    """
    found = [index for index, other in enumerate(token_ids) if other == token_id]
    if len(found) == len(media):
        return [(index, index + 1, one) for index, one in zip(found, media, strict=True)]
    if not media or len(found) != sum(one.num_tokens for one in media):
        return None
    places, begin = [], 0
    for one in media:
        own = found[begin : begin + one.num_tokens]
        begin += one.num_tokens
        if own[-1] - own[0] != len(own) - 1:
            return None
        places.append((own[0], own[-1] + 1, one))
    return places


def expand(
    token_ids: Sequence[int], places: Iterable[Place]
) -> tuple[list[int], list[MultimodalItem]]:
    """The token ids with as many placeholders as rows of embeddings, and where they are."""
    expanded: list[int] = []
    items = []
    end = 0
    for start, stop, medium in sorted(places, key=lambda place: place[0]):
        expanded += token_ids[end:start]
        begin = len(expanded)
        expanded += [token_ids[start]] * medium.num_tokens
        items.append(
            MultimodalItem(medium.modality, medium.pixel_values, begin, len(expanded), medium.data)
        )
        end = stop
    return expanded + list(token_ids[end:]), items
