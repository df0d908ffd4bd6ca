"""``torchbp gradcheck``: check the gradient of a function named on the command line."""

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchbp.cli._arguments import add_inputs, load, sample
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


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("function", metavar="FUNCTION", help="module:name or path/to/file.py:name")
    add_inputs(parser, dtype="float64")
    add("--reference", metavar="FUNCTION", help="a trusted function of the same arguments")
    add("--level", choices=("quick", "full"), default="full", help="default: full")
    add("--checks", metavar="A,B", help="run only these checks")
    add("--skip", metavar="A,B", help="leave these checks out")
    add("--deadline", type=float, metavar="SECONDS", help="begin no further check after this long")
    add("--json", type=Path, metavar="FILE", help="write the report there too")  # fmt: skip


def _run(args: Namespace) -> int:
    if args.json and not args.json.parent.is_dir():
        raise CouldNotRun(f"expected an existing folder for --json, got {args.json.parent}")
    if args.json and args.json.is_dir():
        raise CouldNotRun(f"expected a file for --json, got the folder {args.json}")
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
    func = _callable(load(args.function), args.function)
    reference = _callable(load(args.reference), args.reference) if args.reference else None
    inputs = sample(args, requires_grad=True)
    from torchbp.verify import gradcheck

    try:
        return gradcheck(
            func,
            inputs,
            reference=reference,
            level=args.level,
            checks=_names(args.checks) or None,
            skip=_names(args.skip),
            seed=args.seed,
            deadline=args.deadline,
            raise_exception=False,
            repeat=_line(args),
        )
    except SystemExit as error:
        raise CouldNotRun(f"{args.function}: it exits, with {error.code!r}") from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].removeprefix("gradcheck: ")
        raise CouldNotRun(f"{type(error).__name__}: {first}") from error


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


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
    words += ["--skip", "differences"] if "differences" in _names(args.skip) else []
    return shlex.join([*words, "--seed", str(args.seed)]) + " --checks {check}"


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
    if isinstance(found, type):
        raise CouldNotRun(f"expected a function, got the class {text}; name an instance of it")
    if not callable(found):
        raise CouldNotRun(f"expected a function, got {text} of type {type(found).__name__}")
    return found


COMMAND = Command(
    help="check that a function's gradient is right",
    description=_DESCRIPTION,
    arguments=_arguments,
    run=_run,
)
