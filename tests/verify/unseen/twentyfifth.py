"""Twenty-fifth set: a third volume in the manner of the mutation benchmark, by an author who knew only that benchmark.

The faults come in the proportions in which they were judged to occur in hand-written backwards: some show in any
sample, most need another layout, size, flag, value, order or mode. `trigger` says which. Facts, neither code nor
sentences, were taken from these reports: targets that do not sum to 1 (NeMo Automodel pull 2428), segments numbered
-1 (jax 7538), a denominator clamped in backward only (fairchem pull 1574), a floor that float16 rounds to 0
(kornia 4623).
"""

from functools import partial

from tests.verify.unseen import TWENTYFIFTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive

__all__ = ["add", "add_bare", "check", "indices", "leaf", "positive", "same", "sized"]

add = partial(twentieth.add, into=TWENTYFIFTH, ending="25")
add_bare = partial(twentieth.add_bare, into=TWENTYFIFTH, ending="25")


def leaf(t, grad=True):
    """The numbers of a tensor without its history."""
    return t.detach().clone().requires_grad_(grad)
