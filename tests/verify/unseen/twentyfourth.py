"""Twenty-fourth set: an examiner's again, from the list of promises and the mutation benchmark alone.

A third in the manner of the benchmark's families, a third along the promised kinds, a third everyday mistakes in
layers, losses, attention, recurrence, geometry, signals and statistics. `trigger` says where the fault shows. Facts,
neither code nor sentences, were taken from these reports: a group's size taken from the last dimension (Liger-Kernel
1376), a frozen input's parameters (PaddlePaddle 54244), a norm's gradient at 0 (geoopt 243, pytorch 2421).
"""

from functools import partial

from tests.verify.unseen import TWENTYFOURTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentysecond import read

__all__ = ["add", "add_bare", "check", "indices", "positive", "read", "same", "sized"]

add = partial(twentieth.add, into=TWENTYFOURTH, ending="24")
add_bare = partial(twentieth.add_bare, into=TWENTYFOURTH, ending="24")
