r"""What RNN, LSTM and GRU share: how time is laid out and walked, and the maths around the gates.

Rows. The sequences of a batch lie in one matrix (R, D), time step after time step, as in a ``PackedSequence``:
``sizes[t]`` rows belong to step t, those of the sequences still running; sizes never rise. A padded batch has N at
every step. A direction walks from the first step to the last or, reversed, from the last to the first, and carries
N rows of state; a step changes the first ``sizes[t]`` of them. So h_0 enters where a sequence begins, whenever that
is, and what is carried in the end is h_n. A gradient is carried the same way against the walk: it begins as that of
h_n and ends as that of h_0.

Before the gates stand two affine maps, of the rows and of the states before each step; with d_x and d_h the
gradients of their values, all steps at once:
    a_x = x W_ihᵀ + b_ih,   a_h = h W_hhᵀ + b_hh                                              (1)
    grad_x = d_x · W_ih,   grad_W_ih = d_xᵀ · x,   grad_b_ih = Σ d_x                          (2)
                           grad_W_hh = d_hᵀ · h,   grad_b_hh = Σ d_h                          (3)
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from torchbp.ops._autocast import autocasts
from torchbp.ops._function import fused, is_half, kernel, visible_in_backward
from torchbp.ops._half_products import Parts, finite, ones_times, product, suit
from torchbp.ops.kernels import MANY, at_hand

__all__ = [
    "Saved",
    "Sizes",
    "add",
    "advance",
    "affine",
    "affine_gradients",
    "affine_tangents",
    "arrived",
    "before",
    "cast",
    "column_sums",
    "conjugate",
    "dtypes",
    "factors",
    "first",
    "half_of_one_step",
    "in_halves",
    "incoming",
    "join",
    "looped",
    "only_step",
    "rounded",
    "sound",
    "start",
    "starting",
    "through_sigmoid",
    "through_tanh",
    "walk",
    "whole",
    "wide",
    "without_autocast",
    "writable",
]

_sigmoid_backward_into = kernel("sigmoid_backward", "grad_input")
_sigmoid_backward = kernel("sigmoid_backward")
_tanh_backward_into = kernel("tanh_backward", "grad_input")
_tanh_backward = kernel("tanh_backward")

Sizes = tuple[int, ...]
Saved = Sequence[Any]  # for backward: tensors, or None


# ------------------------------------------------------------------------------------------------------ time


def walk(rows: Tensor | None, sizes: Sizes, reverse: bool) -> Iterable[Any]:
    """Return the rows of each step, a view each, in the order of the walk; ``None`` for each of nothing."""
    if rows is None:
        return repeat(None, len(sizes))
    if len(sizes) == 1:
        return (rows,)
    steps = rows.split_with_sizes(sizes)  # Tensor.split is the same behind 8 µs of Python
    return steps[::-1] if reverse else steps


def join(steps: list[Tensor], reverse: bool) -> Tensor:
    """Return one matrix of the rows of each step, given in the order of the walk; of one step, its own."""
    if len(steps) == 1:
        return steps[0]
    return torch.cat(steps[::-1] if reverse else steps)


def first(carried: Tensor, n: int) -> Tensor:
    """Return the carried rows that a step of ``n`` rows starts from."""
    return carried if n == carried.shape[0] else carried[:n]


def advance(carried: Tensor | None, new: Tensor) -> Tensor:
    """Return what is carried on after a step that made ``new`` of the first rows; ``None`` is nothing so far."""
    n = new.shape[0]
    return new if carried is None or n == carried.shape[0] else torch.cat((new, carried[n:]))


def start(
    carried: Tensor | None, others: Tensor | None, like: Tensor, sizes: Sizes
) -> Tensor | None:
    """Return the gradient that a walk back starts from, and zeros for nothing, but where every step has all rows.

    Args:
        carried: That of the final state.
        others: Those that come in on the way: without them zeros, too.
        like: Of the width of the state.
        sizes: Of the steps.
    """
    if carried is not None or (others is not None and sizes[-1] == sizes[0]):
        return carried
    return like.new_zeros(sizes[0], like.shape[1])


def arrived(carried: Tensor | None, grad: Tensor | None, n: int) -> Any:
    """Return the gradient of a step's state: what is carried back to it and what comes in."""
    return add(None if carried is None else first(carried, n), grad)


