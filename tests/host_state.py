"""What of a process everybody in it shares, and programs that look at it while they run models.

This module must not import sglite: its import is one of the things that are looked at.
"""

import asyncio
import faulthandler
import gc
import hashlib
import io
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
from collections.abc import Sequence
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


def unexpected(state: dict[str, str], allowed: Sequence[dict[str, str]]) -> list[str]:
    """Names of settings that are in none of the allowed states as they are in `state`."""
    return [
        name
        for name in sorted(state.keys() | allowed[0].keys())
        if state.get(name) not in [other.get(name) for other in allowed]
    ]


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
        "autocast": (torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")),
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
    if isinstance(hook, signal.Handlers):
        return hook.name
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
    _interrupt(llm)
    look("after an interrupt")
    fail_a_step(llm, sglite.GenerationError)
    look("after a failure")
    asyncio.run(_generate_in_loop(llm))
    look("after a loop")
    llm.check_invariance(
        [_QUESTION], new_tokens=3, batch_sizes=(2,), chunk_sizes=(5,), prompt_logits=4
    )
    look("after a check")
    llm.close()
    look("closed")
    with sglite.LLM("demo-vl", kv_cache_tokens=1024) as seeing:
        image = np.full((50, 70, 3), 200, np.uint8)
        seeing.generate("<image>What is this?", images=image, max_new_tokens=3)
        look("after a picture")
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    # From here on it is transformers that loads; a thread of tqdm's stays behind its bar.
    llm = sglite.LLM("demo", architecture="transformers", kv_cache_tokens=512)
    llm.generate(_QUESTION, temperature=0)
    look("with another")
    llm.close()
    look("closed again")
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(_DEMO)
    with sglite.LLM(module, tokenizer=_DEMO, kv_cache_tokens=512) as live:
        live.generate(_QUESTION, temperature=0)
        look("with a live module")
    print(json.dumps([stages, draws, left]))


def _interrupt(llm) -> None:
    def press(token_ids, logits):
        if len(token_ids) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return logits

    try:
        llm.generate(_QUESTION, max_new_tokens=50, ignore_eos=True, logits_processors=[press])
    except KeyboardInterrupt:
        llm.generate(_QUESTION, max_new_tokens=2)
    else:
        raise AssertionError("there was no interrupt")


def fail_a_step(llm, error: type[Exception]) -> None:
    """Has one call fail with `GenerationError`, which is given; the next will work."""
    forward = llm.model.forward
    llm.model.forward = None
    try:
        llm.generate(_QUESTION)
    except error:
        llm.model.forward = forward
    else:
        raise AssertionError("there was no failure")


async def _generate_in_loop(llm) -> None:
    before = host_state()  # with what a running loop has set
    await asyncio.gather(*[llm.agenerate(_QUESTION, max_new_tokens=3) for _ in range(2)])
    async for _ in llm.astream(_QUESTION, max_new_tokens=3):
        changed = unexpected(host_state(), [before])
        assert not changed, changed


def change_everything():
    """A child process: changes one setting after the other; prints what the comparison sees."""
    _reading, writing = os.pipe()
    os.set_blocking(writing, False)

    class Loops(asyncio.DefaultEventLoopPolicy):
        pass

    def hook(*arguments):
        return None

    root, none = logging.getLogger(), io.StringIO()
    changes = {
        # Before anything has run in parallel.
        "interop threads": lambda: torch.set_num_interop_threads(
            torch.get_num_interop_threads() + 1
        ),
        "dtype": lambda: torch.set_default_dtype(torch.float64),
        "grad mode": lambda: torch.set_grad_enabled(False),
        "inference mode": torch.inference_mode().__enter__,
        "autocast": lambda: torch.set_autocast_enabled("cpu", True),
        "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
        "deterministic": lambda: torch.use_deterministic_algorithms(True),
        "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        "tf32": lambda: torch.set_float32_matmul_precision("high"),
        "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
        "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
        "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
        "warn always": lambda: torch.set_warn_always(True),
        "numpy's errors": lambda: np.seterr(over="raise"),
        "signals": lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
        "wake-up fd": lambda: signal.set_wakeup_fd(writing),
        "start method": lambda: multiprocessing.set_start_method("forkserver"),
        "excepthooks": lambda: setattr(threading, "excepthook", hook),
        "tracing": lambda: sys.setprofile(hook),
        "async hooks": lambda: sys.set_asyncgen_hooks(firstiter=hook),
        "event loops": lambda: asyncio.set_event_loop_policy(Loops()),
        "recursion limit": lambda: sys.setrecursionlimit(1234),
        "switch interval": lambda: sys.setswitchinterval(0.5),
        "import path": lambda: sys.path.append("/nowhere"),
        "import hooks": lambda: sys.meta_path.append(hook),
        "streams": lambda: setattr(sys, "stderr", none),
        "collector": gc.disable,
        "folder": lambda: os.chdir("/"),
        "umask": lambda: os.umask(0o123),
        "locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
        "faulthandler": lambda: faulthandler.enable(sys.__stderr__),
        "limits": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        "warning filters": lambda: warnings.simplefilter("error"),
        "warning hook": lambda: setattr(warnings, "showwarning", hook),
        "logging": lambda: root.setLevel(logging.DEBUG),
        "logging of transformers": lambda: logging.getLogger("transformers").setLevel(7),
        "environment: NEW": lambda: os.environ.update(NEW="1"),
        "environment: PATH": lambda: os.environ.pop("PATH"),
        "device": lambda: torch.set_default_device("meta"),
    }
    seen = {}
    for name, change in changes.items():
        before = host_state()
        change()
        seen[name] = unexpected(host_state(), [before])
    torch.set_default_device(None)
    sys.setprofile(None)
    drawn = {
        "random": random.random,
        "numpy": np.random.rand,
        "torch": lambda: torch.rand(1),
        "torch's seed": lambda: torch.manual_seed(5),
    }
    for name, change in drawn.items():
        before = random_state()
        change()
        seen[name] = unexpected(random_state(), [before])
    print(json.dumps([seen, list(host_state())]))
