"""What of a process everybody in it shares, and programs that look at it while they run models.

This module must not import sglite: its import is one of the things that are looked at.
"""

import asyncio
import faulthandler
import gc
import hashlib
import json
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

_QUESTION = "What is 17 + 25?"
_DEMO = Path(__file__).parents[1] / "sglite" / "checkpoints" / "demo"


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def random_state() -> dict[str, str]:
    """Of all generators that libraries draw from."""
    return {
        "random": _digest(random.getstate()),
        "numpy": _digest([np.asarray(part).tolist() for part in np.random.get_state()[1:]]),
        "torch": _digest(torch.get_rng_state().tolist()),
        "torch's seed": str(torch.initial_seed()),
    }


def host_state() -> dict[str, str]:
    """Global settings by name, as text that can be compared between processes."""
    umask = os.umask(0)
    os.umask(umask)
    root = logging.getLogger()
    state = {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "warn always": torch.is_warn_always_enabled(),
        "numpy's errors": np.geterr(),
        "signals": {int(number): _name(signal.getsignal(number)) for number in _signals()},
        "wake-up fd": _wakeup_fd(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "excepthooks": [
            _name(hook)
            for hook in (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook)
        ],
        "tracing": (sys.gettrace(), sys.getprofile()),
        "async hooks": sys.get_asyncgen_hooks(),
        "event loops": type(asyncio.get_event_loop_policy()).__name__,
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "import path": sys.path,
        "import hooks": [_name(finder) for finder in sys.meta_path],
        "streams": [stream is original for stream, original in _streams()],
        "collector": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "folder": os.getcwd(),
        "umask": umask,
        "locale": locale.setlocale(locale.LC_ALL),
        "faulthandler": faulthandler.is_enabled(),
        "limits": [resource.getrlimit(kind) for kind in range(10)],
        "warning filters": warnings.filters,
        "warning hook": _name(warnings.showwarning),
        "logging": (root.level, root.handlers, logging.root.manager.disable),
        "logging of transformers": logging.getLogger("transformers").level,
    }
    state |= {f"environment: {name}": value for name, value in os.environ.items()}
    return {name: str(value) for name, value in state.items()}


def _signals() -> list[int]:
    return [number for number in signal.valid_signals() if number not in (9, 19)]


def _wakeup_fd() -> int:
    found = signal.set_wakeup_fd(-1)
    if found != -1:
        signal.set_wakeup_fd(found)
    return found


def _streams():
    return (sys.stdin, sys.__stdin__), (sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)


def _name(hook: object) -> str:
    """A hook without its address."""
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def run_transformers_alone():
    """A child process: what transformers changes by being imported and run."""
    states = [host_state()]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    states.append(host_state())
    model = AutoModelForCausalLM.from_pretrained(_DEMO)
    tokenizer = AutoTokenizer.from_pretrained(_DEMO)
    model.generate(**tokenizer(_QUESTION, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    states.append(host_state())
    print(json.dumps(states))


def run_sglite():
    """A child process: the state at every stage of an LLM's life, and what is random."""
    stages, draws, before = {}, {}, set(threading.enumerate())

    def look(name):
        stages[name], draws[name] = host_state(), random_state()

    look("before")
    import sglite

    llm = sglite.LLM("demo", kv_cache_tokens=2048)
    look("loaded")
    for number, _ in enumerate(llm.stream([_QUESTION] * 3, temperature=1.0, seed=1)):
        if number == 5:
            look("during")
    llm.generate([_QUESTION] * 3, temperature=0, progress=True)
    llm.chat([{"role": "user", "content": _QUESTION}], temperature=0)
    look("after calls")
    llm.close()
    look("closed")
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    # From here on it is transformers that loads; a thread of tqdm's stays behind its bar.
    llm = sglite.LLM("demo", architecture="transformers", kv_cache_tokens=512)
    llm.generate(_QUESTION, temperature=0)
    look("with another")
    llm.close()
    look("closed again")
    print(json.dumps([stages, draws, left]))
