"""The bar that a batch shows while it runs."""

import sys
import threading

from tqdm.auto import tqdm


class ProgressBar(tqdm):
    """A tqdm bar that leaves nothing behind in the process.

    The first bar of tqdm's own makes a lock that settles multiprocessing's start method, and starts
    a thread that stays.
    """

    _lock = threading.RLock()
    monitor_interval = 0


def someone_is_watching() -> bool:
    """Whether output goes to a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
