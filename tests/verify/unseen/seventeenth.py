"""Seventeenth set: functions drawn by lot from those that public projects write backwards for, and faults drawn too.

106 functions were listed from sources of such projects, each with the kinds of fault that fit it, out of 25: a sign,
a term, a factor, a saved tensor, a reduction, a mask, a border, a layout, writing in place, shared state, an output
ignored, an input forgotten, an option, an edge value, the second derivative, a dtype, batch dimensions, a length,
large values, forward mode, vmap, training, needs_input_grad, repeated indices, conjugates, an output without
gradient. random.Random(1717) drew sixty functions, then one kind for each; the bug is the likeliest of its kind there.
`shows` says in which situation the gradient is wrong. As in the sixteenth set, under autocast and of half precision
every one computes in float32.
"""

from tests.verify.unseen import SEVENTEENTH, pair
from tests.verify.unseen.sixteenth import in_half
from tests.verify.unseen.twelfth import in_float32


def add(name, factory, wrong, right, make, *, bug, shows, kwargs=dict, missed="", half=in_half):
    text = f"{bug}; shows with {shows}"
    wrong, right = (in_float32(half(factory(f))) for f in (wrong, right))
    pair(f"{name}_17", wrong, right, make, text, kwargs, into=SEVENTEENTH, missed=missed)


def rows(*pieces, size):
    """Zeros (*, size, D) with every value (*, K, D) added at its index (K,)."""
    first = pieces[0][1]
    out = first.new_zeros(*first.shape[:-2], size, first.shape[-1])
    for index, values in pieces:
        out = out.index_add(-2, index, values)
    return out
