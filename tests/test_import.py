"""What importing costs, and what it must not do."""

import subprocess
import sys

import sglite


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout


def test_every_public_name_is_there():
    for name in sglite.__all__:
        assert getattr(sglite, name) is not None
    assert set(sglite.__all__) <= set(dir(sglite))


def test_import_is_quick_beside_torch_and_transformers():
    """As a share of the processor time that these two take, whatever else the machine does."""
    code = """
from time import process_time
start = process_time()
import torch, transformers
theirs = process_time()
import sglite
from sglite import LLM, SamplingParams, register
print((process_time() - theirs) / (theirs - start))
"""
    assert min(float(python(code)) for _ in range(2)) < 0.2


def test_import_alone_loads_no_torch():
    assert python("import sys, sglite; print('torch' in sys.modules)").strip() == "False"


def test_there_is_one_openmp_runtime_in_the_process():
    code = """
import torch
from sglite import ops
ops.rms_norm(torch.randn(4096, 64), torch.ones(64), 1e-5)
maps = open("/proc/self/maps").read().split()
print(len({word for word in maps if "gomp" in word or "libomp" in word or "iomp" in word}))
"""
    assert python(code).strip() == "1"


def test_the_extension_links_neither_torch_nor_openmp_nor_cuda():
    from sglite import _C

    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    # Of each line the library's name only: an address may spell c10 as well.
    libraries = " ".join(line.split()[0] for line in linked.splitlines())
    assert "libc.so" in libraries
    assert not any(name in libraries for name in ("torch", "c10", "gomp", "cuda"))
