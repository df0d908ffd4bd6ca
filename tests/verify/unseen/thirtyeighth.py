"""Thirty-eighth set: an eleventh volume of the mutation benchmark, by an author who knew the benchmark and no check.

Forty-eight functions that people write a backward for, spread over the benchmark's families; each with a fault that its
author would be ashamed to ship. `trigger` says where it shows: about half show in the sample, the others with another
grad_output, layout, order of calls, transform, type, size or value.
"""

from functools import partial

from tests.verify.unseen import THIRTYEIGHTH, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentyninth import bounded

__all__ = ["add", "add_bare", "alike", "bounded", "check", "indices", "positive", "same", "sized"]

add = partial(twentieth.add, into=THIRTYEIGHTH, ending="38")
add_bare = partial(twentieth.add_bare, into=THIRTYEIGHTH, ending="38")
