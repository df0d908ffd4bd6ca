"""Twenty-seventh set: the fourth volume of the mutation benchmark, its first part, by an author who saw no check.

Activations, losses, layers, sequences, experts and quantized weights, optimisers and the protocol, with the mistakes
that hand-written backward passes of everyday use have. `trigger` says where the fault shows: most are right at the
sample.
"""

from functools import partial

from tests.verify.unseen import TWENTYSEVENTH, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive

__all__ = ["add", "add_bare", "check", "indices", "positive", "same", "sized"]

add = partial(twentieth.add, into=TWENTYSEVENTH, ending="27")
add_bare = partial(twentieth.add_bare, into=TWENTYSEVENTH, ending="27")
