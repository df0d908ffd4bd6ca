"""``torchbp kernels``: the formulas of the ops, compiled for this machine's CPU."""

import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from torchbp.cli._command import Command, CouldNotRun

DESCRIPTION = """\
Compiles the formulas of torchbp's ops for this machine's CPU, with its own C++ compiler: each becomes one loop over
memory, in float32 and half precision. From then on they are found, by every process that imports torchbp; training
never calls a compiler. Takes some minutes, once for a version of torchbp.

The library lies in the user's cache (~/.cache/torchbp; XDG_CACHE_HOME), or in the folder that TORCHBP_KERNELS names.
TORCHBP_KERNELS=off: don't use it.

examples:
  torchbp kernels            build them
  torchbp kernels --where    say where they are, or would be
  torchbp kernels --remove   take them away again
"""


def arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--where", action="store_true", help="print the library's path; 1: not built")
    one.add_argument("--remove", action="store_true", help="delete the library")


def run(args: Namespace) -> int:
    """Build, find or remove the library."""
    from torchbp.ops.kernels import _library

    file = _library.path()
    if file is None:
        raise CouldNotRun("expected TORCHBP_KERNELS to be unset or a folder, got off")
    if args.where:
        print(file)
        return 0 if file.exists() else 1
    if args.remove:
        print(f"removed {file}" if file.exists() else f"not there: {file}")
        file.unlink(missing_ok=True)
        return 0
    return _build(file)


def _build(file: Path) -> int:
    from torchbp.ops._op import all_ops
    from torchbp.ops.kernels import _build, _library

    command = _build.compiler()
    if command is None:
        rule = "a C++ compiler (c++, g++, clang++ or $CXX)"
        raise CouldNotRun(f"expected {rule}, got none; install one")
    start = time.monotonic()
    ops, sources = all_ops(), {}
    say = _Progress()
    for i, (name, op) in enumerate(ops.items(), 1):
        say(f"formulas of {name}, {i} of {len(ops)} ops")
        sources |= _build.asked_for({name: op})
    try:
        _build.build(sources, file, lambda done, of: say(f"compiled {done} of {of} formulas"))
    except RuntimeError as reason:
        raise CouldNotRun(str(reason)) from None
    say.end()
    seconds = time.monotonic() - start
    instructions = _library.capability()
    print(
        f"{len(sources)} formulas of {len(ops)} ops for {instructions}, in {seconds:.0f} s: {file}"
    )
    return 0


class _Progress:
    """One line that is written over in a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


COMMAND = Command(
    help="compile the ops' formulas for this machine's CPU",
    description=DESCRIPTION,
    arguments=arguments,
    run=run,
)
