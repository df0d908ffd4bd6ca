"""Builds libraries of formulas in build/, once for what they are made of, and opens them for a test."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from torchbp.ops.kernels import _build, _library

FOLDER = Path(__file__).parents[3] / "build" / "kernels"


def library(sources: dict[str, str]) -> Path:
    """Return the library of ``sources``, built where it is not there; several processes may ask at once."""
    made_of = "".join(sorted(sources)) + _library.version()
    file = FOLDER / f"{sha256(made_of.encode()).hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _build.build(sources, file)
    return file


@contextmanager
def opened(sources: dict[str, str]) -> Iterator[None]:
    _library.open_library(library(sources))
    try:
        yield
    finally:
        _library.open_library(None)


@pytest.fixture
def compiled() -> Iterator[Callable[..., None]]:
    """Compile what ``run()`` asks for, for the rest of the test."""

    def compiled(run: Callable[[], object]) -> None:
        with _library.recording() as sources:
            run()
        assert sources, "no formula was asked for"
        _library.open_library(library(sources))

    yield compiled
    _library.open_library(None)
