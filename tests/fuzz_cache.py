"""The state machines of pool, tree and prefix cache for long: `python -m tests.fuzz_cache`.

`SGLITE_BUILD=asan` runs them on the build with sanitizers.
"""

import argparse
import time

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.builds import use_chosen_build


def main() -> None:
    """The command line."""
    use_chosen_build()
    from tests.cache.test_page_pool import PoolMachine
    from tests.cache.test_prefix_cache import CacheMachine
    from tests.cache.test_radix_tree_model import TreeMachine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    chosen = settings(
        max_examples=200,
        stateful_step_count=80,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    rounds = 0
    while time.monotonic() < end:
        for machine in (PoolMachine, TreeMachine, CacheMachine):
            run_state_machine_as_test(machine, settings=chosen)
        rounds += 1
        print(f"{rounds * 200} runs of each machine, of 80 steps each", flush=True)


if __name__ == "__main__":
    main()
