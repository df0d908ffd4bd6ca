"""Thirtieth set: a sixth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Mistakes of people who write backwards for real uses, over many fields. `trigger` says where the fault shows: one in
five shows in any sample, the others with some layout, flag, size, tie, edge, type, order, mode or call.
"""

from functools import partial

from tests.verify.unseen import THIRTIETH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = ["add", "add_bare", "bounded", "check", "indices", "read_flat", "same", "sized"]

add = partial(twentieth.add, into=THIRTIETH, ending="30")
add_bare = partial(twentieth.add_bare, into=THIRTIETH, ending="30")
