r"""RNN: h_t = φ(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh), where φ is tanh or ReLU (Elman's network).

Derivation, for one sequence; a_t is the argument of φ, ḡ_t the gradient that comes in for h_t, ĝ_t that of h_T alone:
    ∂h_t/∂a_t     = φ'(a_t) = 1 - h_t² for tanh, [h_t > 0] for ReLU: from the output           (1)
    ∂a_t/∂h_{t-1} = W_hh
    the gradient of all that follows, from the last step to the first, beginning with ĝ_T:
    g_t = ḡ_t + d_{t+1} · W_hh,   d_t = g_t · φ'(a_t),   grad_h0 = d_1 · W_hh                  (2)
    x, the weights and the biases: from the d_t of all steps at once (``_recurrence.py``)      (3)
    forward mode, from the first step to the last:
    tangent_h_t = φ'(a_t) · (tangent_x_t W_ihᵀ + ... + tangent_h_{t-1} W_hhᵀ)                  (4)

Saves:
    float32 and wider: x and the output y (4 bytes an element each), h_0, the weights.
    bfloat16, float16: what came in alone. There y has lost what (1) needs, so the states are made again in float32,
    which is how they were made at first: only y is rounded.

Edge values:
    tanh: a → ±∞ gives ±1 and no gradient.   ReLU: the gradient at a = 0 is 0.   NaN gives NaN from its step on.

Length:
    One Function serves both cells and the layer;
    its forward, backward and jvp walk the same steps and are read side by side.

Sources:
    Elman, "Finding Structure in Time", 1990, doi:10.1207/s15516709cog1402_1.
    Werbos, "Backpropagation through time: what it does and how to do it", 1990, doi:10.1109/5.58337.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.utils.rnn import PackedSequence

from torchbp.ops._autocast import autocasts
from torchbp.ops._function import Context, entry, in_autocast_dtype, is_half, kernel, public
from torchbp.ops._half_products import high_and_low, parts, product
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import in_one_loop
from torchbp.ops.recurrent._layers import cell, check_cell, check_dtypes, layers
from torchbp.ops.recurrent._recurrence import (
    Saved,
    Sizes,
    add,
    advance,
    affine,
    affine_gradients,
    affine_tangents,
    arrived,
    before,
    cast,
    conjugate,
    dtypes,
    factors,
    first,
    half_of_one_step,
    in_halves,
    incoming,
    join,
    only_step,
    rounded,
    sound,
    start,
    starting,
    through_tanh,
    walk,
    whole,
    wide,
    without_autocast,
    writable,
)
from torchbp.ops.recurrent._samples import (
    cell_benchmark,
    cell_errors,
    cell_rounded_once,
    cell_samples,
    cell_saved_bytes,
    layer_samples,
)

__all__ = ["RNN", "RNNCell", "RNNFunction", "rnn_relu_cell", "rnn_tanh_cell"]

_threshold_backward = kernel("threshold_backward")


class RNNFunction(Function):
    """One layer in one direction, with backpropagation through time written by hand.

    Call it through :func:`rnn_tanh_cell`, :func:`rnn_relu_cell` or :class:`RNN`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # (R, I); the rows of all steps: see _recurrence.py
        h0: Tensor,  # (N, H)
        w_ih: Tensor,  # (H, I)
        w_hh: Tensor,  # (H, H)
        b_ih: Tensor | None,  # (H,)
        b_hh: Tensor | None,
        relu: bool,
        sizes: Sizes,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:  # y (R, H), h_n (N, H)
        if half_of_one_step(x, h0, sizes):
            a = only_step(x, h0, w_ih, w_hh, b_ih, b_hh)
            y = in_one_loop(torch.relu if relu else torch.tanh, a, outputs=(x.dtype,))
            if y is not None:
                return y, y.detach()
        y, h_n = _states(x, h0, w_ih, w_hh, b_ih, b_hh, relu=relu, sizes=sizes, reverse=reverse)
        return rounded(x.dtype if is_half(x) else y.dtype, y, h_n)  # of integers floats, as torch

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.relu, ctx.sizes, ctx.reverse = inputs
        x, h0, w_ih, w_hh, *_ = tensors
        ctx.half, ctx.device = is_half(x), x.device.type
        ctx.dtypes = dtypes(*tensors)
        ctx.set_materialize_grads(False)
        if ctx.half:
            ctx.save_for_backward(*tensors, None)
        else:
            need_x, need_h0, need_w_ih, need_w_hh, *_ = ctx.needs_input_grad
            ctx.save_for_backward(
                x if need_w_ih else None,
                h0 if need_w_hh else None,
                w_ih if need_x else None,
                w_hh if need_h0 or len(ctx.sizes) > 1 else None,
                *(None, None, output[0]),
            )
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with without_autocast(ctx.device):
            found, saved = None, ctx.saved_tensors  # once: a checkpoint gives them no more
            if ctx.half and in_halves(saved[:4], grad_y, grad_h_n):
                found = _at_once(ctx, saved, grad_y, grad_h_n)
                found = found or _gradients(ctx, saved, grad_y, grad_h_n, halves=True)
            if found is None:
                found = _gradients(ctx, saved, grad_y, grad_h_n, halves=False)
            assert found is not None
            return *cast(found, ctx.dtypes), None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_h0: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sizes, reverse = ctx.sizes, ctx.reverse
        x, h0, w_ih, w_hh, y = _saved(ctx, ctx.saved_tensors)
        tangent_x, carried, *of_weights = wide(tangent_x, tangent_h0, *others[:4])
        h = before(h0, y, sizes, reverse)
        a_x, a_h = affine_tangents(x, h, w_ih, (tangent_x, *of_weights), y)
        carried = torch.zeros_like(h0) if carried is None else carried
        steps = []
        for a, state in zip(walk(a_x + a_h, sizes, reverse), walk(y, sizes, reverse), strict=True):
            tangent_a = a + first(carried, a.shape[0]) @ w_hh.mT
            steps.append(_through(tangent_a, state, ctx.relu))  # (4)
            carried = advance(carried, steps[-1])
        return cast((join(steps, reverse), carried), ctx.dtypes[:1] * 2)


