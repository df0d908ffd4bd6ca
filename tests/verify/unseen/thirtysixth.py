"""Thirty-sixth set: a tenth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Forty-eight functions that people write a backward for, drawn by lot from a hundred; each with the mistake that its
author would be likeliest to make and not to notice in a quick test. `trigger` says where the fault shows: about two in
five show in any sample.
"""

from functools import partial

from tests.verify.unseen import THIRTYSIXTH, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentyninth import bounded

__all__ = ["add", "add_bare", "alike", "bounded", "check", "indices", "positive", "same", "sized"]

add = partial(twentieth.add, into=THIRTYSIXTH, ending="36")
add_bare = partial(twentieth.add_bare, into=THIRTYSIXTH, ending="36")
