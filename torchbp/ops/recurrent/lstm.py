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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.utils.rnn import PackedSequence

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, in_autocast_dtype, is_half, public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.recurrent._layers import cell, check_cell, check_dtypes, layers
from torchbp.ops.recurrent._recurrence import (
    Sizes,
    add,
    advance,
    affine_gradients,
    affine_tangents,
    before,
    cast,
    conjugate,
    dtypes,
    factors,
    first,
    join,
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
    ) -> tuple[Tensor, ...]:  # y (R, H or P), h_n (N, H or P), c_n (N, H), c (R, H), gates (R, 4H)
        tensors = wide(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
        y, h_n, c_n, c, gates = _states(*tensors, sizes=sizes, reverse=reverse)
        dtype = torch.promote_types(x.dtype, c0.dtype)  # under autocast the state c keeps its own
        y_dtype = dtype if w_hr is None else x.dtype
        return y.to(y_dtype), h_n.to(y_dtype), c_n.to(dtype), c, gates

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
        sizes, reverse = ctx.sizes, ctx.reverse
        need_x, need_h0, need_c0, *need_weights, need_w_hr = ctx.needs_input_grad[:8]
        with without_autocast(ctx.device):
            x, h0, c0, w_ih, w_hh, w_hr, *made = _saved(ctx)
            x, h0, w_ih, w_hh, w_hr = factors(x, h0, w_ih, w_hh, w_hr)
            c0, y, c, gates = conjugate(c0, *made)
            grad_y, g_h, g_c = wide(grad_y, grad_h_n, grad_c_n)
            n, size = c0.shape
            g_c = c0.new_zeros(n, size) if g_c is None else g_c
            if g_h is None:
                g_h = c0.new_zeros(n, size if w_hr is None else w_hr.shape[0])
            tanh_c = torch.tanh(c)
            c_before = before(c0, c, sizes, reverse)
            k_c, k, k_ifg, k_o = _slopes(c_before, tanh_c, gates)
            e = None if grad_gates is None else _through_gates(grad_gates, gates)  # (5)
            _, f, _, o = gates.chunk(4, 1)
            back = not reverse
            write = writable(k, g_h, g_c, grad_y, grad_c, e)
            parts = (k, k_ifg, k_o, k_c, f, grad_y, grad_c, e)
            steps, hidden = [], []
            for k_t, ifg_t, o_t, c_t, f_t, grad, grad_c_t, e_t in zip(
                *(walk(rows, sizes, back) for rows in parts), strict=True
            ):
                n = k_t.shape[0]
                of_h = first(g_h, n)
                of_h = of_h if grad is None else of_h + grad
                of_m = of_h if w_hr is None else of_h @ w_hr
                of_c = torch.addcmul(first(g_c, n), of_m, c_t)
                of_c = of_c if grad_c_t is None else of_c + grad_c_t
                if write:  # into k, of which these are views
                    ifg_t.mul_(of_c.unsqueeze(1))
                    o_t.mul_(of_m)
                    d = k_t
                else:
                    of_ifg = (ifg_t * of_c.unsqueeze(1)).reshape(n, 3 * size)
                    d = torch.cat((of_ifg, o_t * of_m), 1)
                d = d if e_t is None else d + e_t
                steps.append(d)
                hidden.append(of_h)
                g_c = advance(g_c, of_c * f_t)
                if w_hh is not None:
                    g_h = advance(g_h, d @ w_hh)  # (2)
            d = k if write and e is None else join(steps, back)
            h = before(h0, y, sizes, reverse) if need_weights[1] else None
            grad_x, *grads = affine_gradients((need_x, *need_weights), d, d, x, h, w_ih)  # (3)
            grad_w_hr = join(hidden, back).mT @ (o * tanh_c) if need_w_hr else None  # (4)
            states = (g_h if need_h0 else None, g_c if need_c0 else None)
            return *cast((grad_x, *states, *grads, grad_w_hr), ctx.dtypes), None, None

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_h0: Tensor | None,
        tangent_c0: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        sizes, reverse = ctx.sizes, ctx.reverse
        x, h0, c0, w_ih, w_hh, w_hr, y, c, gates = _saved(ctx)
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
    a = F.linear(x, w_ih, add(b_ih, b_hh))
    size, write = c0.shape[1], writable(a, h0, c0)
    widths = (2 * size, size, size)
    a_parts = a.split(widths, 1)
    h, c, w, outputs, states, gates = h0, c0, w_hh.mT, [], [], []
    for a_t, if_t, g_t, o_t in zip(
        *(walk(rows, sizes, reverse) for rows in (a, *a_parts)), strict=True
    ):
        n = a_t.shape[0]
        if write:  # into a, whose parts are i and f, g, o
            a_t.addmm_(first(h, n), w)
            i_f, g, o = if_t.sigmoid_(), g_t.tanh_(), o_t.sigmoid_()
        else:
            a_if, a_g, a_o = (a_t + first(h, n) @ w).split(widths, 1)
            i_f, g, o = torch.sigmoid(a_if), torch.tanh(a_g), torch.sigmoid(a_o)
            gates.append(torch.cat((i_f, g, o), 1))
        i, f = i_f.chunk(2, 1)
        states.append(torch.addcmul(f * first(c, n), i, g))
        m = o * torch.tanh(states[-1])
        outputs.append(m if w_hr is None else m @ w_hr.mT)
        h, c = advance(h, outputs[-1]), advance(c, states[-1])
    kept = a if write else join(gates, reverse)
    return join(outputs, reverse), h, c, join(states, reverse), kept


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


def _saved(ctx: Context) -> tuple[Any, ...]:
    """Return x, h_0, c_0, the weights, y, c and the gates: what half precision did not keep, made again."""
    *tensors, y, c, gates = ctx.saved_tensors
    if ctx.half:
        tensors = wide(*tensors)
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
