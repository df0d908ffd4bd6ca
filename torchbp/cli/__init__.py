"""The ``torchbp`` command. One subcommand = one file of this folder, each ending in a record."""

from torchbp.cli._main import main as main

__all__ = ["main"]
