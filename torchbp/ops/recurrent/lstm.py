r"""LSTM: c_t = f_t c_{t-1} + i_t g_t, h_t = o_t tanh(c_t), with gates i, f, o and candidate g, elementwise products.

    i_t = σ(x_t W_iiᵀ + b_ii + h_{t-1} W_hiᵀ + b_hi), f_t and o_t likewise; g_t likewise, with tanh for σ.
    With a projection ("proj_size", P units) h_t = m_t W_hrᵀ, where m_t = o_t tanh(c_t); without, h_t = m_t.

Derivation, for one sequence; a^i, a^f, a^g, a^o are the arguments of σ and tanh:
    k^i = ∂c/∂a^i = g i(1 - i)       k^f = ∂c/∂a^f = c_{t-1} f(1 - f)       k^g = ∂c/∂a^g = i (1 - g²)
    k^o = ∂m/∂a^o = tanh(c) o(1 - o)      k^c = ∂m/∂c = o (1 - tanh²(c))                      (1)
    the gradients of all that follows, from the last step to the first; ḡ_t comes in for h_t:
    g^h_t = ḡ_t + d_{t+1} · W_hh,   g^m_t = g^h_t · W_hr (without projection g^h_t)
    g^c_t = g^c_{t+1} f_{t+1} + g^m_t k^c_t
    d_t   = (g^c k^i, g^c k^f, g^c k^g, g^m k^o)_t                                            (2)
    x, the weights and the biases: from the d_t of all steps at once (``_recurrence.py``)      (3)
    grad_W_hr = Σ_t (g^h_t)ᵀ · m_t                                                            (4)
    gradients of the states c_t and of the gates, which only a second derivative brings, come in as terms of g^c_t,
    and of d_t as e^i = ḡ^i i(1 - i) and so on                                                (5)
    forward mode, from the first step to the last:
    tangent_c_t = f tangent_c_{t-1} + k^i t^i + k^f t^f + k^g t^g,   tangent_m_t = k^c tangent_c_t + k^o t^o     (6)

Saves:
    float32 and wider: x, h_0, c_0, the weights, y, the states c and the gates:
    six times 4 bytes a unit and step, besides x.
    bfloat16, float16: what came in alone; the states are made again in float32, which is how they were made at first.

Edge values:
    f → 1, i → 0 keeps the state, and all of its gradient.   NaN gives NaN from its step on.

Length:
    One Function serves cell, layer and projection;
    its forward, backward and jvp walk the same steps and are read side by side.

Sources:
    Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997, doi:10.1162/neco.1997.9.8.1735.
    Gers, Schmidhuber, Cummins, "Learning to Forget: Continual Prediction with LSTM", 2000,
    doi:10.1162/089976600300015015.   Projection: Sak, Senior, Beaufays, 2014, arXiv:1402.1128.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.utils.rnn import PackedSequence

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, in_autocast_dtype, is_half, public
from torchbp.ops._half_products import Parts, empty_halves, halved, parts, product
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
    looped,
    only_step,
    rounded,
    sound,
    start,
    starting,
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

__all__ = ["LSTM", "LSTMCell", "LSTMFunction", "lstm_cell"]


class LSTMFunction(Function):
    """One layer in one direction, with backpropagation through time written by hand.

    Call it through :func:`lstm_cell` or :class:`LSTM`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,  # (R, I); the rows of all steps: see _recurrence.py
        h0: Tensor,  # (N, H), or (N, P)
        c0: Tensor,  # (N, H)
        w_ih: Tensor,  # (4H, I)
        w_hh: Tensor,  # (4H, H), or (4H, P)
        b_ih: Tensor | None,  # (4H,)
        b_hh: Tensor | None,
        w_hr: Tensor | None,  # (P, H)
        sizes: Sizes,
        reverse: bool,
    ) -> tuple[Tensor | None, ...]:
        # y (R, H or P), h_n (N, H or P), c_n (N, H), and, where anything may read them, c (R, H), gates (R, 4H)
        tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        dtype = torch.promote_types(x.dtype, c0.dtype)  # under autocast the state c keeps its own
        if w_hr is None and half_of_one_step(x, h0, sizes):
            a = only_step(x, h0, w_ih, w_hh, b_ih, b_hh).chunk(4, 1)
            made = in_one_loop(_output, *a, c0, outputs=(dtype, dtype))
            if made is not None:
                return made[0], made[0].detach(), made[1], None, None
        y, h_n, c_n, c, gates = _states(*tensors, sizes=sizes, reverse=reverse)
        y_dtype = dtype if w_hr is None else x.dtype
        c_n = c_n.to(dtype, copy=c_n is c)  # c is kept, and c_n may be written to, as torch's
        return *rounded(y_dtype, y, h_n), c_n, c, gates

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.sizes, ctx.reverse = inputs
        x, h0, c0, w_ih, w_hh, _, _, w_hr = tensors
        y, *_, c, gates = output
        ctx.half, ctx.device = is_half(x), x.device.type
        ctx.dtypes, ctx.output_dtypes = dtypes(*tensors), dtypes(*output)
        ctx.set_materialize_grads(False)
        if ctx.half:
            ctx.save_for_backward(*tensors, None, None, None)
        else:
            need_x, need_h0, _, need_w_ih, need_w_hh, *_ = ctx.needs_input_grad
            ctx.save_for_backward(
                x if need_w_ih else None,
                h0 if need_w_hh else None,
                c0,
                w_ih if need_x else None,
                w_hh if need_h0 or len(ctx.sizes) > 1 else None,
                *(None, None, w_hr),
                y if need_w_hh and len(ctx.sizes) > 1 else None,
                *(c, gates),
            )
        ctx.save_for_forward(*tensors, y, c, gates)

    @staticmethod
    def backward(
        ctx: Context,
        grad_y: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_c: Tensor | None,
        grad_gates: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        grads = (grad_y, grad_h_n, grad_c_n, grad_c, grad_gates)
        with without_autocast(ctx.device):
            found, saved = None, ctx.saved_tensors  # once: a checkpoint gives them no more
            if ctx.half:
                x, h0, _, w_ih, w_hh, *_, w_hr, _, _, _ = saved
                if w_hr is None and in_halves((x, h0, w_ih, w_hh), *grads):
                    if grad_c is None is grad_gates:
                        found = _at_once(ctx, saved, *grads[:3])
                    found = found or _gradients(ctx, saved, *grads, halves=True)
            if found is None:
                found = _gradients(ctx, saved, *grads, halves=False)
            assert found is not None
            return *cast(found, ctx.dtypes), None, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_h0: Tensor | None,
        tangent_c0: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sizes, reverse = ctx.sizes, ctx.reverse
        x, h0, c0, w_ih, w_hh, w_hr, y, c, gates = _saved(ctx, ctx.saved_tensors)
        tangent_x, t_h, t_c, *of_weights, tangent_w_hr = wide(
            tangent_x, tangent_h0, tangent_c0, *others[:5]
        )
        a_x, a_h = affine_tangents(
            x, before(h0, y, sizes, reverse), w_ih, (tangent_x, *of_weights), gates
        )
        tanh_c = torch.tanh(c)
        m = gates.chunk(4, 1)[3] * tanh_c
        k_c, k, _, _ = _slopes(before(c0, c, sizes, reverse), tanh_c, gates)
        t_h = torch.zeros_like(h0) if t_h is None else t_h
        t_c = torch.zeros_like(c0) if t_c is None else t_c
        of_y, of_c, of_a = [], [], []
        for a, m_t, k_t, k_c_t, gates_t in zip(
            *(walk(rows, sizes, reverse) for rows in (a_x + a_h, m, k, k_c, gates)), strict=True
        ):
            n = a.shape[0]
            t_a = a + first(t_h, n) @ w_hh.mT
            f = gates_t.chunk(4, 1)[1]
            t_i, t_f, t_g, t_o = (k_t * t_a).chunk(4, 1)
            of_c.append(f * first(t_c, n) + t_i + t_f + t_g)
            t_m = k_c_t * of_c[-1] + t_o  # (6)
            if w_hr is not None:
                t_m = t_m @ w_hr.mT
            if tangent_w_hr is not None:
                t_m = t_m + m_t @ tangent_w_hr.mT
            of_y.append(t_m)
            of_a.append(t_a)
            t_h, t_c = advance(t_h, t_m), advance(t_c, of_c[-1])
        of_gates = _through_gates(join(of_a, reverse), gates)
        found = (join(of_y, reverse), t_h, t_c, join(of_c, reverse), of_gates)
        return cast(found, ctx.output_dtypes)


def _gradients(
    ctx: Context, saved: Saved, grad_y: Tensor | None, *gradients: Tensor | None, halves: bool
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of what came in, by products of ``halves`` where that is said and all is finite."""
    sizes, reverse, back = ctx.sizes, ctx.reverse, not ctx.reverse
    need_x, need_h0, need_c0, *need_weights, need_w_hr = ctx.needs_input_grad[:8]
    x, h0, c0, w_ih, w_hh, w_hr, *made = _saved(ctx, saved, halves)
    w_ih, w_hh, w_hr = factors(w_ih, w_hh, w_hr)
    c0, y, c, gates = conjugate(*wide(c0), *made)
    grad_y, g_h, g_c, grad_c, grad_gates = wide(grad_y, *gradients)
    one = halves and len(sizes) == 1  # its states are in halves, too
    g_h = start(g_h, grad_y, c0 if w_hr is None else w_hr.mT, sizes)
    g_c = start(g_c, c, c0, sizes)  # each step's m brings some
    states = (before(c0, c, sizes, reverse), c, gates)
    e = None if grad_gates is None else _through_gates(grad_gates, gates)  # (5)
    given = (grad_y, g_h, g_c, grad_c, e)
    weights, found = (w_hh if one else wide(w_hh)[0], w_hr), None
    if e is None and not one and looped(c0.shape[1], sizes, gates, *given):
        found = _walk_in_loops(given, states, weights, sizes, back)
    d_h, hidden, g_h, g_c = found or _walk(given, states, weights, sizes, back, one)
    d_x = parts(d_h[0]) if halves and not one else d_h
    h = before(h0, y, sizes, reverse) if need_weights[1] else None
    grad_x, *grads = affine_gradients((need_x, *need_weights), d_x, d_h, x, h, w_ih)  # (3)
    grad_w_hr = None
    if need_w_hr:
        grad_w_hr = join(hidden, back).mT @ (gates.chunk(4, 1)[3] * torch.tanh(c))  # (4)
    found = (grad_x, g_h if need_h0 else None, *grads, grad_w_hr)
    if halves and not sound(found):
        return None
    return *found[:2], g_c if need_c0 else None, *found[2:]


def _walk(
    given: Sequence[Tensor | None],
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    sizes: Sizes,
    back: bool,
    halves: bool,
) -> tuple[Parts, list[Tensor], Any, Any]:
    """Walk back: return the d of all steps, the g^h of each, and what arrives at h_0 and c_0."""
    (grad_y, g_h, g_c, grad_c, e), (w_hh, w_hr) = given, weights
    c_before, c, gates = states
    k_c, k, k_ifg, k_o = _slopes(c_before, torch.tanh(c), gates)
    write, size = writable(k, *given), c.shape[1]
    steps, hidden = [], []
    rows = (k, k_ifg, k_o, k_c, gates.chunk(4, 1)[1], grad_y, grad_c, e)
    for k_t, ifg_t, o_t, c_t, f_t, grad, grad_c_t, e_t in zip(
        *(walk(of_all, sizes, back) for of_all in rows), strict=True
    ):
        n = k_t.shape[0]
        of_h = arrived(g_h, grad, n)
        of_m = of_h if w_hr is None else of_h @ w_hr
        of_c = add(arrived(g_c, None, n), grad_c_t)
        of_c = of_m * c_t if of_c is None else torch.addcmul(of_c, of_m, c_t)
        if write:  # into k, of which these are views
            ifg_t.mul_(of_c.unsqueeze(1))
            o_t.mul_(of_m)
            d = k_t
        else:
            of_ifg = (ifg_t * of_c.unsqueeze(1)).reshape(n, 3 * size)
            d = torch.cat((of_ifg, o_t * of_m), 1)
        d = d if e_t is None else d + e_t
        d = parts(d) if halves else (d,)
        steps.append(d)
        hidden.append(of_h)
        g_c = advance(g_c, of_c * f_t)
        if w_hh is not None:
            g_h = advance(g_h, product(d, w_hh))  # (2)
    if write and e is None and not halves:
        return (k,), hidden, g_h, g_c
    return tuple(join([*some], back) for some in zip(*steps, strict=True)), hidden, g_h, g_c


def _walk_in_loops(
    given: Sequence[Tensor | None],
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    sizes: Sizes,
    back: bool,
) -> tuple[Parts, list[Tensor], Any, Any] | None:
    """Walk back with all of a step but its products in one loop; ``None`` where that has not been compiled."""
    (grad_y, g_h, g_c, grad_c, _), (w_hh, w_hr) = given, weights
    c_before, c, gates = states
    d, hidden, nothing = torch.empty_like(gates), [], c.new_zeros(())
    for gates_t, before_t, c_t, grad, grad_c_t, d_t in zip(
        *(walk(of_all, sizes, back) for of_all in (gates, c_before, c, grad_y, grad_c, d)),
        strict=True,
    ):
        n = c_t.shape[0]
        of_h = arrived(g_h, grad, n)
        of_m = of_h if w_hr is None else of_h @ w_hr
        of_c = add(arrived(g_c, None, n), grad_c_t)
        made = in_one_loop(
            _step_back,
            of_m,
            nothing if of_c is None else of_c,
            *gates_t.chunk(4, 1),
            *(before_t, c_t),
            outputs=(*d_t.chunk(4, 1), None),
        )
        if made is None:
            return None
        hidden.append(of_h)
        g_c = advance(g_c, made[-1])
        if w_hh is not None:
            g_h = advance(g_h, d_t @ w_hh)  # (2)
    return (d,), hidden, g_h, g_c


def _step_back(
    v: Tensor,
    v_c: Tensor,
    i: Tensor,
    f: Tensor,
    g: Tensor,
    o: Tensor,
    c_before: Tensor,
    c: Tensor,
) -> tuple[Tensor, ...]:
    """Return the four parts of d_t, and what of g^c goes on to the step before, from g^m and what came of c."""
    t = torch.tanh(c)
    of_c = v_c + v * (o * (1 - t * t))
    k_i, k_f, k_g = g * (i * (1 - i)), c_before * (f * (1 - f)), i * (1 - g * g)  # (1)
    return of_c * k_i, of_c * k_f, of_c * k_g, v * (t * (o * (1 - o))), of_c * f  # (2)


def _step_again(
    v: Tensor, v_c: Tensor, i: Tensor, f: Tensor, g: Tensor, o: Tensor, c_before: Tensor
) -> tuple[Tensor, ...]:
    """Return :func:`_step_back` from the gates' arguments."""
    i, f, g, o, c, _ = _formula(i, f, g, o, c_before)
    return _step_back(v, v_c, i, f, g, o, c_before, c)


def _at_once(
    ctx: Context, saved: Saved, grad_y: Tensor | None, g_h: Tensor | None, g_c: Tensor | None
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of the only step from one loop, no state made on the way; ``None`` where it can't be."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, *_ = saved
    if not half_of_one_step(x, h0, ctx.sizes):
        return None
    v = incoming(grad_y, g_h)
    if v is None:
        return None
    a = only_step(x, h0, w_ih, w_hh, b_ih, b_hh)
    d = empty_halves(*a.shape)
    made = in_one_loop(
        partial(halved, _step_again),
        *(v, a.new_zeros(()) if g_c is None else g_c, *a.chunk(4, 1), c0),
        outputs=(*(part for whole in d for part in whole.chunk(4, 1)), torch.float32),
    )
    if made is None:
        return None
    need_x, need_h0, need_c0, *need_weights = ctx.needs_input_grad[:7]
    w_ih, w_hh = factors(w_ih, w_hh)
    grad_h0 = product(d, w_hh) if need_h0 else None
    grad_x, *grads = affine_gradients((need_x, *need_weights), d, d, x, h0, w_ih)
    if not sound((grad_x, grad_h0, *grads)):
        return None
    return grad_x, grad_h0, made[-1] if need_c0 else None, *grads, None


def _states(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    *,
    sizes: Sizes,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Return y, h_n, c_n, the states c and the gates (i, f, g, o) side by side, of every step."""
    a = affine(x, w_ih, add(*wide(b_ih, b_hh)))
    c, w_hr = wide(c0, w_hr)
    (h, w), write = starting(h0, w_hh, sizes), writable(a, c)
    kept = torch.empty_like(a) if looped(c.shape[1], sizes, a, c) else a
    outputs, states, gates = [], [], []
    for a_t, kept_t in zip(*(walk(rows, sizes, reverse) for rows in (a, kept)), strict=True):
        n = a_t.shape[0]
        held = first(h, n)
        total = product((held,), w, a_t) if write else a_t + held @ w
        gates_t, state, m = _step(total, first(c, n), kept_t if write else None)
        gates.append(gates_t)
        states.append(state)
        outputs.append(m if w_hr is None else m @ w_hr.mT)
        h, c = advance(h, outputs[-1]), advance(c, state)
    kept = kept if write else join(gates, reverse)
    return join(outputs, reverse), h, c, join(states, reverse), kept


def _step(a: Tensor, c: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gates, which are written to ``kept`` where that is given, the state, and m."""
    if kept is not None and kept is not a:
        to = kept.chunk(4, 1)
        made = in_one_loop(_formula, *a.chunk(4, 1), c, outputs=(*to, None, None))
        if made is not None:
            return kept, *made[4:]
    size = c.shape[1]
    a_if, a_g, a_o = a.split((2 * size, size, size), 1)
    if kept is None:
        i_f, g, o = torch.sigmoid(a_if), torch.tanh(a_g), torch.sigmoid(a_o)
        gates = torch.cat((i_f, g, o), 1)
    else:  # into a, whose parts are i and f, g, o
        i_f, g, o = a_if.sigmoid_(), a_g.tanh_(), a_o.sigmoid_()
        gates = a if kept is a else kept.copy_(a)
    i, f = i_f.chunk(2, 1)
    state = torch.addcmul(f * c, i, g)
    return gates, state, o * torch.tanh(state)


def _output(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    *_, state, m = _formula(i, f, g, o, c)
    return m, state


def _formula(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    state = f * c + i * g
    return i, f, g, o, state, o * torch.tanh(state)


def _slopes(
    c_before: Tensor, tanh_c: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of all steps at once k^c, (R, H), and (k^i, k^f, k^g, k^o), (R, 4H), and of the latter two views.

    The views are (k^i, k^f, k^g), (R, 3, H), which g^c is to scale, and k^o, (R, H), which g^m is.
    """
    i, f, g, o = gates.chunk(4, 1)
    k = torch.empty_like(gates) if writable(c_before, gates) else None
    out = (None,) * 4 if k is None else k.chunk(4, 1)
    parts = (
        through_sigmoid(g, i, out[0]),
        through_sigmoid(c_before, f, out[1]),
        through_tanh(i, g, out[2]),
        through_sigmoid(tanh_c, o, out[3]),
    )  # (1)
    k = torch.cat(parts, 1) if k is None else k
    rows, size = tanh_c.shape
    k_ifg, k_o = k[:, : 3 * size].reshape(rows, 3, size), k[:, 3 * size :]
    return through_tanh(o, tanh_c), k, k_ifg, k_o


def _through_gates(v: Tensor, gates: Tensor) -> Tensor:
    """Return v times the derivatives of the gates by their arguments, (R, 4H)."""
    (v_i, v_f, v_g, v_o), (i, f, g, o) = v.chunk(4, 1), gates.chunk(4, 1)
    found = (
        through_sigmoid(v_i, i),
        through_sigmoid(v_f, f),
        through_tanh(v_g, g),
        through_sigmoid(v_o, o),
    )
    return torch.cat(found, 1)


def _saved(ctx: Context, saved: Saved, halves: bool = False) -> tuple[Any, ...]:
    """Return x, h_0, c_0, the weights, y, c and the gates: what half precision did not keep, made again.

    The others are then in float32, but where products are of ``halves``.
    """
    *tensors, y, c, gates = saved
    if ctx.half:
        tensors = tensors if halves else wide(*tensors)
        y, _, _, c, gates = _states(*tensors, sizes=ctx.sizes, reverse=ctx.reverse)
    x, h0, c0, w_ih, w_hh, _, _, w_hr = tensors
    return x, h0, c0, w_ih, w_hh, w_hr, y, c, gates


_lstm = entry(LSTMFunction)


def _layer(
    x: Tensor,
    states: tuple[Tensor, Tensor],
    weights: Sequence[Tensor | None],
    sizes: Sizes,
    reverse: bool,
    *,
    cast_c: bool = False,
) -> tuple[Tensor, ...]:
    """Run one layer in one direction; autocast casts all, the state c only on a GPU or where it is told to."""
    h0, c0 = states
    if autocasts(x.device.type):
        x, h0, *weights = in_autocast_dtype(x, h0, *weights)
        if cast_c or not x.is_cpu:
            (c0,) = in_autocast_dtype(c0)
        check_dtypes("LSTM", x, (h0, *weights))
    else:
        check_dtypes("LSTM", x, (h0, c0, *weights))
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    with without_autocast(x.device.type):
        w_hr = projection[0] if projection else None
        y, h_n, c_n, _, _ = _lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, reverse)
        return y, h_n, c_n


@public
def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One step of long short-term memory: :math:`c' = f c + i g`, :math:`h' = o \tanh(c')`.

    With :math:`i = \sigma(x W_{ii}^T + b_{ii} + h W_{hi}^T + b_{hi})`, f and o likewise, and g with tanh for σ.

    Args:
        input: x, ``(N, I)``, floating point or complex.
        hx: The pair (h, c), ``(N, H)`` each, of the dtype of ``input``.
        w_ih: ``(4H, I)``: the rows of i, f, g, o.
        w_hh: ``(4H, H)``, likewise.
        b_ih: ``(4H,)`` or ``None``.
        b_hh: ``(4H,)`` or ``None``.

    Returns:
        The pair (h', c'), ``(N, H)`` each.

    Raises:
        RuntimeError: Shapes or dtypes do not fit, or ``hx`` is no pair.
        TypeError: ``hx`` is a tensor.
        IndexError: ``input``, h or c has no dimension N.

    Example:
        >>> import torch
        >>> from torchbp.functional import lstm_cell
        >>> zero, one = torch.zeros(4, 1), torch.ones(1, 1)
        >>> lstm_cell(one, (one, one), w_ih=zero, w_hh=zero)
        (tensor([[0.2311]]), tensor([[0.5000]]))
    """
    if not isinstance(hx, (tuple, list)):
        raise TypeError(wrong("lstm_cell", "hx to be a pair", type(hx).__name__, "pass (h, c)"))
    if len(hx) != 2:
        raise RuntimeError(
            wrong("lstm_cell", "hx to be a pair", f"{len(hx)} tensors", "pass (h, c)")
        )
    weights = (w_ih, w_hh, b_ih, b_hh)
    check_cell("lstm_cell", 4, input, hx, weights)
    h, _, c = _layer(input, (hx[0], hx[1]), weights, (input.shape[0],), False)
    return h, c


class LSTM(nn.LSTM):
    """:func:`lstm_cell` over whole sequences, in layers and directions, with a projection where ``proj_size`` > 0.

    On a GPU every step is launched by itself, where torch's own layer runs cuDNN's kernel for all of them.
    """

    __module__ = "torchbp.nn"

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        # As in torch, whose own layer casts c under autocast; a projection or a cell is a composition, which does not.
        return layers(partial(_layer, cast_c=not self.proj_size), self, input, hx)


class LSTMCell(nn.LSTMCell):
    """Module form of :func:`lstm_cell`; the states are zeros by default."""

    __module__ = "torchbp.nn"

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        return cell(lstm_cell, self, input, hx, states=2)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield from layer_samples(make, LSTM)
    states = (make.normal(4, 4, 2), make.normal(4, 4, 5))
    ctor = Sample((3, 5, 2), {"proj_size": 2, "bidirectional": True})
    yield LSTM, ctor, Sample((make.normal(2, 4, 3), states), name="projection")
    states = (make.normal(4, 5), make.normal(4, 5))
    yield LSTMCell, Sample((3, 5)), Sample((make.normal(4, 3), states))
    yield LSTMCell, Sample((3, 5), {"bias": False}), Sample((make.normal(3),), name="one-sequence")


OP = Op(
    function=lstm_cell,
    modules=(LSTM, LSTMCell),
    reference=cell_rounded_once(torch.lstm_cell),
    samples=cell_samples(4, 2),
    module_samples=_module_samples,
    errors=cell_errors(4, 2),
    saved_bytes=cell_saved_bytes(5, reads_h=False),
    benchmark=cell_benchmark(4, 2),
)
