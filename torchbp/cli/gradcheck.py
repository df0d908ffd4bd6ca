"""``torchbp gradcheck``: check the gradient of a function named on the command line."""

import importlib
import importlib.util
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torchbp.cli._command import Command, CouldNotRun

if TYPE_CHECKING:
    from torchbp.verify import Report

_DESCRIPTION = """\
Check that the gradient of a function is right: its values, its linearity in the
incoming gradient, layouts, states, edges, precisions, transforms.

FUNCTION is module:name or path/to/file.py:name; the name may be dotted. A
torch.autograd.Function is checked through its apply, a Module class is built without
arguments. One --shape or --integers for each positional argument, in order.

examples:
  torchbp gradcheck torch.nn.functional:silu --shape 3,4
  torchbp gradcheck mypackage.ops:linear --shape 4,3 --shape 5,3 --shape 5
  torchbp gradcheck loss.py:CrossEntropy --shape 8,10 --integers 8:10 \\
      --reference torch.nn.functional:cross_entropy
  torchbp gradcheck kernels.py:gelu --shape 64 --dtype float32 --json report.json
"""


class _Input(NamedTuple):
    shape: tuple[int, ...]
    below: int | None = None  # integers in [0, below); None: floating point


def _shape(text: str) -> _Input:
    parts = text.strip("()").split(",")
    try:
        shape = tuple(int(p) for p in parts if p.strip())
    except ValueError:
        raise ArgumentTypeError(f"expected sizes such as 3,4, got {text!r}") from None
    if any(n < 0 for n in shape):
        raise ArgumentTypeError(f"expected sizes of 0 or more, got {text!r}")
    return _Input(shape)


def _integers(text: str) -> _Input:
    shape, colon, below = text.rpartition(":")
    if not colon or not below.isdigit() or int(below) < 1:
        raise ArgumentTypeError(f"expected SHAPE:BELOW such as 8:10, got {text!r}")
    return _Input(_shape(shape).shape, int(below))


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("function", metavar="FUNCTION", help="module:name or path/to/file.py:name")
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
    add("--dtype", default="float64", help="of the floating-point arguments (default: float64)")
    add("--device", default="cpu", help="of the arguments (default: cpu)")
    add("--reference", metavar="FUNCTION", help="a trusted function of the same arguments")
    add("--level", choices=("quick", "full"), default="full", help="default: full")
    add("--checks", metavar="A,B", help="run only these checks")
    add("--skip", metavar="A,B", help="leave these checks out")
    add("--seed", type=int, default=0, help="of every random number (default: 0)")
    add("--deadline", type=float, metavar="SECONDS", help="begin no further check after this long")
    add("--json", type=Path, metavar="FILE", help="write the report there too")  # fmt: skip


def _run(args: Namespace) -> int:
    if args.json and not args.json.parent.is_dir():
        raise CouldNotRun(f"expected an existing folder for --json, got {args.json.parent}")
    if not args.inputs:
        raise CouldNotRun("expected a --shape for each argument, got none; for example --shape 3,4")
    report = _report(args)
    print(report)
    if args.json:
        try:
            args.json.write_text(report.to_json() + "\n")
        except OSError as error:
            raise CouldNotRun(f"--json {args.json}: {error.strerror}") from None
    return 0 if report else 1


def _report(args: Namespace) -> "Report":
    func = _load(args.function)
    reference = _load(args.reference) if args.reference else None
    inputs = _sample(args)
    from torchbp.verify import gradcheck

    try:
        return gradcheck(
            func,
            inputs,
            reference=reference,
            level=args.level,
            checks=args.checks.split(",") if args.checks else None,
            skip=args.skip.split(",") if args.skip else (),
            seed=args.seed,
            deadline=args.deadline,
            raise_exception=False,
            repeat=_line(args),
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].removeprefix("gradcheck: ")
        raise CouldNotRun(f"{type(error).__name__}: {first}") from error


def _line(args: Namespace) -> str:
    """Return this command with the place of the check's name left open."""
    words = ["torchbp", "gradcheck", args.function]
    for given in args.inputs:
        shape = ",".join(map(str, given.shape)) or "()"
        words += (
            ["--shape", shape] if given.below is None else ["--integers", f"{shape}:{given.below}"]
        )
    for name, default in {"dtype": "float64", "device": "cpu", "reference": None}.items():
        value = getattr(args, name)
        words += [f"--{name}", value] if value != default else []
    return shlex.join([*words, "--seed", str(args.seed)]) + " --checks {check}"


def _sample(args: Namespace) -> tuple[Any, ...]:
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
            .requires_grad_()
            if i.below is None
            else torch.randint(i.below, i.shape, generator=generator).to(args.device)
            for i in args.inputs
        )
    except RuntimeError as error:
        raise CouldNotRun(f"--device {args.device}: {str(error).splitlines()[0]}") from error


def _load(text: str) -> Callable[..., Any]:
    """Return what ``module:name`` or ``file.py:name`` names, as something to call."""
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise CouldNotRun(f"expected module:name or file.py:name, got {text!r}")
    try:
        found: Any = _file(Path(where)) if where.endswith(".py") else _module(where)
    except CouldNotRun:
        raise
    except Exception as error:
        raise CouldNotRun(f"importing {where}: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise CouldNotRun(f"expected {part!r} in {where}, got no such name")
        found = getattr(found, part)
    return _callable(found, text)


def _callable(found: Any, text: str) -> Callable[..., Any]:
    from torch import nn
    from torch.autograd import Function

    if isinstance(found, type) and issubclass(found, Function):
        return found.apply
    if isinstance(found, type) and issubclass(found, nn.Module):
        try:
            return found()
        except TypeError as error:
            raise CouldNotRun(
                f"{text}: {error}; name a function or a module instance instead"
            ) from error
    if not callable(found):
        raise CouldNotRun(f"expected a function, got {text} of type {type(found).__name__}")
    return found


def _module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(Path.cwd()))


def _file(path: Path) -> Any:
    if not path.is_file():
        raise CouldNotRun(f"expected a Python file, got {path}, which does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CouldNotRun(f"expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


COMMAND = Command(
    help="check that a function's gradient is right",
    description=_DESCRIPTION,
    arguments=_arguments,
    run=_run,
)
