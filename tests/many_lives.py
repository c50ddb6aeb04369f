"""Makes, uses and drops an LLM again and again: `python -m tests.many_lives --count 200`.

Resident memory after the last must be within 1 % of what it was after the tenth.
"""

import argparse
import json
import sys

import psutil

from sglite import LLM


def main() -> None:
    """The command line; prints the resident memory of every tenth life."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--most-growth", type=float, default=0.01)
    arguments = parser.parse_args()
    process, resident = psutil.Process(), []
    for _ in range(arguments.count):
        llm = LLM("demo")
        assert "42" in llm.generate("What is 17 + 25?", temperature=0).text
        del llm
        resident.append(process.memory_info().rss)
    growth = resident[-1] / resident[9] - 1
    print(json.dumps({"growth": growth, "MiB": [rss >> 20 for rss in resident[9::10]]}))
    sys.exit(growth > arguments.most_growth)


if __name__ == "__main__":
    main()