def _gradients(
    ctx: Context, saved: Saved, grad_y: Tensor | None, grad_h_n: Tensor | None, *, halves: bool
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of what came in, by products of ``halves`` where that is said and all is finite."""
    sizes, relu, back = ctx.sizes, ctx.relu, not ctx.reverse
    need_x, need_h0, *need_weights = ctx.needs_input_grad[:6]
    x, h0, w_ih, w_hh, y = _saved(ctx, saved, halves)
    (w_ih, w_hh), (y,) = factors(w_ih, w_hh), conjugate(y)
    one = halves and len(sizes) == 1  # its states are in halves, too
    grad_y, grad_h_n = wide(grad_y, grad_h_n)
    carried, steps = start(grad_h_n, grad_y, y, sizes), []
    w, split = w_hh if one else wide(w_hh)[0], parts if one else whole
    for h, grad in zip(walk(y, sizes, back), walk(grad_y, sizes, back), strict=True):
        d = split(_through(arrived(carried, grad, h.shape[0]), h, relu))  # (1)
        steps.append(d)
        if w is not None:
            carried = advance(carried, product(d, w))  # (2)
    d_h = tuple(join([*some], back) for some in zip(*steps, strict=True))
    d_x = parts(d_h[0]) if halves and not one else d_h
    h = before(h0, y, sizes, ctx.reverse) if need_weights[1] else None
    grad_x, *grads = affine_gradients((need_x, *need_weights), d_x, d_h, x, h, w_ih)  # (3)
    found = (grad_x, carried if need_h0 else None, *grads)
    return found if not halves or sound(found) else None


def _at_once(
    ctx: Context, saved: Saved, grad_y: Tensor | None, grad_h_n: Tensor | None
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of the only step from one loop, no state made on the way; ``None`` where it can't be."""
    x, h0, w_ih, w_hh, b_ih, b_hh, _ = saved
    if not half_of_one_step(x, h0, ctx.sizes):
        return None
    v = incoming(grad_y, grad_h_n)
    if v is None:
        return None
    a = only_step(x, h0, w_ih, w_hh, b_ih, b_hh)
    formula = _halves_of_relu if ctx.relu else _halves_of_tanh
    d = in_one_loop(formula, v, a, outputs=(torch.bfloat16,) * 2)
    if d is None:
        return None
    need_x, need_h0, *need_weights = ctx.needs_input_grad[:6]
    w_ih, w_hh = factors(w_ih, w_hh)
    grad_h0 = product(d, w_hh) if need_h0 else None
    grad_x, *grads = affine_gradients((need_x, *need_weights), d, d, x, h0, w_ih)
    return (grad_x, grad_h0, *grads) if sound((grad_x, grad_h0, *grads)) else None


def _halves_of_tanh(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(a)
    return high_and_low(v * (1 - h * h))


def _halves_of_relu(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return high_and_low(v.masked_fill(a <= 0, 0))


def _states(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    *,
    relu: bool,
    sizes: Sizes,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the states after every step, and those that each sequence ends with."""
    a = affine(x, w_ih, add(*wide(b_ih, b_hh)))
    write, act = writable(a), torch.relu if relu else torch.tanh
    if write and len(sizes) == 1 and a.is_floating_point():  # else h_n would be a part of a
        act = torch.relu_ if relu else torch.tanh_
    (h, w), steps = starting(h0, w_hh, sizes), []
    for a_t in walk(a, sizes, reverse):
        held = first(h, a_t.shape[0])
        steps.append(act(product((held,), w, a_t) if write else a_t + held @ w))
        h = advance(h, steps[-1])
    return join(steps, reverse), h


def _through(v: Tensor, h: Tensor, relu: bool) -> Tensor:
    """Return v · φ'(a), from h = φ(a)."""
    if not relu:
        return through_tanh(v, h)
    if writable(v, h):  # a mask takes ten times as long
        return _threshold_backward(v, h, 0)
    return v.masked_fill(h <= 0, 0)


def _saved(ctx: Context, saved: Saved, halves: bool = False) -> tuple[Tensor, ...]:
    """Return x, h_0, the weights and y: where half precision kept no y, made again; the others then in float32."""
    *tensors, y = saved
    if ctx.half:
        tensors = tensors if halves else wide(*tensors)
        y, _ = _states(*tensors, relu=ctx.relu, sizes=ctx.sizes, reverse=ctx.reverse)
    return *tensors[:4], y


_rnn = entry(RNNFunction)


def _layer(
    x: Tensor,
    states: tuple[Tensor],
    weights: Sequence[Tensor | None],
    sizes: Sizes,
    reverse: bool,
    *,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction, in autocast's dtype under autocast, as torch does."""
    (h0,) = states
    if autocasts(x.device.type):
        x, h0, *weights = in_autocast_dtype(x, h0, *weights)
    check_dtypes("RNN", x, (h0, *weights))
    with without_autocast(x.device.type):
        y, h_n = _rnn(x, h0, *weights, relu, sizes, reverse)
        return y, h_n


@public
def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r"""One step of a tanh RNN: :math:`h' = \tanh(x W_{ih}^T + b_{ih} + h W_{hh}^T + b_{hh})`.

    Args:
        input: x, ``(N, I)``, floating point or complex.
        hx: h, ``(N, H)``, of the dtype of ``input``.
        w_ih: ``(H, I)``.
        w_hh: ``(H, H)``.
        b_ih: ``(H,)`` or ``None``.
        b_hh: ``(H,)`` or ``None``.

    Returns:
        h', ``(N, H)``, in ``[-1, 1]``; under autocast in the lower precision.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
        IndexError: ``input`` or ``hx`` has no dimension N.

    Example:
        >>> import torch
        >>> from torchbp.functional import rnn_tanh_cell
        >>> one = torch.ones(1, 1)
        >>> rnn_tanh_cell(one, one, w_ih=one, w_hh=-one)
        tensor([[0.]])
    """
    return _cell("rnn_tanh_cell", input, hx, (w_ih, w_hh, b_ih, b_hh), relu=False)


@public
def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r"""One step of a ReLU RNN: :math:`h' = \max(0, x W_{ih}^T + b_{ih} + h W_{hh}^T + b_{hh})`.

    Args:
        input: x, ``(N, I)``, floating point.
        hx: h, ``(N, H)``, of the dtype of ``input``.
        w_ih: ``(H, I)``.
        w_hh: ``(H, H)``.
        b_ih: ``(H,)`` or ``None``.
        b_hh: ``(H,)`` or ``None``.

    Returns:
        h', ``(N, H)``, not negative; under autocast in the lower precision.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
        IndexError: ``input`` or ``hx`` has no dimension N.

    Example:
        >>> import torch
        >>> from torchbp.functional import rnn_relu_cell
        >>> one = torch.ones(1, 1)
        >>> rnn_relu_cell(one, one, w_ih=one, w_hh=2 * one)
        tensor([[3.]])
    """
    return _cell("rnn_relu_cell", input, hx, (w_ih, w_hh, b_ih, b_hh), relu=True)


def _cell(op: str, x: Tensor, h: Tensor, weights: Sequence[Tensor | None], *, relu: bool) -> Tensor:
    check_cell(op, 1, x, (h,), weights)
    return _layer(x, (h,), weights, (x.shape[0],), False, relu=relu)[0]


class RNN(nn.RNN):
    """Elman's network over whole sequences: :func:`rnn_tanh_cell` or :func:`rnn_relu_cell` at every step.

    On a GPU every step is launched by itself, where torch's own layer runs cuDNN's kernel for all of them.
    """

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Any:
        return layers(partial(_layer, relu=self.nonlinearity == "relu"), self, input, hx)


class RNNCell(nn.RNNCell):
    """Module form of :func:`rnn_tanh_cell` and :func:`rnn_relu_cell`, by its ``nonlinearity``."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        function = rnn_relu_cell if self.nonlinearity == "relu" else rnn_tanh_cell
        return cell(function, self, input, hx, states=1)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield from layer_samples(make, RNN)
    h = make.normal(1, 4, 5)
    yield RNN, Sample((3, 5, 1, "relu")), Sample((make.normal(3, 4, 3), h), name="relu")
    for nonlinearity in ("tanh", "relu"):
        ctor = Sample((3, 5), {"nonlinearity": nonlinearity})
        yield RNNCell, ctor, Sample((make.normal(4, 3), make.normal(4, 5)), name=nonlinearity)
    yield RNNCell, Sample((3, 5), {"bias": False}), Sample((make.normal(3),), name="one-sequence")


OPS = tuple(
    Op(
        function=function,
        modules=modules,
        reference=cell_rounded_once(reference),
        samples=cell_samples(1, 1),
        module_samples=module_samples,
        errors=cell_errors(1, 1),
        saved_bytes=cell_saved_bytes(1, reads_h=False),
        benchmark=cell_benchmark(1, 1),
    )
    for function, modules, reference, module_samples in (
        (rnn_tanh_cell, (RNN, RNNCell), torch.rnn_tanh_cell, _module_samples),
        (rnn_relu_cell, (), torch.rnn_relu_cell, lambda make: ()),  # noqa: ARG005
    )
)
