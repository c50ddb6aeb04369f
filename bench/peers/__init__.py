"""One short file for each engine: a class that `bench.runner.serve` drives in its own process."""
