"""``torchbp memory``: what a model keeps for backward, as torch, converted and lean."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchbp.cli._arguments import add_inputs, load, sample
from torchbp.cli._command import Command, CouldNotRun

DESCRIPTION = """\
What one step of a model keeps for backward, by layer and op, and the peak of the step:
as torch runs it, converted to torchbp, and lean. The random state and the model are
left as they were.

MODEL is module:name or path/to/file.py:name of a model, of a Module class or of a
function, called without arguments, that makes one. One --shape or --integers for each
argument of its forward, in order.

examples:
  torchbp memory mypackage.models:make_resnet --shape 32,3,32,32
  torchbp memory gpt.py:make_gpt --integers 8,128:50257 --budgets 0.5,0.3,0.1
  torchbp memory gpt.py:make_gpt --integers 8,128:50257 --loss gpt.py:loss --json memory.json
"""


def arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="module:name or path/to/file.py:name")
    add_inputs(parser, dtype="float32")
    add("--loss", metavar="FUNCTION", help="gives a scalar from the output (default: its sum)")
    add(
        "--budgets",
        type=_budgets,
        default=(),
        metavar="0.5,0.3",
        help="lean within these, too: shares of what torch keeps, or bytes",
    )
    add("--eval", action="store_true", help="measure it in evaluation mode")
    add("--each", action="store_true", help="a row for each layer, not one for all blocks alike")
    add("--json", type=Path, metavar="FILE", help="write the report there too")


def _budgets(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"expected numbers such as 0.5,0.3, got {text!r}") from None


def run(args: Namespace) -> int:
    """Measure the model and print the table."""
    if args.json and not args.json.parent.is_dir():
        raise CouldNotRun(f"expected an existing folder for --json, got {args.json.parent}")
    if not args.inputs:
        raise CouldNotRun("expected a --shape or --integers for each argument, got none")
    loss = load(args.loss) if args.loss else None
    inputs = sample(args, requires_grad=False)
    import torch

    torch.manual_seed(args.seed)
    model = _made(load(args.model), args.model).to(args.device)
    from torchbp.recompute import memory

    try:
        report = memory(model.train(not args.eval), *inputs, loss=loss, budgets=args.budgets)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0].removeprefix("memory: ")
        raise CouldNotRun(f"{type(error).__name__}: {first}") from error
    print(report.table(each=args.each))
    if args.json:
        args.json.write_text(report.to_json() + "\n")
    return 0


def _made(found: Callable[..., Any], text: str) -> Any:
    from torch import nn

    if not isinstance(found, nn.Module):
        if not callable(found):
            raise CouldNotRun(f"expected a model, got {text} of type {type(found).__name__}")
        try:
            found = found()
        except Exception as error:
            raise CouldNotRun(f"{text}(): {type(error).__name__}: {error}") from error
    if not isinstance(found, nn.Module):
        raise CouldNotRun(f"expected {text}() to make a model, got {type(found).__name__}")
    return found


COMMAND = Command(
    help="what a model keeps for backward, by layer: torch, torchbp, lean",
    description=DESCRIPTION,
    arguments=arguments,
    run=run,
)
