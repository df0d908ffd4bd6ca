"""Forty-second set: a thirteenth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Forty of eighty functions that people write a backward for, drawn by lot; forty kinds of fault, spread over the
benchmark's families and the rest of a backward's contract, were dealt to them by lot, too, and swapped only where one
didn't fit. `trigger` says where the fault shows.
"""

from functools import partial

from tests.verify.unseen import FORTYSECOND, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = ["add", "add_bare", "alike", "bounded", "check", "indices", "read_flat", "same", "sized"]

add = partial(twentieth.add, into=FORTYSECOND, ending="42")
add_bare = partial(twentieth.add_bare, into=FORTYSECOND, ending="42")
