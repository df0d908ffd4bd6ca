"""Looks after the leaves of the graph that torch's own ops read: was one written to before an output is kept?

An op of torchbp notes the versions of its arguments, torch's do not: a sum reads a table of positions, a convolution
its bias, and saves neither. So their versions are noted as a scope opens, of all that were met before.
"""

import threading
from weakref import ReferenceType, ref

from torch import Tensor

__all__ = ["is_as_read", "open_scope"]


class _Leaves(threading.local):
    """Of this thread's scope."""

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}
        self.measures = False


_leaves = _Leaves()
_read: dict[int, ReferenceType[Tensor]] = {}


def open_scope(measures: bool) -> None:
    """Note the versions of the leaves that torch's own ops were seen to read, before any op of a scope reads them.

    Args:
        measures: Whether nothing that is dear to make again is let go in this scope.
    """
    _leaves.measures = measures
    _leaves.versions.clear()
    for key, leaf in list(_read.items()):
        t = leaf()
        if t is None:
            del _read[key]
        else:
            _leaves.versions[key] = t._version


def is_as_read(leaf: Tensor, dear: bool) -> bool:
    """Whether nobody wrote to a leaf (a convolution's bias, say) since an op of torch's own read it and noted nothing.

    It is if it was never written to, or not in this scope. A leaf that is met first is looked after from the next scope
    on; in this one what was made of it is kept.
    """
    if not leaf._version:
        return True
    version = _leaves.versions.get(id(leaf))
    if version is None:
        _read[id(leaf)] = ref(leaf)
        return dear and _leaves.measures
    return version == leaf._version
