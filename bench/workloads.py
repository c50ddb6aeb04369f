"""The four workloads: how many prompts, how long, how many new tokens.

Needs the standard library only, as every process of a comparison imports it.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Prompts of random token ids, answered greedily with end tokens ignored.

    Attributes:
        name: what `--workload` calls it.
        num_prompts: prompts, all handed over in one call.
        shared_tokens: tokens that all prompts begin with.
        own_tokens: tokens of each prompt after those.
        new_tokens: tokens to generate for each prompt.
        counts_prompt: whether tok/s counts the tokens of the prompts instead of the new ones.
    """

    name: str
    num_prompts: int
    shared_tokens: int
    own_tokens: int
    new_tokens: int
    counts_prompt: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of one prompt."""
        return self.shared_tokens + self.own_tokens

    @property
    def counted_tokens(self) -> int:
        """What tok/s counts."""
        return self.num_prompts * (self.prompt_tokens if self.counts_prompt else self.new_tokens)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values are held at the end, if no prefix is shared."""
        return self.num_prompts * (self.prompt_tokens + self.new_tokens)

    def prompts(self, repeat: int, vocab_size: int) -> list[list[int]]:
        """The prompts of one repeat, the same in every process.

        Another repeat gets other tokens, the shared ones too, so that a prefix cache gains nothing
        from the repeats before.
        """
        source = random.Random(f"{self.name} {repeat}")

        def tokens(count: int) -> list[int]:
            # Id 0 ends a text in the checkpoints made here.
            return source.choices(range(1, vocab_size), k=count)

        shared = tokens(self.shared_tokens)
        return [shared + tokens(self.own_tokens) for _ in range(self.num_prompts)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("single", 1, 0, 128, 128),
        Workload("batch", 32, 0, 128, 64),
        Workload("shared", 32, 1024, 32, 32),
        Workload("prefill", 1, 0, 2048, 1, counts_prompt=True),
    )
}
