"""Twenty-second set: a second volume in the manner of a small published benchmark of mutants, with other functions.

The pairs belong to seven families in that benchmark's proportions: formula 8, upstream 7, layout 6, state 10,
transform 8, precision 8, coverage 13. `trigger` says in which situation the fault shows, which is one that an
ordinary user meets sooner or later; four in five are right at the sample with ones as grad_output.

Looked up in public reports, of which facts were carried over, neither code nor sentences:
- flash-attention issues 1817 and 141: the returned logsumexp has no gradient (`flash_lse`); issue 355 and
  flash-linear-attention pulls 871, 1139: grad_output is read with the strides of another tensor (`heads_stride`,
  `lorentz_stride`); TransformerEngine pull 2746: only one of two strides is looked at;
- ffpa-attn pull 300 and onnx pull 8068: a causal mask that is aligned otherwise with more keys (`causal_offset`);
- pytorch pulls 101507, 105801: a kernel that starts at the memory's first number (`softcap_offset`);
- pytorch issues 81417, 58509: a grad_output that is written over, a saved intermediate result in double backward
  (`hard_shrink_writes`, `standardise_saved`); Liger-Kernel issues 254, 272: gradients in the place of what was saved
  (`labels_writes`);
- xformers issues 728, 779: what a table of rotations must be kept by (`rotary_table`);
- axolotl pull 1601, Liger-Kernel pull 1391: a gradient added up over chunks in bfloat16 (`chunks_half`).
"""

from functools import partial

import torch
import torch.nn.functional as F

from tests.verify.unseen import TWENTYSECOND, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized

__all__ = ["add", "check", "indices", "read", "same", "sized"]

add = partial(twentieth.add, into=TWENTYSECOND, ending="22")


def read(t, strides, start=None):
    """Return what a kernel reads from a tensor's memory with these strides, 0 past its end."""
    memory = t.untyped_storage().nbytes() // t.element_size()
    start = t.storage_offset() if start is None else start
    places = torch.full((), start, dtype=torch.long, device=t.device)
    for n, step in zip(t.shape, strides, strict=True):
        places = places[..., None] + torch.arange(n, device=t.device) * step
    numbers = F.pad(t.as_strided((memory,), (1,), 0), (0, 1))
    return numbers[places.clamp(max=memory)]


def read_flat(t):
    """Return what it reads as if the tensor were contiguous."""
    return read(t, torch.empty(t.shape, device="meta").stride())
