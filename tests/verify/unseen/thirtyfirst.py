"""Thirty-first set: a sixth volume of the mutation benchmark, by an author who knew the benchmark and no check.

It covers evenly what gradcheck promises to notice, much of it inside of whole fused blocks as repositories hold them:
attention, recurrent layers, norms, losses, filters, simulation steps. `trigger` says where the fault shows.
"""

from functools import partial

from tests.verify.unseen import THIRTYFIRST, twentieth
from tests.verify.unseen.twentieth import check, finite, indices, same, sized
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read, read_flat

__all__ = [
    "add",
    "add_bare",
    "bounded",
    "check",
    "finite",
    "indices",
    "read",
    "read_flat",
    "same",
    "sized",
]

add = partial(twentieth.add, into=THIRTYFIRST, ending="31")
add_bare = partial(twentieth.add_bare, into=THIRTYFIRST, ending="31")
