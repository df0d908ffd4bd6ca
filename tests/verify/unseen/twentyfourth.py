"""Twenty-fourth set: an examiner's again, from the list of promises and the mutation benchmark alone.

A third in the manner of the benchmark's families, a third along the promised kinds, a third everyday mistakes in
layers, losses, attention, recurrence, geometry, signals and statistics. `trigger` says where the fault shows. Facts,
neither code nor sentences, were taken from these reports: a group's size taken from the last dimension (Liger-Kernel
1376), a frozen input's parameters (PaddlePaddle 54244), a norm's gradient at 0 (geoopt 243, pytorch 2421).
"""

from functools import partial

import torch

from tests.verify.unseen import TWENTYFOURTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive

__all__ = ["add", "add_bare", "check", "indices", "memory", "positive", "same", "sized"]

add = partial(twentieth.add, into=TWENTYFOURTH, ending="24")
add_bare = partial(twentieth.add_bare, into=TWENTYFOURTH, ending="24")


def memory(t, *strides):
    """What a kernel reads at a matrix's address with these strides; zeros past the memory's end."""
    rows = torch.arange(t.shape[0], device=t.device)[:, None] * strides[0]
    place = t.storage_offset() + rows + torch.arange(t.shape[1], device=t.device) * strides[1]
    size = t.untyped_storage().nbytes() // t.element_size()
    whole = t.as_strided((size,), (1,), 0)
    return torch.where(place < size, whole[place.clamp(max=size - 1)], 0)
