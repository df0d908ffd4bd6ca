"""Finds the subcommands, reads the command line, runs one."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules

from torchbp import cli
from torchbp.cli._command import Command, CouldNotRun

__all__ = ["commands", "main"]

_EPILOG = """\
exit status: 0 all is well; 1 something is wrong (a gradient, a run); 2 the command could not run
"""


def commands() -> dict[str, Command]:
    """Return every subcommand by name, read from the files of this folder."""
    names = sorted(m.name for m in iter_modules(cli.__path__) if not m.name.startswith("_"))
    return {name: import_module(f"{cli.__name__}.{name}").COMMAND for name in names}


def _parser(known: dict[str, Command]) -> ArgumentParser:
    parser = ArgumentParser(
        "torchbp",
        description="Backpropagation you can trust, watch and afford.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torchbp {version('torchbp')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in known.items():
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``torchbp`` with ``arguments``, by default those of the process.

    Returns:
        The exit status: 0 all is well, 1 something is wrong, 2 the command could not run.
    """
    known = commands()
    args = _parser(known).parse_args(arguments)
    try:
        return known[args.command].run(args)
    except CouldNotRun as reason:
        print(f"torchbp {args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"torchbp {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `torchbp ops | head`
        sys.stderr.close()
        return 0
