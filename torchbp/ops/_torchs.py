"""What ``torchbp.nn`` and ``torchbp.functional`` take over from torch beyond the public names."""

from collections.abc import Callable
from types import ModuleType

__all__ = ["private_names"]


def private_names(ours: str, theirs: ModuleType) -> Callable[[str], object]:
    """Return a module's ``__getattr__`` that gives the private names of torch's, which models use here and there.

    ``F._in_projection_packed``, ``F._pair``, ``nn._reduction``.
    """

    def get(name: str) -> object:
        if name.startswith("_") and not name.startswith("__") and hasattr(theirs, name):
            return getattr(theirs, name)
        message = f"module {ours!r} has no attribute {name!r}"
        raise AttributeError(message)

    return get
