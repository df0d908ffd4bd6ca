r"""What RNN, LSTM and GRU share: time, the affine maps, and the Module with its layers, directions and packing.

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

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import fused, in_autocast_dtype, is_half
from torchbp.ops.dropout.dropout import dropout

__all__ = [
    "Sizes",
    "add",
    "advance",
    "affine_gradients",
    "affine_tangents",
    "before",
    "cast",
    "cell",
    "check_cell",
    "check_dtypes",
    "conjugate",
    "dtypes",
    "eager",
    "first",
    "join",
    "layers",
    "through_sigmoid",
    "through_tanh",
    "total",
    "walk",
    "wide",
    "without_autocast",
]

Sizes = tuple[int, ...]
Layer = Callable[[Tensor, tuple[Any, ...], Sequence[Any], Sizes, bool], tuple[Tensor, ...]]


# ------------------------------------------------------------------------------------------------------ time


def walk(rows: Tensor | None, sizes: Sizes, reverse: bool) -> Iterable[Any]:
    """Return the rows of each step, a view each, in the order of the walk; ``None`` for each of nothing."""
    if rows is None:
        return repeat(None, len(sizes))
    steps = rows.split(sizes)
    return steps[::-1] if reverse else steps


def join(steps: Sequence[Tensor], reverse: bool) -> Tensor:
    """Return one matrix of the rows of each step, given in the order of the walk."""
    return torch.cat(steps[::-1] if reverse else steps)


def first(carried: Tensor, n: int) -> Tensor:
    """Return the carried rows that a step of ``n`` rows starts from."""
    return carried if n == carried.shape[0] else carried[:n]


def advance(carried: Tensor, new: Tensor) -> Tensor:
    """Return what is carried on after a step that made ``new`` of the first rows."""
    n = new.shape[0]
    return new if n == carried.shape[0] else torch.cat((new, carried[n:]))


def before(start: Tensor, states: Tensor | None, sizes: Sizes, reverse: bool) -> Tensor:
    """Return the state that each step started from, from the states after each step, (R, H)."""
    if states is None:  # one step alone
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
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def eager(*tensors: Tensor | None) -> bool:
    """Whether a step may write into tensors just made, and run torch's fused kernels of its derivatives."""
    given = [t for t in tensors if t is not None]
    return fused(*given) and not any(t.is_complex() for t in given)


def through_sigmoid(v: Tensor, s: Tensor) -> Tensor:
    """Return v · s(1 - s): a gradient, or a factor of one, from a sigmoid's output to its input."""
    return torch.ops.aten.sigmoid_backward(v, s) if eager(v, s) else v * (s * (1 - s))


def through_tanh(v: Tensor, t: Tensor) -> Tensor:
    """Return v · (1 - t²): the same for tanh."""
    return torch.ops.aten.tanh_backward(v, t) if eager(v, t) else v * (1 - t * t)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of what is there."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def total(terms: Iterable[Tensor | None], otherwise: Tensor) -> Tensor:
    """Return the sum of the terms that are there, or zeros like ``otherwise``."""
    found = [t for t in terms if t is not None]
    return sum(found[1:], found[0]) if found else torch.zeros_like(otherwise)


