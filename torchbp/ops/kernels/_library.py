"""Where the compiled formulas lie, and how one is found: a shared library in the user's cache, one symbol a formula.

Its name tells of what it was built: the headers, and the instructions that torch, too, would use on this processor.
So another version's or another processor's library is not found, rather than wrong.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "FLAGS",
    "HERE",
    "at_hand",
    "capability",
    "disabled",
    "find",
    "flags",
    "listed",
    "open_library",
    "path",
    "recording",
    "remembered",
    "version",
]

HERE = Path(__file__).parent
_VARIABLE = "TORCHBP_KERNELS"
# GCC and clang: contraction of products and sums where the processor has it, no traps and no errno, as torch's kernels.
_COMMON = "-std=c++17 -O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast"
_AVX2 = "-mavx2 -mfma -mf16c"
FLAGS = {
    "AVX512": f"{_COMMON} {_AVX2} -mavx512f -mavx512vl -mavx512bw -mavx512dq -mprefer-vector-width=512",
    "AVX2": f"{_COMMON} {_AVX2}",
}


def capability() -> str:
    """Return the instructions that torch uses on this processor, ``"AVX512"`` or ``"AVX2"``, else ``"DEFAULT"``."""
    return torch.backends.cpu.get_cpu_capability()


def flags() -> str:
    """Return the compiler's options for this processor."""
    return FLAGS.get(capability(), _COMMON)


def path() -> Path | None:
    """Return where this version's library is or would be; ``None`` where TORCHBP_KERNELS=off.

    Set to a folder, the variable stands for the user's cache.
    """
    given = os.environ.get(_VARIABLE, "")
    if given.lower() in ("off", "0"):
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given or home / "torchbp") / f"kernels-{version()}.so"


@cache
def version() -> str:
    headers = "".join(file.read_text() for file in sorted(HERE.rglob("*.h")))
    made_of = f"{headers} {flags()} {sys.platform}"
    return f"{capability().lower()}-{sha256(made_of.encode()).hexdigest()[:12]}"


class _State:
    opened: ctypes.CDLL | None = None
    wanted: dict[str, str] | None = None  # while the sources are listed


def open_library(file: Path | None) -> None:
    """Take the kernels of ``file`` from now on; ``None``: none."""
    remembered.clear()
    _State.opened = ctypes.CDLL(str(file)) if file is not None else None


def at_hand() -> bool:
    """Whether there are compiled formulas, or they are being listed for the compiler."""
    return _State.opened is not None or _State.wanted is not None


def listed() -> bool:
    """Whether formulas are being listed for the compiler, those too that gain nothing at the size at hand."""
    return _State.wanted is not None


# What has been asked for already; another library may have other kernels.
remembered: dict[Any, Any] = {}


def named(body: str) -> tuple[str, str]:
    """Return the name of a function, a digest of its ``body``, parameters included, and its whole text."""
    name = f"torchbp_{sha256(body.encode()).hexdigest()[:20]}"
    return name, f'extern "C" void {name}{body}'


def find(name: str, text: str) -> Any:
    """Return the compiled function ``name``, whose source is ``text``; ``None`` where it was not built."""
    if _State.wanted is not None:
        _State.wanted[name] = text
        return None
    return getattr(_State.opened, name, None)


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Collect the sources, by name, of what formulas ask for here; they run uncompiled meanwhile."""
    before, _State.wanted = _State.wanted, {}
    try:
        yield _State.wanted
    finally:
        _State.wanted = before
        remembered.clear()


@contextmanager
def disabled() -> Iterator[None]:
    """Run formulas uncompiled here."""
    before, _State.opened = _State.opened, None
    try:
        yield
    finally:
        _State.opened = before


def _open_what_is_there() -> None:
    file = path()
    if file is None or not file.exists():
        return
    try:
        open_library(file)
    except OSError as error:
        advice = "`torchbp kernels` builds it again; TORCHBP_KERNELS=off leaves it alone"
        warnings.warn(f"kernels: {file} can't be loaded ({error}); {advice}", stacklevel=2)


_open_what_is_there()
