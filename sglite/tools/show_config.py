"""What this installation consists of: for bug reports."""

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

from sglite import _C, __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy")


def collect_config() -> dict[str, str]:
    """The report of `show_config` as a dict from name to value."""
    report = {
        "sglite": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        report[package] = importlib.metadata.version(package)
    report["CPU path"] = f"{_C.cpu_path()} (of {', '.join(_C.available_cpu_paths())})"
    report["CPU threads"] = str(torch.get_num_threads())
    if _C.cuda_architectures:
        report["CUDA in the extension"] = f"yes, for {_C.cuda_architectures.replace(';', ', ')}"
    else:
        report["CUDA in the extension"] = "no (build with SGLITE_CUDA=1)"
    report["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return report


def show_config() -> None:
    """Prints versions, the CPU path chosen, and what CUDA code the extension holds."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in collect_config().items():
        table.add_row(name, value)
    Console().print(table)