def before(start: Tensor, states: Tensor | None, sizes: Sizes, reverse: bool) -> Tensor:
    """Return the state that each step started from, from the states after each step, (R, H); of one step, the start."""
    if states is None or len(sizes) == 1:
        return start
    carried, found = start, []
    for state in walk(states, sizes, reverse):
        found.append(first(carried, state.shape[0]))
        carried = advance(carried, state)
    return join(found, reverse)


# ----------------------------------------------------------------------------------------------------- maths


def wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors, half precision in float32: a recurrence is computed so, and rounded once, at the end."""
    return tuple(t.float() if t is not None and is_half(t) else t for t in tensors)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Keep autocast out of a computation that has chosen its precision."""
    on = autocasts(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def writable(*tensors: Tensor | None) -> bool:
    """Whether a step may write into tensors just made, and run torch's fused kernels of its derivatives."""
    given = [t for t in tensors if t is not None]
    return fused(*given) and not any(t.is_complex() for t in given)


def through_sigmoid(v: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """Return v · s(1 - s): a gradient, or a factor of one, from a sigmoid's output to its input.

    Args:
        v: Gradient of the output.
        s: The output.
        out: Where to write it, for a caller that is :func:`writable`.
    """
    if out is not None:
        return _sigmoid_backward_into(v, s, grad_input=out)
    return _sigmoid_backward(v, s) if writable(v, s) else v * (s * (1 - s))


def through_tanh(v: Tensor, t: Tensor, out: Tensor | None = None) -> Tensor:
    """Return v · (1 - t²): the same for tanh."""
    if out is not None:
        return _tanh_backward_into(v, t, grad_input=out)
    return _tanh_backward(v, t) if writable(v, t) else v * (1 - t * t)


def looped(width: int, sizes: Sizes, *tensors: Tensor | None) -> bool:
    """Whether a step's formula may be one compiled loop, that writes into tensors just made, at every step."""
    given = [t for t in tensors if t is not None]
    # a trace of torch.jit may not compute with sizes that come from outside the Function
    return at_hand() and fused(*given, half=True) and width * sizes[-1] >= MANY


def half_of_one_step(x: Tensor, h0: Tensor, sizes: Sizes) -> bool:
    """Whether a formula of half precision may be one loop from the products on, with nothing made on the way."""
    return (
        len(sizes) == 1
        and is_half(x)
        and looped(h0.shape[1], sizes, x, h0)
        and forward_ad._current_level < 0
    )


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of what is there."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def incoming(grad_y: Tensor | None, grad_h_n: Tensor | None) -> Tensor | None:
    """Return the gradient of the state of the only step, which is both outputs: of both in float32."""
    if grad_y is None or grad_h_n is None:
        return grad_h_n if grad_y is None else grad_y
    return grad_y.float() + grad_h_n.float()


def total(terms: Iterable[Tensor | None], otherwise: Tensor) -> Tensor:
    """Return the sum of the terms that are there, or zeros like ``otherwise``."""
    found = [t for t in terms if t is not None]
    return sum(found[1:], found[0]) if found else torch.zeros_like(otherwise)


def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, of half precision in float32."""  # (1)
    if not suit(x.shape[0], w, x):
        return F.linear(*wide(x, w, b))
    if b is None:
        return product((x,), w.mT)
    return product((x,), w.mT, b.float().expand(x.shape[0], w.shape[0]).contiguous())


def starting(h0: Tensor, w_hh: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return h_0 and W_hhᵀ as the walk takes them: half precision in float32, but for :func:`product` in one step."""
    if len(sizes) == 1 and suit(h0.shape[0], w_hh, h0):
        return h0, w_hh.mT
    return wide(h0, w_hh.mT)


def only_step(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor:
    """Return what the only step is made of, (1), where nothing differentiates or traces."""
    h, w = starting(h0, w_hh, (h0.shape[0],))
    return product((h,), w, affine(x, w_ih, add(*wide(b_ih, b_hh))))


def whole(d: Tensor) -> Parts:
    """Return a matrix as its only part."""
    return (d,)


def in_halves(given: Sequence[Tensor], *gradients: Tensor | None) -> bool:
    """Whether backward's products of x, h_0 and the weights with the gradients may be of bfloat16's halves."""
    x, h0, w_ih, w_hh = given
    return (
        suit(x.shape[0], w_ih, w_hh, x, h0)
        and visible_in_backward(x)
        and fused(*(g for g in gradients if g is not None), half=True)
    )


def sound(found: Sequence[Tensor | None]) -> bool:
    """Whether all is finite that gradients by halves are made of, but for the weights, which are bounded.

    Of an infinity they would make NaN. It is seen in the gradients of the weights, where every element comes in;
    without these, in what there is.
    """
    grad_x, grad_h0, *others = found
    return finite(*(others if any(t is not None for t in others) else (grad_x, grad_h0)))


def affine_gradients(
    needed: Sequence[bool], d_x: Parts, d_h: Parts, x: Tensor, h: Tensor | None, w_ih: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W_ih, W_hh, b_ih, b_hh where they are needed: one product each over all steps.

    ``w_ih`` is bounded already (:func:`factors`); x and h, the large ones, are where it makes a difference.
    """
    need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needed
    of_x = column_sums(d_x) if need_b_ih else None
    same = of_x is not None and all(a is b for a, b in zip(d_x, d_h, strict=True))
    of_h = None
    if need_b_hh:  # also where it is d_x's a tensor of its own: each may be scaled in place
        of_h = of_x.clone() if same and of_x is not None else column_sums(d_h)
    return (
        product(d_x, w_ih) if need_x else None,  # (2)
        _weight_gradient(d_x, x) if need_w_ih else None,
        _weight_gradient(d_h, h) if need_w_hh and h is not None else None,  # (3)
        of_x,
        of_h,
    )


def column_sums(d: Parts) -> Tensor:
    """Return the sums of a matrix of these parts over its rows: a bias's gradient."""
    if len(d) == 1:
        return d[0].sum(0)
    high, low = map(ones_times, d)
    return high.add_(low)


def _weight_gradient(d: Parts, x: Tensor) -> Tensor:
    """Return dᵀ x, of an x at its infinities as :func:`factors` takes it: where that is seen in the product."""
    columns = tuple(part.mT for part in d)
    if len(d) > 1:
        return product(columns, x)
    (whole,) = columns
    if writable(whole, x) and visible_in_backward(x):
        found = whole @ x
        if finite(found):
            return found
    return whole @ factors(x)[0]


def affine_tangents(
    x: Tensor, h: Tensor, w_ih: Tensor, tangents: Sequence[Tensor | None], rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the tangents of a_x and, all but the part of the state's own tangent, of a_h; of the shape of ``rows``."""
    tangent_x, tangent_w_ih, tangent_w_hh, tangent_b_ih, tangent_b_hh = tangents
    of_x = total(
        (
            None if tangent_x is None else tangent_x @ w_ih.mT,
            None if tangent_w_ih is None else x @ tangent_w_ih.mT,
            None if tangent_b_ih is None else tangent_b_ih.expand_as(rows),
        ),
        rows,
    )
    of_h = total(
        (
            None if tangent_w_hh is None else h @ tangent_w_hh.mT,
            None if tangent_b_hh is None else tangent_b_hh.expand_as(rows),
        ),
        rows,
    )
    return of_x, of_h


def conjugate(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors' conjugates: a gradient meets the conjugate of the derivative."""
    return tuple(None if t is None else t.conj() for t in tensors)


def factors(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return what the gradients are multiplied by: conjugates, and their infinities at the largest number.

    A unit that an infinity saturates has the gradient 0, which times that infinity would be NaN; its limit is 0.
    """

    def factor(t: Tensor | None) -> Tensor | None:
        if t is None or t.is_complex():
            return t if t is None else t.conj()
        largest = torch.finfo(t.dtype).max
        return t.clamp(-largest, largest)

    return tuple(factor(t) for t in tensors)


def dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Return the dtype of each tensor."""
    return tuple(None if t is None else t.dtype for t in tensors)


def rounded(dtype: torch.dtype, y: Tensor, h_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states and the last of them in ``dtype``: of one step they are the same."""
    one = h_n is y
    y = y.to(dtype)
    return y, y.detach() if one else h_n.to(dtype)


def cast(tensors: Iterable[Tensor | None], to: Iterable[torch.dtype | None]) -> tuple[Any, ...]:
    """Return each tensor in its dtype: the one rounding of half precision."""
    return tuple(
        t if t is None or dtype is None else t.to(dtype)
        for t, dtype in zip(tensors, to, strict=True)
    )
