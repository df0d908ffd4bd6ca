"""What several commands take: things named ``module:name``, and random arguments by shape."""

import importlib
import importlib.util
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any, NamedTuple

from torchbp.cli._command import CouldNotRun

__all__ = ["Input", "add_inputs", "load", "sample"]


LARGEST_SEED = 2**62  # of torch's generators it is 2**63, and a command may add to it


class Input(NamedTuple):
    shape: tuple[int, ...]
    below: int | None = None  # integers in [0, below); None: floating point


def _shape(text: str) -> Input:
    sizes = text.strip("()")
    try:
        shape = tuple(map(int, sizes.removesuffix(",").split(","))) if sizes.strip() else ()
    except ValueError:
        raise ArgumentTypeError(f"expected sizes such as 3,4, got {text!r}") from None
    if any(n < 0 for n in shape):
        raise ArgumentTypeError(f"expected sizes of 0 or more, got {text!r}")
    return Input(shape)


def _integers(text: str) -> Input:
    shape, colon, below = text.rpartition(":")
    if not colon or not below.isdigit() or int(below) < 1:
        raise ArgumentTypeError(f"expected SHAPE:BELOW such as 8:10, got {text!r}")
    return Input(_shape(shape).shape, int(below))


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = LARGEST_SEED
    if abs(seed) >= LARGEST_SEED:
        raise ArgumentTypeError(f"expected a whole number below 2**62, got {text!r}")
    return seed


def add_inputs(parser: ArgumentParser, dtype: str) -> None:
    """Add --shape, --integers, --dtype, --device and --seed."""
    add = parser.add_argument
    add(
        "--shape",
        dest="inputs",
        action="append",
        type=_shape,
        metavar="3,4",
        help="a random floating-point argument of this shape; () for a scalar tensor",
    )
    add(
        "--integers",
        dest="inputs",
        action="append",
        type=_integers,
        metavar="8:10",
        help="an integer argument: a shape, and what its values are below",
    )
    add("--dtype", default=dtype, help="of the floating-point arguments (default: %(default)s)")
    add("--device", default="cpu", help="of the arguments (default: cpu)")
    add("--seed", type=_seed, default=0, help="of every random number (default: 0)")


def load(text: str) -> Any:
    """Return what ``module:name`` or ``file.py:name`` names, imported."""
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise CouldNotRun(f"expected module:name or file.py:name, got {text!r}")
    try:
        found: Any = _file(Path(where)) if where.endswith(".py") else _module(where)
    except CouldNotRun:
        raise
    except (Exception, SystemExit) as error:
        raise CouldNotRun(f"importing {where}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise CouldNotRun(f"expected {part!r} in {where}, got no such name")
        found = getattr(found, part)
    return found


def sample(args: Namespace, requires_grad: bool) -> tuple[Any, ...]:
    """Return the arguments that --shape and --integers ask for, random after --seed."""
    import torch

    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        raise CouldNotRun(f"expected a floating-point or complex --dtype, got {args.dtype}")
    generator = torch.Generator().manual_seed(args.seed)
    try:
        return tuple(
            torch.randn(
                i.shape,
                generator=generator,
                dtype=torch.complex128 if dtype.is_complex else torch.float64,
            )
            .to(device=args.device, dtype=dtype)
            .requires_grad_(requires_grad)
            if i.below is None
            else torch.randint(i.below, i.shape, generator=generator).to(args.device)
            for i in args.inputs
        )
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for a GPU
        raise CouldNotRun(f"--device {args.device}: {str(error).splitlines()[0]}") from error


def _module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(Path.cwd()))


def _file(path: Path) -> Any:
    if not path.is_file():
        raise CouldNotRun(f"expected a Python file, got {path}, which does not exist")
    # A file named as a module that is there already takes the place of none.
    name = f"{path.stem} in {path.parent}" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CouldNotRun(f"expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module