def affine_gradients(
    needed: Sequence[bool], d_x: Tensor, d_h: Tensor, x: Tensor, h: Tensor, w_ih: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W_ih, W_hh, b_ih, b_hh where they are needed: one product each over all steps."""
    need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needed
    b_ih = d_x.sum(0) if need_b_ih else None
    b_hh = b_ih if d_h is d_x and need_b_ih else d_h.sum(0) if need_b_hh else None
    return (
        d_x @ w_ih if need_x else None,  # (2)
        d_x.mT @ x if need_w_ih else None,
        d_h.mT @ h if need_w_hh else None,  # (3)
        b_ih,
        b_hh if need_b_hh else None,
    )


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


def dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Return the dtype of each tensor."""
    return tuple(None if t is None else t.dtype for t in tensors)


def cast(
    tensors: Iterable[Tensor | None], to: Iterable[torch.dtype | None]
) -> tuple[Any, ...]:
    """Return each tensor in its dtype: the one rounding of half precision."""
    return tuple(
        t if t is None or dtype is None else t.to(dtype)
        for t, dtype in zip(tensors, to, strict=True)
    )


# ------------------------------------------------------------------------------------- arguments and Modules


def check_cell(
    op: str, gates: int, input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> None:
    """Raise, of torch's types, where the tensors of a cell of ``gates`` gates do not fit together."""
    w_ih, w_hh, *biases = weights
    if w_ih is None or w_hh is None:
        raise TypeError(wrong(op, "two weights", None, "only a bias may be left out"))
    for name, t in (("input", input), *((f"state {i}", s) for i, s in enumerate(states))):
        if t.dim() != 2:
            kind = IndexError if t.dim() < 2 else RuntimeError
            raise kind(wrong(op, f"{name} of shape (N, features)", shape(t), "add a dimension N"))
    n, hidden = input.shape[0], w_hh.shape[1]
    for name, t, rule in (
        ("input", input, (n, w_ih.shape[1])),
        *((f"state {i}", s, (n, hidden)) for i, s in enumerate(states)),
        ("w_ih", w_ih, (gates * hidden, w_ih.shape[1])),
        ("w_hh", w_hh, (gates * hidden, hidden)),
        *(("bias", b, (gates * hidden,)) for b in biases if b is not None),
    ):
        if tuple(t.shape) != rule:
            advice = "N sequences, and the features of the weights"
            raise RuntimeError(wrong(op, f"{name} of shape {rule}", shape(t), advice))
    check_dtypes(op, input, weights)


def check_dtypes(op: str, input: Tensor, weights: Sequence[Tensor | None]) -> None:
    """Raise where a weight has another dtype than the rows it meets; half precision would hide it."""
    for w in weights:
        if w is not None and w.dtype != input.dtype:
            raise RuntimeError(wrong(op, f"weights of {input.dtype}", w.dtype, "convert one"))


def cell(
    function: Callable[..., Any], module: nn.RNNCellBase, input: Tensor, hx: Any, states: int
) -> Any:
    """Run a cell's Module form: states of zeros by default, and input without a batch dimension."""
    name = type(module).__name__
    given = (hx,) if isinstance(hx, Tensor) else tuple(hx or ())
    for what, t in (("input", input), *(("hidden", s) for s in given)):
        if t.dim() not in (1, 2):
            rule = f"{what} of 1 or 2 dimensions"
            raise ValueError(wrong(name, rule, f"{t.dim()}", "(N, features) or (features,)"))
    batched = input.dim() == 2
    rows = input if batched else input.unsqueeze(0)
    if hx is None:
        given = (rows.new_zeros(rows.shape[0], module.hidden_size),) * states
    elif not batched:
        given = tuple(s.unsqueeze(0) for s in given)
    hx = given if states > 1 else given[0]
    weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    result = function(rows, hx, *weights)
    if batched:
        return result
    return result.squeeze(0) if states == 1 else tuple(s.squeeze(0) for s in result)


def layers(layer: Layer, module: nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any]:
    """Run the Module form of a recurrent op: all its layers and directions.

    Args:
        layer: ``(x, states, weights, sizes, reverse) -> (y, *final states)``, one layer in one direction; the weights
            are W_ih, W_hh, b_ih, b_hh, ``None`` where there is no bias, and what follows.
        module: The constructor's arguments and the parameters are read from it, and its own checks are run.
        input: A padded batch, one sequence, or a ``PackedSequence``.
        hx: The initial state as the Module takes it: a tensor, a pair for LSTM, or ``None`` for zeros.

    Returns:
        What the Module returns: output, final states.
    """
    module._update_flat_weights()
    widths = (module.hidden_size,)
    if isinstance(module, nn.LSTM):
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
    packed = isinstance(input, PackedSequence)
    rows, batch_sizes, sorting, unsorting = input if packed else (input, None, None, None)
    batched = True
    if not packed:
        if rows.dim() not in (2, 3):
            rule = "input of 2 or 3 dimensions"
            advice = "(L, N, features), or (L, features) for one sequence"
            raise ValueError(wrong(type(module).__name__, rule, f"{rows.dim()}", advice))
        batched = rows.dim() == 3
        if not batched:
            rows = rows.unsqueeze(0 if module.batch_first else 1)
    n = int(batch_sizes[0]) if packed else rows.shape[0 if module.batch_first else 1]
    states = _initial(module, rows, hx, n, batched, widths)
    hx = states if len(widths) > 1 else states[0]
    module.check_forward_args(rows, hx, batch_sizes)  # torch's own: shapes and dtypes
    hx = module.permute_hidden(hx, sorting)
    states = hx if len(widths) > 1 else (hx,)
    if packed:
        sizes = tuple(batch_sizes.tolist())
    else:
        rows = rows.transpose(0, 1) if module.batch_first else rows
        sizes = (n,) * rows.shape[0]
        rows = rows.reshape(rows.shape[0] * n, rows.shape[2])
    if not sizes:
        advice = "leave out what is empty"
        raise RuntimeError(wrong(type(module).__name__, "a sequence of at least one step", 0, advice))

    output, final = _stacked(layer, module, rows, states, sizes)

    if not packed:
        output = output.view(len(sizes), n, output.shape[-1])
        output = output.transpose(0, 1) if module.batch_first else output
    if not batched:
        output = output.squeeze(0 if module.batch_first else 1)
        final = tuple(s.squeeze(1) for s in final)
    final = module.permute_hidden(final if len(widths) > 1 else final[0], unsorting)
    if packed:
        output = PackedSequence(output, batch_sizes, sorting, unsorting)
    return output, final


def _initial(
    module: nn.RNNBase, rows: Tensor, hx: Any, n: int, batched: bool, widths: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Return the states, (layers · directions, N, width) each, of which the sizes are still to be checked."""
    if hx is None:
        count = module.num_layers * (1 + module.bidirectional)
        return tuple(rows.new_zeros(count, n, width) for width in widths)
    states = (hx,) if len(widths) == 1 else (hx[0], hx[1])
    for state in states:
        dims = 3 if batched else 2
        if state.dim() != dims:
            rule = f"hx of {dims} dimensions"
            advice = "it has a dimension N where the input has one"
            raise RuntimeError(wrong(type(module).__name__, rule, f"{state.dim()}", advice))
    return states if batched else tuple(s.unsqueeze(1) for s in states)


def _stacked(
    layer: Layer,
    module: nn.RNNBase,
    rows: Tensor,
    states: tuple[Tensor, ...],
    sizes: Sizes,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run layer upon layer, each in all its directions, with dropout between them."""
    starts = list(zip(*(s.unbind(0) for s in states), strict=True))
    directions = 1 + module.bidirectional
    final = []
    for k, weights in enumerate(module.all_weights):
        which, reverse = divmod(k, directions)
        if not reverse:
            if which and module.training and module.dropout:
                rows = dropout(rows, module.dropout)
            outputs = []
        if not module.bias:
            weights = (*weights[:2], None, None, *weights[2:])
        y, *after = layer(rows, starts[k], weights, sizes, bool(reverse))
        outputs.append(y)
        final.append(after)
        if len(outputs) == directions:
            rows = torch.cat(outputs, -1) if module.bidirectional else y
    return rows, tuple(torch.stack(s) for s in zip(*final, strict=True))
