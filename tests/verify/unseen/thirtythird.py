"""Thirty-third set: a seventh volume of the mutation benchmark, by an author who knew the benchmark and no check.

Mistakes of people who write a backward for real uses, over many fields. `trigger` says where the fault shows: a quarter
shows in any sample, the others only in a situation that a user meets later.
"""

from functools import partial

from tests.verify.unseen import THIRTYTHIRD, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = ["add", "add_bare", "bounded", "check", "indices", "read_flat", "same", "sized"]

add = partial(twentieth.add, into=THIRTYTHIRD, ending="33")
add_bare = partial(twentieth.add_bare, into=THIRTYTHIRD, ending="33")
