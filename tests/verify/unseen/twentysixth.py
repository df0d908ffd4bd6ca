"""Twenty-sixth set: an examiner's, from the validator's promises alone.

The functions were drawn by lot from a list of 223 of all fields; each has the mistake that its author would probably
make and not notice. `trigger` says where the fault shows; most are right at the sample.
"""

from functools import partial

import torch.nn.functional as F

from tests.verify.unseen import TWENTYSIXTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive

__all__ = [
    "add",
    "add_bare",
    "check",
    "finite",
    "flat_memory",
    "indices",
    "positive",
    "same",
    "sized",
]

add = partial(twentieth.add, into=TWENTYSIXTH, ending="26")
add_bare = partial(twentieth.add_bare, into=TWENTYSIXTH, ending="26")


def flat_memory(t):
    """What a kernel reads at a tensor's address as if it were contiguous; zeros past the memory's end."""
    n = t.numel()
    there = min(n, t.untyped_storage().nbytes() // t.element_size() - t.storage_offset())
    return F.pad(t.as_strided((there,), (1,), t.storage_offset()), (0, n - there)).view(t.shape)


def finite(**tensors):
    """Refuse infinities and NaN."""
    for name, t in tensors.items():
        check(bool(t.isfinite().all()), f"{name}: expected finite numbers")
