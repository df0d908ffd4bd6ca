"""Backpropagation you can trust, watch and afford."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchbp import functional as functional
    from torchbp import nn as nn
    from torchbp.monitor import lr_range_test as lr_range_test
    from torchbp.monitor import watch as watch
    from torchbp.recompute import lean as lean
    from torchbp.recompute import lean_scope as lean_scope
    from torchbp.recompute import memory as memory
    from torchbp.recompute import revert as revert
    from torchbp.swap import convert as convert
    from torchbp.verify import gradcheck as gradcheck

# Public name, or part with more of them -> where it lives. Nothing is imported before it is asked for (PEP 562): so
# `import torchbp` costs nothing, and `torchbp.tensorboard` never meets torch.
_HOME = {
    "convert": "torchbp.swap",
    "functional": "torchbp.functional",
    "gradcheck": "torchbp.verify",
    "lean": "torchbp.recompute",
    "lean_scope": "torchbp.recompute",
    "lr_range_test": "torchbp.monitor",
    "memory": "torchbp.recompute",
    "monitor": "torchbp.monitor",
    "nn": "torchbp.nn",
    "revert": "torchbp.recompute",
    "swap": "torchbp.swap",
    "tensorboard": "torchbp.tensorboard",
    "watch": "torchbp.monitor",
}

__all__ = [
    "convert",
    "functional",
    "gradcheck",
    "lean",
    "lean_scope",
    "lr_range_test",
    "memory",
    "nn",
    "revert",
    "watch",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        message = f"module 'torchbp' has no attribute {name!r}"
        raise AttributeError(message)
    home = import_module(_HOME[name])
    return home if home.__name__ == f"torchbp.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
