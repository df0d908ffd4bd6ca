"""Looks after the leaves of the graph that torch's own ops read: was one written to before an output is kept?

An op of torchbp notes the versions of its arguments, torch's do not: a sum reads a table of positions, a convolution
its bias, and saves neither. So their versions are noted as a scope opens, of all that were met before, and hold for the
ops that run in it.
"""

import threading
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor
from torch.autograd import _get_sequence_nr

__all__ = ["is_as_read", "note_versions"]

Noted = tuple[ReferenceType[Tensor], int]  # a leaf and its version


class _Scope(threading.local):
    """Of this thread: what was noted as it was opened."""

    def __init__(self) -> None:
        self.versions: dict[int, Noted] = {}
        self.first = 0  # number of the first node made in it


_scope = _Scope()
_met: dict[int, ReferenceType[Tensor]] = {}


def note_versions() -> None:
    """Note the versions of the leaves that torch's own ops were seen to read, before any op of a scope reads them."""
    _scope.first = _get_sequence_nr()
    _scope.versions.clear()
    for key, leaf in list(_met.items()):
        t = leaf()
        if t is None:
            _met.pop(key, None)
        else:
            _scope.versions[key] = (leaf, t._version)


def is_as_read(leaf: Tensor, node: Any, measures: bool) -> bool:
    """Whether nobody wrote to a leaf (a convolution's bias, say) since ``node``, of torch's own, read it.

    It is if it was never written to, or not in this scope, where the node is of this scope too. A leaf that is met
    first is looked after from the next scope on; in this one what was made of it is kept.

    Args:
        leaf: Of the graph.
        node: Which noted nothing.
        measures: Whether nothing is let go for this answer: of a leaf that is met first it is then yes.
    """
    if not leaf._version:
        return True
    found, version = _scope.versions.get(id(leaf), (None, 0))
    if found is None or found() is not leaf:
        _met[id(leaf)] = ref(leaf)
        return measures
    return version == leaf._version and node._sequence_nr() >= _scope.first
