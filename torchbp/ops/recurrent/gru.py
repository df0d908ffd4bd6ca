r"""GRU: h_t = (1 - z_t) n_t + z_t h_{t-1}, with reset gate r, update gate z and candidate n, elementwise products.

    r_t = σ(x_t W_irᵀ + b_ir + h_{t-1} W_hrᵀ + b_hr)
    z_t = σ(x_t W_izᵀ + b_iz + h_{t-1} W_hzᵀ + b_hz)
    q_t =                      h_{t-1} W_hnᵀ + b_hn
    n_t = tanh(x_t W_inᵀ + b_in + r_t q_t)

Derivation, for one sequence; a^r, a^z, a^n are the arguments of σ and tanh; all derivatives are of h_t:
    k^n = ∂h/∂a^n = (1 - z)(1 - n²)              k^z = ∂h/∂a^z = (h_{t-1} - n) z(1 - z)
    k^q = ∂h/∂q   = k^n r                        k^r = ∂h/∂a^r = k^n q r(1 - r)                (1)
    the gradient of all that follows, from the last step to the first; ḡ_t comes in for h_t:
    g_t = ḡ_t + g_{t+1} z_{t+1} + d_{t+1} · W_hh,   d_t = g_t (k^r, k^z, k^q)_t                (2)
    x, the weights and the biases: from the d_t of all steps at once (``_recurrence.py``), where what comes by x
    has g_t k^n instead of g_t k^q                                                            (3)
    gradients of the gates themselves, which only a second derivative brings, come in as
    e^n = ḡ^n (1 - n²),   e^z = ḡ^z z(1 - z),   e^q = ḡ^q + e^n r,   e^r = (ḡ^r + e^n q) r(1 - r)     (4)
    forward mode, from the first step to the last, with tangents of a^r, a^z, q and of x W_inᵀ + b_in as t:
    tangent_n = (1 - n²)(t^n + tangent_r q + r t^q),
    tangent_h_t = (1 - z) tangent_n + tangent_z (h_{t-1} - n) + z tangent_h_{t-1}             (5)

Saves:
    float32 and wider: x, h_0, the weights, y, the gates r, z, n, and q: five times 4 bytes a unit
    and step, besides x.
    bfloat16, float16: what came in alone; the states are made again in float32, which is how they were made at first.

Edge values:
    z → 1 keeps the state, and all of its gradient.   NaN gives NaN from its step on.

Length:
    One Function serves cell and layer;
    its forward, backward and jvp walk the same steps and are read side by side.

Sources:
    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation", 2014,
    arXiv:1406.1078; with r applied after the product, as in cuDNN.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.utils.rnn import PackedSequence

from torchbp.ops._autocast import autocasts
from torchbp.ops._function import Context, entry, in_autocast_dtype, is_half, public
from torchbp.ops._half_products import Parts, empty_halves, halved, parts, product, suit
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import in_one_loop
from torchbp.ops.recurrent._layers import cell, check_cell, check_dtypes, layers
from torchbp.ops.recurrent._recurrence import (
    Saved,
    Sizes,
    advance,
    affine,
    affine_gradients,
    affine_tangents,
    arrived,
    before,
    cast,
    column_sums,
    conjugate,
    dtypes,
    factors,
    first,
    half_of_one_step,
    in_halves,
    incoming,
    join,
    looped,
    rounded,
    sound,
    start,
    through_sigmoid,
    through_tanh,
    walk,
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

__all__ = ["GRU", "GRUCell", "GRUFunction", "gru_cell"]


class GRUFunction(Function):
    """One layer in one direction, with backpropagation through time written by hand.

    Call it through :func:`gru_cell` or :class:`GRU`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # (R, I); the rows of all steps: see _recurrence.py
        h0: Tensor,  # (N, H)
        w_ih: Tensor,  # (3H, I)
        w_hh: Tensor,  # (3H, H)
        b_ih: Tensor | None,  # (3H,)
        b_hh: Tensor | None,
        sizes: Sizes,
        reverse: bool,
    ) -> tuple[Tensor | None, ...]:
        # y (R, H), h_n (N, H), and, where anything may read them, (r, z, n) (R, 3H) and q (R, H)
        tensors = (x, h0, w_ih, w_hh, b_ih, b_hh)
        dtype = torch.promote_types(x.dtype, h0.dtype)  # under autocast the state keeps its own
        if half_of_one_step(x, h0, sizes):
            y = in_one_loop(_output, *_arguments(*tensors), h0, outputs=(dtype,))
            if y is not None:
                return y, y.detach(), None, None
        y, h_n, gates, q = _states(*tensors, sizes=sizes, reverse=reverse)
        return *rounded(dtype, y, h_n), gates, q

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.sizes, ctx.reverse = inputs
        x, h0, w_ih, w_hh, *_ = tensors
        y, h_n, gates, q = output
        ctx.half, ctx.device = is_half(x), x.device.type
        ctx.dtypes, ctx.state_dtype = dtypes(*tensors), h_n.dtype
        ctx.set_materialize_grads(False)
        if ctx.half:
            ctx.save_for_backward(*tensors, None, None, None)
        else:
            need_x, need_h0, need_w_ih, *_ = ctx.needs_input_grad
            ctx.save_for_backward(
                x if need_w_ih else None,
                h0,
                w_ih if need_x else None,
                w_hh if need_h0 or len(ctx.sizes) > 1 else None,
                *(None, None),
                y if len(ctx.sizes) > 1 else None,
                *(gates, q),
            )
        ctx.save_for_forward(*tensors, y, gates, q)

    @staticmethod
    def backward(
        ctx: Context,
        grad_y: Tensor | None,
        grad_h_n: Tensor | None,
        grad_gates: Tensor | None,
        grad_q: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        grads = (grad_y, grad_h_n, grad_gates, grad_q)
        with without_autocast(ctx.device):
            found, saved = None, ctx.saved_tensors  # once: a checkpoint gives them no more
            if ctx.half and in_halves(saved[:4], *grads):
                if grad_gates is None is grad_q:
                    found = _at_once(ctx, saved, grad_y, grad_h_n)
                found = found or _gradients(ctx, saved, *grads, halves=True)
            if found is None:
                found = _gradients(ctx, saved, *grads, halves=False)
            assert found is not None
            return *cast(found, ctx.dtypes), None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_h0: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        sizes, reverse = ctx.sizes, ctx.reverse
        x, h0, w_ih, w_hh, y, gates, q = _saved(ctx, ctx.saved_tensors)
        tangent_x, carried, *of_weights = wide(tangent_x, tangent_h0, *others[:4])
        h = before(h0, y, sizes, reverse)
        a_x, a_h = affine_tangents(x, h, w_ih, (tangent_x, *of_weights), gates)
        carried = torch.zeros_like(h0) if carried is None else carried
        states, of_gates, of_q = [], [], []
        for t_x, t_h, before_t, gates_t, q_t in zip(
            *(walk(rows, sizes, reverse) for rows in (a_x, a_h, h, gates, q)), strict=True
        ):
            r, z, n = gates_t.chunk(3, 1)
            held = first(carried, r.shape[0])
            (x_r, x_z, x_n), (h_r, h_z, t_q) = t_x.chunk(3, 1), (t_h + held @ w_hh.mT).chunk(3, 1)
            t_r, t_z = through_sigmoid(x_r + h_r, r), through_sigmoid(x_z + h_z, z)
            t_n = through_tanh(x_n + t_r * q_t + r * t_q, n)
            states.append((1 - z) * t_n + t_z * (before_t - n) + z * held)  # (5)
            of_gates.append(torch.cat((t_r, t_z, t_n), 1))
            of_q.append(t_q)
            carried = advance(carried, states[-1])
        found = (join(states, reverse), carried, join(of_gates, reverse), join(of_q, reverse))
        return cast(found, (ctx.state_dtype, ctx.state_dtype, gates.dtype, q.dtype))


def _gradients(
    ctx: Context, saved: Saved, grad_y: Tensor | None, *gradients: Tensor | None, halves: bool
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of what came in, by products of ``halves`` where that is said and all is finite."""
    sizes, reverse, back = ctx.sizes, ctx.reverse, not ctx.reverse
    need_x, need_h0, *need_weights = ctx.needs_input_grad[:6]
    x, h0, w_ih, w_hh, y, gates, q = _saved(ctx, saved, halves)
    w_ih, w_hh = factors(w_ih, w_hh)
    y, gates, q = conjugate(y, gates, q)
    grad_y, carried, grad_gates, grad_q = wide(grad_y, *gradients)
    one = halves and len(sizes) == 1  # its states are in halves, too
    carried = start(carried, grad_y, q, sizes)
    h = before(h0, y, sizes, reverse)
    states = (*conjugate(*wide(h)), gates, q)
    e = _second_order(grad_gates, grad_q, gates, q)  # (4)
    w, found = _q_first(w_hh if one else wide(w_hh)[0]), None
    if e is None and not one and looped(q.shape[1], sizes, gates, grad_y, carried):
        found = _walk_in_loops(grad_y, carried, states, w, sizes, back)
    d, carried = found or _walk(grad_y, carried, states, e, w, sizes, back, one)
    of_x = parts(d[0]) if halves and not one else d
    grads = _of_all_steps((need_x, *need_weights), of_x, d, x, h, w_ih)  # (3)
    found = (grads[0], carried if need_h0 else None, *grads[1:])
    return found if not halves or sound(found) else None


def _of_all_steps(
    needed: Sequence[bool], of_x: Parts, of_h: Parts, x: Tensor, h: Tensor, w_ih: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W_ih, W_hh, b_ih, b_hh from rows of d^q, d^r, d^z, d^n: three of them come by each."""
    hidden = of_x[0].shape[1] // 4
    d_x, d_h = [part[:, hidden:] for part in of_x], [part[:, : 3 * hidden] for part in of_h]
    *need_products, need_b_ih, need_b_hh = needed
    grad_x, grad_w_ih, grad_w_hh, _, _ = affine_gradients(
        (*need_products, False, False), tuple(d_x), tuple(d_h), x, h, w_ih
    )
    sums = column_sums(of_x) if need_b_ih or need_b_hh else None
    grad_b_ih = sums[hidden:].clone() if sums is not None and need_b_ih else None
    grad_b_hh = _q_last(sums[: 3 * hidden]) if sums is not None and need_b_hh else None
    return grad_x, grad_w_ih, _q_last(grad_w_hh), grad_b_ih, grad_b_hh


def _q_first(w: Tensor | None) -> Any:
    """Return the rows for (r, z, q) of a weight in the order (q, r, z)."""
    return w if w is None else torch.cat((w[2 * (w.shape[0] // 3) :], w[: 2 * (w.shape[0] // 3)]))


def _q_last(w: Tensor | None) -> Any:
    """Return the inverse of :func:`_q_first`."""
    return w if w is None else torch.cat((w[w.shape[0] // 3 :], w[: w.shape[0] // 3]))


def _walk(
    grad_y: Tensor | None,
    carried: Tensor | None,
    states: Sequence[Tensor],
    e: Tensor | None,
    w_hh: Tensor | None,
    sizes: Sizes,
    back: bool,
    halves: bool,
) -> tuple[Parts, Any]:
    """Walk back: return d^q, d^r, d^z, d^n of all steps, side by side, and what arrives at h_0."""
    h, gates, q = states
    k, hidden = _slopes(h, gates, q), q.shape[1]
    write = writable(k, carried, grad_y, e)
    steps = []
    for k_t, z_t, grad, e_t in zip(
        *(walk(rows, sizes, back) for rows in (k, gates.chunk(3, 1)[1], grad_y, e)), strict=True
    ):
        g = arrived(carried, grad, k_t.shape[0])
        d = k_t.mul_(g.unsqueeze(1)) if write else k_t * g.unsqueeze(1)
        d = d.reshape(d.shape[0], 4 * hidden)
        d = d if e_t is None else d + e_t
        d = parts(d) if halves else (d,)
        steps.append(d)
        if w_hh is not None:
            of_h = product(tuple(part[:, : 3 * hidden] for part in d), w_hh)
            carried = advance(carried, torch.addcmul(of_h, g, z_t))  # (2)
    if write and e is None and not halves:
        return (k.reshape(k.shape[0], 4 * hidden),), carried
    return tuple(join([*some], back) for some in zip(*steps, strict=True)), carried


def _walk_in_loops(
    grad_y: Tensor | None,
    carried: Tensor | None,
    states: Sequence[Tensor],
    w_hh: Tensor | None,
    sizes: Sizes,
    back: bool,
) -> tuple[Parts, Any] | None:
    """Walk back with all of a step but its product in one loop; ``None`` where that has not been compiled."""
    h, gates, q = states
    hidden = q.shape[1]
    d = q.new_empty(q.shape[0], 4 * hidden)
    for h_t, gates_t, q_t, grad, d_t in zip(
        *(walk(rows, sizes, back) for rows in (h, gates, q, grad_y, d)), strict=True
    ):
        g, into = arrived(carried, grad, q_t.shape[0]), d_t.chunk(4, 1)
        made = in_one_loop(_step_back, g, h_t, *gates_t.chunk(3, 1), q_t, outputs=(*into, None))
        if made is None:
            return None
        if w_hh is not None:
            carried = advance(carried, made[-1].addmm_(d_t[:, : 3 * hidden], w_hh))  # (2)
    return (d,), carried


def _step_back(
    v: Tensor, h: Tensor, r: Tensor, z: Tensor, n: Tensor, q: Tensor
) -> tuple[Tensor, ...]:
    """Return of a step d^q, d^r, d^z, d^n, and what of g goes on to the step before."""
    d_n = v * ((1 - z) * (1 - n * n))  # (1)
    d_r, d_z = d_n * q * (r * (1 - r)), v * ((h - n) * (z * (1 - z)))
    return d_n * r, d_r, d_z, d_n, v * z  # (2)


def _at_once(
    ctx: Context, saved: Saved, grad_y: Tensor | None, grad_h_n: Tensor | None
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of the only step from one loop, no state made on the way; ``None`` where it can't be."""
    x, h0, w_ih, w_hh, b_ih, b_hh, *_ = saved
    if not half_of_one_step(x, h0, ctx.sizes):
        return None
    v = incoming(grad_y, grad_h_n)
    if v is None:
        return None
    a, hidden = _arguments(x, h0, w_ih, w_hh, b_ih, b_hh), h0.shape[1]
    d = empty_halves(x.shape[0], 4 * hidden)
    into = (*(part for whole in d for part in whole.chunk(4, 1)), torch.float32)
    made = in_one_loop(partial(halved, _step_again), v, *a, h0, outputs=into)
    if made is None:
        return None
    need_x, need_h0, *need_weights = ctx.needs_input_grad[:6]
    w_ih, w_hh = factors(w_ih, w_hh)
    d_h = tuple(part[:, : 3 * hidden] for part in d)
    grad_h0 = product(d_h, _q_first(w_hh), made[-1]) if need_h0 else None
    grad_x, *grads = _of_all_steps((need_x, *need_weights), d, d, x, h0, w_ih)
    return (grad_x, grad_h0, *grads) if sound((grad_x, grad_h0, *grads)) else None


def _step_again(
    v: Tensor, x_r: Tensor, x_z: Tensor, x_n: Tensor, h_r: Tensor, h_z: Tensor, q: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    """Return :func:`_step_back` from the gates' arguments."""
    r, z, n, _, _ = _formula(x_r, x_z, x_n, h_r, h_z, q, h)
    return _step_back(v, h, r, z, n, q)


def _arguments(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, ...]:
    """Return what the gates of the only step are made of, by x and by h, in three parts each."""
    return *affine(x, w_ih, b_ih).chunk(3, 1), *affine(h0, w_hh, b_hh).chunk(3, 1)


def _states(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    *,
    sizes: Sizes,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, h_n, the gates (r, z, n) side by side, and q, of every step."""
    a_x = affine(x, w_ih, b_ih)
    hidden, write, (b_hh,) = h0.shape[1], writable(a_x), wide(b_hh)
    of_one = len(sizes) == 1 and suit(h0.shape[0], w_hh, h0)
    h, w = (h0, w_hh) if of_one else wide(h0, w_hh)
    kept = torch.empty_like(a_x) if looped(hidden, sizes, a_x) else a_x
    states, gates, linear = [], [], []
    for a, kept_t in zip(*(walk(rows, sizes, reverse) for rows in (a_x, kept)), strict=True):
        held = first(h, a.shape[0])
        a_h = affine(held, w, b_hh)
        state, gates_t, q = _step(a, a_h, held, kept_t if write else None)
        states.append(state)
        gates.append(gates_t)
        linear.append(q)
        h = advance(h, state)
    return join(states, reverse), h, kept if write else join(gates, reverse), join(linear, reverse)


def _step(a: Tensor, a_h: Tensor, h: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state, the gates, which are written to ``kept`` where that is given, and q."""
    if kept is not None and kept is not a:
        into = kept.chunk(3, 1)
        made = in_one_loop(
            _formula, *a.chunk(3, 1), *a_h.chunk(3, 1), h, outputs=(*into, None, None)
        )
        if made is not None:
            return made[4], kept, made[3]
    hidden = h.shape[1]
    (h,) = wide(h)
    a_rz, a_n = a.split((2 * hidden, hidden), 1)
    h_rz, q = a_h.split((2 * hidden, hidden), 1)
    rz = torch.sigmoid(a_rz + h_rz) if kept is None else a_rz.add_(h_rz).sigmoid_()
    r, z = rz.chunk(2, 1)
    if kept is None:
        n = torch.tanh(a_n + r * q)
        gates = torch.cat((rz, n), 1)
    else:
        n = a_n.addcmul_(r, q).tanh_()
        gates = a if kept is a else kept.copy_(a)
    return torch.addcmul(n, z, h - n), gates, q.clone()  # a part would keep the whole


def _output(*given: Tensor) -> Tensor:
    return _formula(*given)[-1]


def _formula(
    x_r: Tensor, x_z: Tensor, x_n: Tensor, h_r: Tensor, h_z: Tensor, q: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * q)
    return r, z, n, q, n + z * (h - n)


def _slopes(h: Tensor, gates: Tensor, q: Tensor) -> Tensor:
    """Return k^q, k^r, k^z, k^n, (R, 4, H), of all steps at once."""
    r, z, n = gates.chunk(3, 1)
    k_n = through_tanh(1 - z, n)
    k_r = through_sigmoid(k_n * q, r)
    k_z = through_sigmoid(h - n, z)
    return torch.stack((k_n * r, k_r, k_z, k_n), 1)  # (1)


def _second_order(
    grad_gates: Tensor | None, grad_q: Tensor | None, gates: Tensor, q: Tensor
) -> Tensor | None:
    """Return e^q, e^r, e^z, e^n, (R, 4H): nothing, but under double backward."""
    if grad_gates is None and grad_q is None:
        return None
    r, z, n = gates.chunk(3, 1)
    grad_q = torch.zeros_like(q) if grad_q is None else grad_q
    grad_gates = torch.zeros_like(gates) if grad_gates is None else grad_gates
    grad_r, grad_z, grad_n = grad_gates.chunk(3, 1)
    e_n = through_tanh(grad_n, n)
    e_r = through_sigmoid(grad_r + e_n * q, r)
    return torch.cat((grad_q + e_n * r, e_r, through_sigmoid(grad_z, z), e_n), 1)  # (4)


def _saved(ctx: Context, saved: Saved, halves: bool = False) -> tuple[Any, ...]:
    """Return x, h_0, the weights, y, the gates and q: what half precision did not keep, made again.

    The others are then in float32, but where products are of ``halves``.
    """
    *tensors, y, gates, q = saved
    if ctx.half:
        tensors = tensors if halves else wide(*tensors)
        y, _, gates, q = _states(*tensors, sizes=ctx.sizes, reverse=ctx.reverse)
    return *tensors[:4], y, gates, q


_gru = entry(GRUFunction)


def _layer(
    x: Tensor,
    states: tuple[Tensor],
    weights: Sequence[Tensor | None],
    sizes: Sizes,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction; autocast casts all but the state, on a GPU that too, as in torch."""
    (h0,) = states
    if autocasts(x.device.type):
        x, *weights = in_autocast_dtype(x, *weights)
        if not x.is_cpu:
            (h0,) = in_autocast_dtype(h0)
        check_dtypes("GRU", x, weights)
    else:
        check_dtypes("GRU", x, (h0, *weights))
    with without_autocast(x.device.type):
        y, h_n, _, _ = _gru(x, h0, *weights, sizes, reverse)
        return y, h_n


@public
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r"""One step of a gated recurrent unit: :math:`h' = (1 - z) n + z h`.

    With :math:`r = \sigma(x W_{ir}^T + b_{ir} + h W_{hr}^T + b_{hr})`, z likewise, and
    :math:`n = \tanh(x W_{in}^T + b_{in} + r (h W_{hn}^T + b_{hn}))`.

    Args:
        input: x, ``(N, I)``, floating point or complex.
        hx: h, ``(N, H)``, of the dtype of ``input``.
        w_ih: ``(3H, I)``: the rows of r, z, n.
        w_hh: ``(3H, H)``, likewise.
        b_ih: ``(3H,)`` or ``None``.
        b_hh: ``(3H,)`` or ``None``.

    Returns:
        h', ``(N, H)``.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.
        IndexError: ``input`` or ``hx`` has no dimension N.

    Example:
        >>> import torch
        >>> from torchbp.functional import gru_cell
        >>> zero = torch.zeros(3, 1)
        >>> gru_cell(torch.ones(1, 1), torch.ones(1, 1), w_ih=zero, w_hh=zero)
        tensor([[0.5000]])
    """
    weights = (w_ih, w_hh, b_ih, b_hh)
    check_cell("gru_cell", 3, input, (hx,), weights)
    return _layer(input, (hx,), weights, (input.shape[0],), False)[0]


class GRU(nn.GRU):
    """:func:`gru_cell` over whole sequences, in layers and directions.

    On a GPU every step is launched by itself, where torch's own layer runs cuDNN's kernel for all of them.
    """

    __module__ = "torchbp.nn"

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        return layers(_layer, self, input, hx)


class GRUCell(nn.GRUCell):
    """Module form of :func:`gru_cell`; the state is zeros by default."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return cell(gru_cell, self, input, hx, states=1)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield from layer_samples(make, GRU)
    yield GRUCell, Sample((3, 5)), Sample((make.normal(4, 3), make.normal(4, 5)))
    yield GRUCell, Sample((3, 5), {"bias": False}), Sample((make.normal(3),), name="one-sequence")


OP = Op(
    function=gru_cell,
    modules=(GRU, GRUCell),
    reference=cell_rounded_once(torch.gru_cell),
    samples=cell_samples(3, 1),
    module_samples=_module_samples,
    errors=cell_errors(3, 1),
    saved_bytes=cell_saved_bytes(4, reads_h=True),
    benchmark=cell_benchmark(3, 1),
)
