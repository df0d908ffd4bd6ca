"""Twenty-ninth set: a fifth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Mistakes of people who write backwards for real uses, over many fields. `trigger` says where the fault shows: some show
in any sample, some only with other layouts, flags, sizes, ties, edges, types, orders, modes or calls.
"""

from functools import partial

import torch

from tests.verify.unseen import TWENTYNINTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized

__all__ = ["add", "add_bare", "as_if_contiguous", "bounded", "check", "indices", "same", "sized"]

add = partial(twentieth.add, into=TWENTYNINTH, ending="29")
add_bare = partial(twentieth.add_bare, into=TWENTYNINTH, ending="29")


def bounded(name, t, low, high):
    """Refuse numbers outside of an interval, and NaN."""
    check(bool(((t >= low) & (t <= high)).all()), f"{name}: expected numbers from {low} to {high}")


def as_if_contiguous(t):
    """What a kernel reads that takes the tensor at its address for contiguous; zeros past the memory's end."""
    place = t.storage_offset() + torch.arange(t.numel(), device=t.device)
    size = t.untyped_storage().nbytes() // t.element_size()
    whole = t.as_strided((size,), (1,), 0)
    return torch.where(place < size, whole[place.clamp(max=size - 1)], 0).view(t.shape)
