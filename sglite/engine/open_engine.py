"""An engine that takes calls: all that an `LLM` has while it is open, and lets go of at once."""

from collections.abc import Callable
from functools import partial

from torch import nn

from sglite.engine.calls import Calls
from sglite.engine.device import EngineThread
from sglite.engine.driver import Driver
from sglite.engine.engine import Engine
from sglite.engine.intake import Intake
from sglite.engine.tokenizer import Tokenizer
from sglite.interface.config import EngineConfig


class OpenEngine:
    """An engine, the thread that runs its steps, and what makes and runs requests.

    Args:
        config: every setting.
        thread: the state of the threads that run steps; `close` closes it.
        model: what computes the logits.
        tokenizer: of the model.
        intake: makes requests.
        make_engine: `make_engine(config)` gives an engine over the model.

    Attributes:
        config, model, tokenizer, intake, make_engine: as given.
        engine: only the driver's to touch while requests run.
        driver: runs the engine's steps.
        calls: what callers wait for.
    """

    def __init__(
        self,
        config: EngineConfig,
        thread: EngineThread,
        model: nn.Module,
        tokenizer: Tokenizer,
        intake: Intake,
        make_engine: Callable[..., Engine],
    ):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.intake = intake
        self.make_engine = make_engine
        self.engine = make_engine(config)
        self.driver = Driver(self.engine, thread)
        self.calls = Calls(intake, self.driver)
        self._thread = thread

    def close(self, patience: float | None = None) -> None:
        """Ends running requests, then drops weights and cache. May be called again.

        Args:
            patience: seconds that it waits at most; then, and within a step, the driver's thread
                drops them once that has ended. In a fork there is nothing to wait for.
        """
        if not self.driver.is_forked:
            self.driver.close(partial(_release, self.engine, self._thread), patience)


def _release(engine: Engine, thread: EngineThread) -> None:
    engine.close()
    thread.close()
