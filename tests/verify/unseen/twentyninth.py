"""Twenty-ninth set: a fifth volume of the mutation benchmark, by an author who knew the benchmark and no check.

Mistakes of people who write backwards for real uses, over many fields. `trigger` says where the fault shows: some show
in any sample, some only with other layouts, flags, sizes, ties, edges, types, orders, modes or calls.
"""

from functools import partial

from tests.verify.unseen import TWENTYNINTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentysecond import read_flat

__all__ = ["add", "add_bare", "bounded", "check", "indices", "read_flat", "same", "sized"]

add = partial(twentieth.add, into=TWENTYNINTH, ending="29")
add_bare = partial(twentieth.add_bare, into=TWENTYNINTH, ending="29")


def bounded(name, t, low, high):
    """Refuse numbers outside of an interval, and NaN."""
    check(bool(((t >= low) & (t <= high)).all()), f"{name}: expected numbers from {low} to {high}")
