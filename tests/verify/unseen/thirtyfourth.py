"""Thirty-fourth set: an eighth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Forty of eighty functions that people write a backward for, drawn by lot; each with the mistake that its author would
be likeliest to make. `trigger` says where the fault shows: about half show in any sample.
"""

from functools import partial

from tests.verify.unseen import THIRTYFOURTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = ["add", "add_bare", "alike", "bounded", "check", "indices", "read_flat", "same", "sized"]

add = partial(twentieth.add, into=THIRTYFOURTH, ending="34")
add_bare = partial(twentieth.add_bare, into=THIRTYFOURTH, ending="34")


def alike(*tensors):
    """Refuse tensors of several types."""
    check(len({t.dtype for t in tensors}) == 1, "expected tensors of one dtype")
    check(tensors[0].is_floating_point(), "expected floating point numbers")
