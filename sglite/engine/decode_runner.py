"""What runs decode steps by keeping their inputs at one place."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from sglite import ops
from sglite.cache.kv_pool import KVPool
from sglite.engine.decode_state import DecodeState
from sglite.engine.drawn_tokens import DrawnTokens
from sglite.engine.sampler import Sampler
from sglite.engine.scheduler import Step


class DecodeRunner(ABC):
    """Runs steps in which every request gets its next token, over one `DecodeState`.

    Args:
        model, pool, sampler, spare_memory: as the model runner's.
        vocab_size: width of the logits.
        max_requests: requests of a step at most.
        max_tokens: positions of a request at most.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: KVPool,
        sampler: Sampler,
        spare_memory: ops.SpareMemory,
        *,
        vocab_size: int,
        max_requests: int,
        max_tokens: int,
    ):
        self._model = model
        self._pool = pool
        self._sampler = sampler
        self._spare_memory = spare_memory
        self._vocab_size = vocab_size
        self._max_requests = max_requests
        self._max_pages = -(-max_tokens // pool.page_size)

    @abstractmethod
    def takes(self, step: Step) -> bool:
        """Whether `launch` can run this step; asked right before."""

    @abstractmethod
    def launch(self, step: Step, drawn: Tensor | None, sources: Sequence[int]) -> DrawnTokens:
        """Begins a step that `takes` has agreed to.

        Args:
            step: one token of each request.
            drawn: what the step launched last has drawn.
            sources: for each request the row of `drawn` that holds the token to feed; -1 where the
                request knows it.
        """

    @abstractmethod
    def rest(self) -> None:
        """Forgets the requests of the last step."""

    @abstractmethod
    def close(self) -> None:
        """Drops the model, and what it holds for it."""

    def _make_state(self) -> DecodeState:
        return DecodeState(
            self._max_requests,
            self._max_pages,
            self._pool,
            has_mrope=getattr(self._model, "has_mrope", False),
        )
