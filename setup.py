"""Builds the extension `sglite._C` with ninja.

CPU kernels are compiled once for each instruction set and chosen at run time. CUDA is taken along
when SGLITE_CUDA is 1, or "auto" (the default) and both a CUDA compiler and an NVIDIA GPU are there;
SGLITE_CUDA_ARCHS names the architectures ("90a;80"), SGLITE_NVCC_FLAGS more of nvcc's flags.
SGLITE_CUDA=emulate compiles the CUDA kernels for the CPU, for tests where there is no GPU.
SGLITE_SANITIZE=address,undefined builds with sanitizers. All builds of a working tree share their
objects, those of wheels and of editable installs included. Neither libtorch nor libgomp is linked:
tensors arrive through DLPack, and OpenMP resolves to the runtime that torch has loaded.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# Flags of each CPU path. Fused multiply-add is only ever written out, so that a result does not
# depend on where the compiler chose to contract.
X86_PATHS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c",
    "portable": "",
}
PORTABLE_PATHS = {"portable": ""}
# Of the files in csrc/cpu/amx, which stand beside those of avx512, and of attention.
AMX_FLAGS = f"{X86_PATHS['avx512']} -mamx-tile -mamx-bf16"


def cuda_home():
    """The CUDA toolkit's folder, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return None
    # Asked of the compiler itself, since what is on PATH may be a wrapper or a link.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def cudart_folder(home):
    """The folder of the static CUDA runtime, which differs between the toolkit's packagings."""
    for folder in (home / "lib64", home / "lib", *home.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return folder
    raise SystemExit(f"no libcudart_static.a below {home}: the CUDA toolkit is incomplete")


def gpu_architectures():
    """Compute capabilities of the GPUs here, such as ["90a"]; empty without a driver."""
    query = shutil.which("nvidia-smi")
    if not query:
        return []
    answer = subprocess.run(
        [query, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True
    )
    if answer.returncode:
        return []
    found = {line.strip().replace(".", "") for line in answer.stdout.splitlines() if line.strip()}
    return sorted(name + "a" if name == "90" else name for name in found)


def cuda_architectures():
    """The architectures to compile for; an empty list leaves CUDA out."""
    choice = os.environ.get("SGLITE_CUDA", "auto")
    if choice == "emulate":
        return ["emulated"]
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"SGLITE_CUDA: expected 0, 1, auto or emulate, got {choice!r}")
    present = gpu_architectures()
    if choice == "0" or (choice == "auto" and not (present and cuda_home())):
        return []
    if not cuda_home():
        raise SystemExit("SGLITE_CUDA=1: no CUDA compiler; put nvcc on PATH or set CUDA_HOME")
    named = os.environ.get("SGLITE_CUDA_ARCHS")
    return named.split(";") if named else present or ["80", "90a"]


def pybind11_headers(folder):
    """A copy of pybind11's headers below `folder`.

    The environment in which pip builds a wheel is gone afterwards; headers in a place that stays
    leave its objects of use.
    """
    import pybind11

    headers = folder / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            copy = Path(shutil.copytree(pybind11.get_include(), Path(place) / "headers"))
            try:
                copy.rename(headers)
            except OSError:
                if not headers.exists():  # else another build was first
                    raise
    return headers


def ninja_path(path):
    """A path as ninja's syntax wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja for the one extension and runs ninja on it."""

    def finalize_options(self):
        """Chooses the folder of the objects, where none is named."""
        # The default, except that of an editable install's temporary folder nothing would be left.
        name = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.build_temp = self.build_temp or str(ROOT / "build" / name)
        super().finalize_options()

    def build_extension(self, ext):
        """Compiles and links `ext` into its final place."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        script = folder / "build.ninja"
        script.write_text(self.ninja_script(target, folder), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([self.ninja(), "-C", str(folder), *jobs], check=True)

    @staticmethod
    def ninja():
        """The ninja executable, from the PyPI package or the system."""
        beside = Path(sys.executable).parent / "ninja"
        found = str(beside) if beside.exists() else shutil.which("ninja")
        if not found:
            raise SystemExit("ninja is not installed: pip install ninja")
        return found

    def ninja_script(self, target, folder):
        """The text of build.ninja, for `folder`."""
        x86_linux = platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
        architectures = cuda_architectures()
        # The emulator is for tests of the CUDA kernels: the CPU's own are of no interest there.
        x86_linux = x86_linux and architectures != ["emulated"]
        paths = X86_PATHS if x86_linux else PORTABLE_PATHS
        includes = [sysconfig.get_path("include"), pybind11_headers(folder)]
        flags = (
            "-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
            "-ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi "
            "-Wno-maybe-uninitialized -Wno-uninitialized"
        )
        link = "-shared"
        if sys.platform == "linux":
            flags += " -fopenmp"
            # Lazy binding: the GOMP_* symbols arrive with torch, after this library may load.
            link += " -Wl,-z,lazy -Wl,--gc-sections"
        elif sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        if os.environ.get("SGLITE_SANITIZE"):
            sanitize = f" -fsanitize={os.environ['SGLITE_SANITIZE']} -fno-omit-frame-pointer -O1 -g"
            flags, link = flags + sanitize, link + sanitize
        # What differs from one build to the next goes to few files, whose objects are kept apart:
        # so builds with and without CUDA, in place and of a wheel, share all the others.
        variant_flags = "-DSGLITE_X86_PATHS" if x86_linux else ""
        binding_flags = " ".join(f"-I{ninja_path(folder)}" for folder in includes)
        if architectures:
            # A string for show_config, and the switch for the code that calls CUDA.
            variant_flags += f" -DSGLITE_CUDA='\"{';'.join(architectures)}\"'"
        if architectures == ["emulated"]:
            binding_flags += " -DSGLITE_EMULATED -O1"  # compiled sooner, for tests alone

        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {os.environ.get('CXX', 'g++' if sys.platform == 'linux' else 'c++')}",
            f"flags = {flags}",
            f"includes = -I{ninja_path(CSRC)}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $path_flags $includes -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx $in -o $out {link} $libraries",
        ]
        objects = []

        def compile_rule(rule, source, name, path_flags=""):
            lines.append(f"build {name}: {rule} {ninja_path(source)}")
            lines.append(f"  path_flags = {path_flags}")
            objects.append(name)

        def compile_variant(source, path_flags):
            folder = f"{zlib.crc32(path_flags.encode()):08x}"
            compile_rule("compile", source, f"{folder}/{source.relative_to(CSRC)}.o", path_flags)

        for source in sorted([*CSRC.glob("*.cpp"), *(CSRC / "ops").glob("*.cpp")]):
            compile_rule("compile", source, f"{source.relative_to(CSRC)}.o")
        for source in (CSRC / "cpu" / "dispatch.cpp", CSRC / "cuda" / "dispatch.cpp"):
            compile_variant(source, variant_flags)
        for source in sorted((CSRC / "python").glob("*.cpp")):
            asks_for_cuda = source.name == "module.cpp"
            compile_variant(source, f"{variant_flags * asks_for_cuda} {binding_flags}")
        compile_rule("compile", CSRC / "cpu" / "team.cpp", "cpu/team.o")
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.name in ("dispatch.cpp", "team.cpp"):
                continue
            for path, path_flags in paths.items():
                compile_rule(
                    "compile",
                    source,
                    f"cpu/{source.stem}.{path}.o",
                    f"-DSGLITE_CPU_PATH={path} {path_flags}",
                )
        with_tiles = [CSRC / "cpu" / "attention.cpp", *sorted((CSRC / "cpu" / "amx").glob("*.cpp"))]
        for source in with_tiles if x86_linux else []:
            name = f"cpu/{source.parent.name}.{source.stem}.amx.o"
            compile_rule("compile", source, name, f"-DSGLITE_CPU_PATH=amx {AMX_FLAGS}")
        libraries = ""
        if architectures == ["emulated"]:
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                compile_rule("compile", source, f"cuda/{source.stem}.emulated.o", "-x c++")
            compile_rule("compile", CSRC / "emulator" / "simt.cpp", "emulator/simt.o")
        elif architectures:
            home = cuda_home()
            codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)
            lines += [
                "rule nvcc",
                f"  command = {ninja_path(home / 'bin' / 'nvcc')} -MD -MF $out.d -O3 -std=c++20 "
                f"-Xcompiler -fPIC,-fvisibility=hidden {os.environ.get('SGLITE_NVCC_FLAGS', '')} "
                f"{codes} -I{ninja_path(CSRC)} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                compile_rule("nvcc", source, f"cuda/{source.stem}.cu.o")
            libraries = f"-L{ninja_path(cudart_folder(home))} -lcudart_static -ldl -lrt -lpthread"
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        lines.append(f"  libraries = {libraries}")
        lines.append(f"default {ninja_path(target)}")
        return "\n".join(lines) + "\n"


setup(ext_modules=[Extension("sglite._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
