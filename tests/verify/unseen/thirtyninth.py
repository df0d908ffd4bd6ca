"""Thirty-ninth set: a twelfth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Fifty of a hundred functions that people write a backward for, drawn by lot; fifty kinds of fault, spread over the
benchmark's families and the rest of a backward's contract, were dealt to them by lot, too, and swapped only where one
didn't fit. `trigger` says where the fault shows.
"""

from functools import partial

from tests.verify.unseen import THIRTYNINTH, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = ["add", "add_bare", "alike", "bounded", "check", "indices", "read_flat", "same", "sized"]

add = partial(twentieth.add, into=THIRTYNINTH, ending="39")
add_bare = partial(twentieth.add_bare, into=THIRTYNINTH, ending="39")
