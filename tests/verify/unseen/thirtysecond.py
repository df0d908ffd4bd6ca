"""Thirty-second set: a seventh volume of the mutation benchmark, by an author who knew the benchmark and no check.

One or two pairs for each thing that gradcheck promises to notice, much of it inside of whole fused blocks as
repositories hold them. `trigger` says where the fault shows.
"""

from functools import partial

from tests.verify.unseen import THIRTYSECOND, twentieth
from tests.verify.unseen.twentieth import check, finite, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = [
    "add",
    "add_bare",
    "bounded",
    "check",
    "finite",
    "indices",
    "positive",
    "read_flat",
    "same",
    "sized",
]

add = partial(twentieth.add, into=THIRTYSECOND, ending="32")
add_bare = partial(twentieth.add_bare, into=THIRTYSECOND, ending="32")
