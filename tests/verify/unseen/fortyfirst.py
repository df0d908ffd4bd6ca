"""Forty-first set: wrong gradients as public reports tell of them, found by the names of operators.

Forty-five search queries were written down, one an operator or two, and all were run; of each the first one or two new
reports (once the third) of a wrong gradient that say what was wrong were rebuilt small, leaving none out because it was
easy or hard. Nineteen queries gave none. `bug` names the project and the number; facts were carried over, neither code
nor sentences. Where a report says too little, the likeliest fault was built.
"""

from functools import partial

from tests.verify.unseen import FORTYFIRST, twentieth
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

add = partial(twentieth.add, into=FORTYFIRST, ending="41")
add_bare = partial(twentieth.add_bare, into=FORTYFIRST, ending="41")
