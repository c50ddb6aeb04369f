"""Which GPU, driver and versions a result was measured with."""

import importlib.metadata
import os
import platform
import subprocess

import torch

from bench.machine import processor


def cuda_machine() -> dict[str, object]:
    """What a reader has to know of the machine and the software to judge a figure."""
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": driver.strip().splitlines()[-1] if driver.strip() else "unknown",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{
            name: _version(name)
            for name in ("torch", "triton", "transformers", "flashinfer-python")
        },
    }


def _version(package: str) -> str | None:
    found = importlib.metadata.distributions(name=package)
    return next((distribution.version for distribution in found), None)
