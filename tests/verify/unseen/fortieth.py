"""Fortieth set: wrong gradients as public reports tell of them, taken in the order in which a search found them.

Search queries were written down beforehand, by field, and fifty-two of them were run; of each the first one or two
reports of a wrong gradient were rebuilt small, leaving none out because it was easy or hard. Ten queries gave no
report that was new and said what to build. `bug` names the project and the number; facts were carried over, neither
code nor sentences. Where a report says too little, the likeliest fault was built.
"""

from functools import partial

from tests.verify.unseen import FORTIETH, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, finite, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentyninth import bounded

__all__ = [
    "add",
    "add_bare",
    "alike",
    "bounded",
    "check",
    "finite",
    "indices",
    "positive",
    "same",
    "sized",
]

add = partial(twentieth.add, into=FORTIETH, ending="40")
add_bare = partial(twentieth.add_bare, into=FORTIETH, ending="40")
