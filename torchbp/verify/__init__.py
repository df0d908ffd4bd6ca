"""gradcheck: finds the wrong gradient, and says what is wrong. For anybody's Function, callable or Module."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchbp.verify._gradcheck import gradcheck as gradcheck
    from torchbp.verify.report import Capability as Capability
    from torchbp.verify.report import Finding as Finding
    from torchbp.verify.report import GradientError as GradientError
    from torchbp.verify.report import Report as Report

# Lazy (PEP 562): pytest imports the plugin of this package in every run, which must not import torch.
_HOME = {
    "Capability": "report",
    "Finding": "report",
    "GradientError": "report",
    "Report": "report",
    "gradcheck": "_gradcheck",
}

__all__ = ["Capability", "Finding", "GradientError", "Report", "gradcheck"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        message = f"module 'torchbp.verify' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"torchbp.verify.{_HOME[name]}"), name)
