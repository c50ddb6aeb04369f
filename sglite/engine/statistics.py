"""Counts over the life of an engine, for `llm.stats()`."""

from dataclasses import dataclass


@dataclass(slots=True)
class Statistics:
    """Sums over all steps so far; prompts count when they are first admitted."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    seconds: float = 0.0

    def count_step(self, seconds: float) -> None:
        """Adds one step that took so long."""
        self.steps += 1
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the time spent in steps."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0
