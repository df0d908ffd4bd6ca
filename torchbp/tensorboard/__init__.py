"""TensorBoard event files with one vector a quantity and step; the tab that shows them; the report.

Never imports torch. TensorBoard loads :mod:`torchbp.tensorboard.loader` at every start, so what
stands here is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchbp.tensorboard._layout import Layout as Layout
    from torchbp.tensorboard._layout import is_absent as is_absent
    from torchbp.tensorboard._layout import with_absent as with_absent
    from torchbp.tensorboard._reader import Run as Run
    from torchbp.tensorboard._reader import Series as Series
    from torchbp.tensorboard._reader import read as read
    from torchbp.tensorboard._writer import BorrowedWriter as BorrowedWriter
    from torchbp.tensorboard._writer import EventWriter as EventWriter

_HOME = {
    "BorrowedWriter": "_writer",
    "EventWriter": "_writer",
    "Layout": "_layout",
    "Run": "_reader",
    "Series": "_reader",
    "is_absent": "_layout",
    "read": "_reader",
    "with_absent": "_layout",
}
__all__ = [
    "BorrowedWriter",
    "EventWriter",
    "Layout",
    "Run",
    "Series",
    "is_absent",
    "read",
    "with_absent",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
