"""The record that every subcommand file ends with."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Command", "CouldNotRun"]


class CouldNotRun(Exception):  # noqa: N818  # the sentence that is printed, not an error of ours
    """Says in one line why a command could not run; the process then exits with 2."""


@dataclass(frozen=True)
class Command:
    """A subcommand of ``torchbp``.

    Attributes:
        help: One line for ``torchbp --help``.
        description: What ``torchbp NAME --help`` teaches, examples included.
        arguments: Adds the command's arguments to its parser.
        run: Does the work. Returns the exit status: 0 all is well, 1 something is wrong.
    """

    help: str
    description: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
