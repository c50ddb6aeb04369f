"""Loads an extension built with CUDA from the folder given, and says what it holds.

Not a test of pytest: the build lies outside the package. Loading it needs no GPU and no driver.
"""

import importlib.util
import sys
from pathlib import Path

import torch  # noqa: F401  (the extension resolves OpenMP through it)

(library,) = Path(sys.argv[1]).glob("_C*.so")
spec = importlib.util.spec_from_file_location("_C", library)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if not module.cuda_architectures:
    raise SystemExit(f"{library} was built without CUDA")
print(
    f"{library.name}: CUDA for {module.cuda_architectures}, {module.cuda_device_count()} GPUs here"
)
