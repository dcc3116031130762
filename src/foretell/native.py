"""The C++ of foretell, compiled by this machine's own compiler for its own processor, once.

Without a compiler, on another system than Linux or beside another OpenMP than PyTorch's nothing is missing but its
speed. What was compiled is kept under `$XDG_CACHE_HOME/foretell/native` (`~/.cache` where that is not set).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

NAMES = "streamed.cpp", "attended.cpp", "sampled.cpp", "planned.cpp", "vectors.h", "products.h"
SOURCES = [Path(__file__).parent / name for name in NAMES]
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
PATIENCE = 120  # seconds for the compiler, which takes some five
OPENMP = ("libgomp", "libomp", "libiomp")
CPUINFO, MAPS = Path("/proc/cpuinfo"), Path("/proc/self/maps")


def library() -> ctypes.CDLL | None:
    """It, or None where it can't be had (`why_not` says why)."""
    return _loaded()[0]


def why_not() -> str | None:
    """Why there is none, or None."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if sys.platform != "linux":
        return None, f"that is for Linux, and this is {sys.platform}"
    if not torch.backends.openmp.is_available():
        return None, "this build of PyTorch has no OpenMP"
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C++ compiler (c++, g++ or clang++; CXX names another)"
    try:
        with _folder() as folder:
            return _load(_compiled(compiler, folder)), None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None)
        lines = (said if isinstance(said, str) else str(error)).strip().splitlines() or [str(error)]
        return None, f"{compiler[0]} could not make it: {lines[0]}"


def _compiler() -> list[str] | None:
    """The command of the compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


@contextmanager
def _folder() -> Iterator[Path]:
    """Where compiled code is kept or, where nothing can be, a place for this process alone, gone once it is loaded."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretell" / "native"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="foretell-native-") as own:
        yield Path(own)


def _compiled(compiler: list[str], folder: Path) -> Path:
    """The library's file there, from an earlier process if there was one on such a processor."""
    texts = [source.read_text() for source in SOURCES]
    known = hashlib.sha256(repr([texts, compiler, FLAGS, torch.__version__, _processor()]).encode())
    name = f"{known.hexdigest()[:24]}.so"
    path = folder / name
    if not path.is_file():
        part = folder / f"{name}.{os.getpid()}"
        try:
            units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
            command = [*compiler, *FLAGS, *units, "-o", str(part)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
            part.replace(path)  # at once: another process may be at it, too
        finally:
            part.unlink(missing_ok=True)
    return path


def _processor() -> str:
    """What its code was compiled for, as far as Linux tells."""
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    told = ("model name", "flags", "Features", "CPU part")
    return repr([next((line for line in lines if line.startswith(key)), "") for key in told])


def _load(path: Path) -> ctypes.CDLL:
    before = _openmp()
    loaded = ctypes.CDLL(str(path))
    if _openmp() - before:  # whose threads would stand in the way of PyTorch's
        raise OSError("it came with an OpenMP of its own beside PyTorch's")
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.foretell_lanes.restype = number
    loaded.foretell_product.restype = None
    loaded.foretell_product.argtypes = [
        pointer, number, number, number, pointer, pointer, pointer, number,
        pointer, pointer, pointer, number, number, number, ctypes.c_float,
    ]  # fmt: skip
    loaded.foretell_attend.restype = None
    loaded.foretell_attend.argtypes = [pointer] * 7
    loaded.foretell_improve.restype = None
    loaded.foretell_improve.argtypes = [pointer, number, *[pointer] * 3, ctypes.c_double, *[pointer] * 7]
    loaded.foretell_sweep.restype = None
    loaded.foretell_sweep.argtypes = [pointer, number, *[pointer] * 7]
    return loaded


def _openmp() -> set[str]:
    """Libraries of that kind in this process."""
    paths = {line.split(maxsplit=5)[-1] for line in MAPS.read_text(errors="replace").splitlines()}
    return {path for path in paths if Path(path).name.startswith(OPENMP)}
