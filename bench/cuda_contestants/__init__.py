"""One short file for each contestant of `bench/cuda_decode.py`, run in a process of its own."""
