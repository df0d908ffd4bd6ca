"""Twenty-sixth set: an examiner's, from the validator's promises alone.

The functions were drawn by lot from a list of 223 of all fields; each has the mistake that its author would probably
make and not notice. `trigger` says where the fault shows; most are right at the sample.
"""

from functools import partial

from tests.verify.unseen import TWENTYSIXTH, twentieth
from tests.verify.unseen.twentieth import check, finite, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentysecond import read_flat

__all__ = [
    "add",
    "add_bare",
    "check",
    "finite",
    "indices",
    "positive",
    "read_flat",
    "same",
    "sized",
]

add = partial(twentieth.add, into=TWENTYSIXTH, ending="26")
add_bare = partial(twentieth.add_bare, into=TWENTYSIXTH, ending="26")
