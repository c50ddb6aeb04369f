"""The token ids that a check of invariance computes."""

from typing import Any

from sglite.engine.calls import Calls
from sglite.engine.intake import Intake
from sglite.engine.invariance.plans import Settings, builtin_prompts
from sglite.interface.errors import InvalidRequestError
from sglite.interface.prompts import normalize_prompts


def read_prompts(prompts: Any, calls: Calls, intake: Intake, settings: Settings) -> list[list[int]]:
    """Token ids of each prompt, all of which have room for what follows them.

    Args:
        prompts: as `LLM.generate` takes them; None: `builtin_prompts`.
        calls: of the LLM.
        intake: likewise.
        settings: of the check.

    Raises:
        InvalidRequestError: a prompt is wrong, or there is none.
    """
    if prompts is None:
        limits = intake.limits
        most = min(limits.context_length, limits.kv_cache_tokens) - settings.room
        prompts = builtin_prompts(limits.vocab_size, max(1, most), intake.reader.reserved_ids)
    given, _ = normalize_prompts(prompts)
    if not given:
        raise InvalidRequestError("prompts=[] is not allowed: there is nothing to compare")
    if any(prompt.images or prompt.videos for prompt in given):
        raise InvalidRequestError("check_invariance compares prompts of text, without images")
    work = calls.prepare(given, False, None, {"max_new_tokens": settings.room, "seed": 0})
    return [group.requests[0].prompt_token_ids.tolist() for group in work.groups]
