"""Twenty-third set: an examiner's, one to three pairs for each kind of fault that the validator promises to notice.

Written from that list of kinds alone. `trigger` says in which situation the fault shows. Facts, neither code nor
sentences, were taken from these reports: reduction none (Liger-Kernel 968), gradients expanded by a sum
(ROCm/TransformerEngine 623), strides taken from elsewhere (pytorch 194719, flash-attention 355, VeOmni 958,
flash-linear-attention 871), chunks shorter than the window (flash-linear-attention 1140), gradients of another shape
(pytorch 65244), a number of gradients that does not fit (flash-linear-attention 1258), frozen inputs
(efficient_cross_entropy 8), squeeze with one row (pytorch 5170).
"""

from functools import partial

from tests.verify.unseen import TWENTYTHIRD, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized
from tests.verify.unseen.twentyfirst import positive

__all__ = ["add", "add_bare", "check", "indices", "positive", "same", "sized"]

add = partial(twentieth.add, into=TWENTYTHIRD, ending="23")
add_bare = partial(twentieth.add_bare, into=TWENTYTHIRD, ending="23")
