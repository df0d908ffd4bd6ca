"""Thirty-fifth set: faults from public reports of wrong gradients, as a list of searches found them, rebuilt small.

`bug` names the project and the number of the issue or pull request. Facts were carried over, neither sentences nor
code; where a report does not say what was wrong, the likeliest fault was built. No report was left out for being easy
or hard. `trigger` says in which situation the gradient is wrong.
"""

from functools import partial

import torch

from tests.verify.unseen import THIRTYFIFTH, twentieth
from tests.verify.unseen.thirtyfourth import alike
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentyninth import bounded
from tests.verify.unseen.twentysecond import read_flat

__all__ = [
    "add",
    "add_bare",
    "alike",
    "bounded",
    "check",
    "indices",
    "others",
    "positive",
    "read_flat",
    "same",
    "sized",
]

add = partial(twentieth.add, into=THIRTYFIFTH, ending="35")
add_bare = partial(twentieth.add_bare, into=THIRTYFIFTH, ending="35")


def others(x):
    """Return for each number the product of the others of its row."""
    one = torch.ones_like(x[..., :1])
    before = torch.cat([one, x[..., :-1]], -1).cumprod(-1)
    behind = torch.cat([x[..., 1:], one], -1).flip(-1).cumprod(-1).flip(-1)
    return before * behind
