"""Formulas compiled for the CPU by the machine's own C++ compiler: an optional extra.

``torchbp kernels`` builds them once; from then on they are found. Without them everything runs as ever, more slowly.
A kernel is the formula of its op's file, written down as a loop (``_loop.py``), with the mathematics of ``math.h``.
"""

from torchbp.ops.kernels._cross_entropy import over_log_partition as over_log_partition
from torchbp.ops.kernels._cross_entropy import over_log_probabilities as over_log_probabilities
from torchbp.ops.kernels._cross_entropy import over_probabilities as over_probabilities
from torchbp.ops.kernels._cross_entropy import over_softmax_gradient as over_softmax_gradient
from torchbp.ops.kernels._cross_entropy import takes_logits as takes_logits
from torchbp.ops.kernels._ctc import over_sequences as over_sequences
from torchbp.ops.kernels._ctc import over_sequences_backward as over_sequences_backward
from torchbp.ops.kernels._embedding import over_indices as over_indices
from torchbp.ops.kernels._flags import of_all_threads as of_all_threads
from torchbp.ops.kernels._layout import in_memory as in_memory
from torchbp.ops.kernels._library import at_hand as at_hand
from torchbp.ops.kernels._library import disabled as disabled
from torchbp.ops.kernels._library import listed as listed
from torchbp.ops.kernels._loop import MANY as MANY
from torchbp.ops.kernels._loop import ROWS as ROWS
from torchbp.ops.kernels._loop import SUM as SUM
from torchbp.ops.kernels._loop import half_in_one_loop as half_in_one_loop
from torchbp.ops.kernels._loop import in_one_loop as in_one_loop
from torchbp.ops.kernels._loop import looped as looped
from torchbp.ops.kernels._loop import many as many
from torchbp.ops.kernels._rows import over_batch as over_batch
from torchbp.ops.kernels._rows import over_batch_backward as over_batch_backward
from torchbp.ops.kernels._rows import over_groups as over_groups
from torchbp.ops.kernels._rows import over_groups_backward as over_groups_backward
from torchbp.ops.kernels._rows import over_rows as over_rows
from torchbp.ops.kernels._rows import over_rows_backward as over_rows_backward
from torchbp.ops.kernels._softmax import over_log_softmax as over_log_softmax
from torchbp.ops.kernels._softmax import over_log_softmax_backward as over_log_softmax_backward
from torchbp.ops.kernels._softmax import over_softmax as over_softmax
from torchbp.ops.kernels._softmax import over_softmax_backward as over_softmax_backward

__all__ = [
    "MANY",
    "ROWS",
    "SUM",
    "at_hand",
    "disabled",
    "half_in_one_loop",
    "in_memory",
    "in_one_loop",
    "listed",
    "looped",
    "many",
    "of_all_threads",
    "over_batch",
    "over_batch_backward",
    "over_groups",
    "over_groups_backward",
    "over_indices",
    "over_log_partition",
    "over_log_probabilities",
    "over_log_softmax",
    "over_log_softmax_backward",
    "over_probabilities",
    "over_rows",
    "over_rows_backward",
    "over_sequences",
    "over_sequences_backward",
    "over_softmax",
    "over_softmax_backward",
    "over_softmax_gradient",
    "takes_logits",
]
