r"""Gated units: y = g(a) · b, where a and b are the two halves of x along a dimension. SwiGLU, GeGLU, ReGLU are such.

Derivation:
    grad_a    = grad_y · conj(b · g'(a))                                                       (1)
    grad_b    = grad_y · conj(g(a))                                                            (2)
    tangent_y = b · g'(a) · tangent_a + g(a) · tangent_b                                       (3)

x is all that is kept; g(a) is made again in backward, which is cheaper than keeping it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, fused, is_half, kernel
from torchbp.ops._invalid import FEW, sound
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._pieces import in_row_pieces
from torchbp.ops.activations import gelu, silu
from torchbp.ops.activations._infinities import (
    FAR,
    bounded,
    known_finite,
    limited,
    mended,
)
from torchbp.ops.kernels import MANY, in_one_loop, looped, many

__all__ = ["gated", "halves", "halves_in_one_loop"]

_silu_into = kernel("silu", "out")
_silu_backward_into = kernel("silu_backward", "grad_input")
_gelu_backward = kernel("gelu_backward")
_gelu_into = kernel("gelu", "out")
_gelu_backward_into = kernel("gelu_backward", "grad_input")
_threshold_backward = kernel("threshold_backward")
_threshold_backward_into = kernel("threshold_backward", "grad_input")


@dataclass(frozen=True)
class Gate:
    """A gate: g(a), as torch has it and by formula; v · g'(a), by formulas; both by torch's kernels, which may write.

    The second formula is the one for a single kernel, ``in_a_loop`` the one for both gradients; ``sound`` tells whether
    torch's kernels made no NaN.
    """

    value: Callable[[Tensor], Tensor]
    formula: Callable[[Tensor], Tensor]
    times_derivative: Callable[[Tensor, Tensor], Tensor]
    at_once: Callable[[Tensor, Tensor], Tensor]
    value_kernel: Callable[[Tensor], Tensor]
    kernel: Callable[[Tensor, Tensor], Tensor]
    in_a_loop: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    value_into: Callable[[Tensor, Tensor], Tensor]
    times_derivative_into: Callable[[Tensor, Tensor, Tensor], Tensor]
    sound: Callable[[Tensor], bool] = sound


def _gelu_gate(
    approximate: str,
    formula: Callable[[Tensor], Tensor],
    times_derivative: Callable[[Tensor, Tensor], Tensor],
    factors: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Gate:
    exact = approximate == "none"  # the default: a word less to pass
    value = _nn.gelu if exact else partial(_nn.gelu, approximate=approximate)
    return Gate(
        value,
        formula,
        times_derivative,
        times_derivative,
        value,
        _gelu_backward if exact else partial(_gelu_backward, approximate=approximate),
        partial(_of_both, factors),
        lambda a, out: _gelu_into(a, approximate=approximate, out=out),
        lambda v, a, out: _gelu_backward_into(v, a, approximate=approximate, grad_input=out),
    )


def _of_both(
    factors: Callable[[Tensor], tuple[Tensor, Tensor]], v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    share, slope = factors(bounded(a))  # g(a) = a · share, g'(a)
    return v * b * slope, v * (a.clamp(min=-FAR) * share)  # (1), (2)


def _of_both_of_silu(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    below = a.clamp(min=-FAR)
    q = 1 + torch.exp(-below)  # a quotient by it rounds once less than a product with σ(a)
    return v * b * silu._slope(bounded(a), 1 / q), v * (below / q)  # (1), (2)


def _of_both_of_relu(v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _times_step(v * b, a), v * a.clamp(min=0)  # (1), (2)


def _times_step(v: Tensor, a: Tensor) -> Tensor:
    return v.masked_fill(a <= 0, 0)


def _times(formula: Callable[[Tensor], Tensor], a: Tensor, v: Tensor) -> Tensor:
    return formula(a.clamp(min=-FAR)) * v  # (2), and y


def _by_a(
    times_derivative: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, v: Tensor
) -> Tensor:
    return times_derivative(v * b, bounded(a))  # (1)


_GATES = {
    "silu": Gate(
        # torch's has no complex gradient
        lambda a: a * torch.sigmoid(a) if a.is_complex() else _nn.silu(a),
        silu._value,
        silu._times_derivative,
        silu._by_one_sigmoid,
        _nn.silu,
        kernel("silu_backward"),
        _of_both_of_silu,
        lambda a, out: _silu_into(a, out=out),
        lambda v, a, out: _silu_backward_into(v, a, grad_input=out),
    ),
    "none": _gelu_gate("none", gelu._value_of_erf, gelu._of_erf, gelu._erf_in_a_loop),
    "tanh": _gelu_gate("tanh", gelu._value_of_tanh, gelu._of_tanh, gelu._tanh_in_a_loop),
    "relu": Gate(
        torch.relu,
        lambda a: a.clamp(min=0),
        _times_step,
        _times_step,
        torch.relu,
        lambda v, a: _threshold_backward(v, a, 0.0),
        _of_both_of_relu,
        lambda a, out: torch.clamp_min(a, 0, out=out),
        lambda v, a, out: _threshold_backward_into(v, a, 0.0, grad_input=out),
        lambda _: True,
    ),
}


class GatedFunction(Function):
    """A gated unit with a hand-written gradient. Call it through :func:`gated`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, gate: str, finite: bool | None) -> Tensor:
        if many(x, 2 * MANY):
            y = in_one_loop(partial(_times, _GATES[gate].formula), *x.unsafe_chunk(2, dim))
            if y is not None:
                return y
        if finite is None and not is_half(x):  # nothing traces or batches it
            a, b = x.unsafe_chunk(2, dim)
            g = _GATES[gate].value_kernel(a)
            return (g if _GATES[gate].sound(g) else mended(g, a)).mul_(b)
        if x.is_cuda:
            y = in_one_kernel(partial(_times, _GATES[gate].formula), *x.chunk(2, dim))
            if y is not None:
                return y

        def formula(x: Tensor) -> Tensor:  # (*, 2D, *) -> (*, D, *)
            a, b = x.chunk(2, dim)
            g = limited(_GATES[gate].value(a), a, finite)
            return g.mul_(b) if fused(g) else g * b

        return in_row_pieces(formula, dim, x)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, int, str, bool | None], output: Tensor
    ) -> None:
        x, ctx.dim, ctx.gate, ctx.finite = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        dim, gate, finite = ctx.dim, _GATES[ctx.gate], ctx.finite
        if finite is None and x.numel() <= FEW and fused(grad_y):
            a, b = x.unsafe_chunk(2, dim)
            grad_a = gate.kernel(grad_y * b, a)  # (1)
            grad_x = torch.cat((grad_a, gate.value_kernel(a).mul_(grad_y)), dim)  # (2)
            if gate.sound(grad_x):
                return grad_x, None, None, None
        if many(x, 2 * MANY):
            grad_x = halves_in_one_loop(gate.in_a_loop, grad_y, x, dim)
            if grad_x is not None:
                return grad_x, None, None, None
        if x.is_cuda:
            a, b = x.chunk(2, dim)
            of_a = in_one_kernel(partial(_by_a, gate.at_once), a, b, grad_y)
            of_b = in_one_kernel(partial(_times, gate.formula), a, grad_y)
            if of_a is not None and of_b is not None:
                return torch.cat([of_a, of_b], dim), None, None, None

        def formula(v: Tensor, x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim)
            if finite is not False and not x.is_complex() and fused(v, x):
                grad_x = torch.empty_like(x)
                grad_a, grad_b = grad_x.chunk(2, dim)
                gate.times_derivative_into(torch.mul(v, b, out=grad_a), a, grad_a)  # (1)
                gate.value_into(a, grad_b).mul_(v)  # (2)
                if finite or gate.sound(grad_x):
                    return grad_x
            grad_a = gate.times_derivative(v * b.conj(), bounded(a))  # (1)
            return torch.cat([grad_a, v * mended(gate.value(a), a).conj()], dim)  # (2)

        return in_row_pieces(formula, dim, grad_y, x), None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        dim, gate = ctx.dim, _GATES[ctx.gate]

        def formula(t: Tensor, x: Tensor) -> Tensor:
            (a, b), (tangent_a, tangent_b) = x.chunk(2, dim), t.chunk(2, dim)
            by_a = gate.times_derivative(b * tangent_a, bounded(a).conj())
            return by_a + mended(gate.value(a), a) * tangent_b  # (3)

        return in_row_pieces(formula, dim, tangent_x, x)


def halves_in_one_loop(
    formula: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    v: Tensor,
    x: Tensor,
    dim: int,
) -> Tensor | None:
    """Return what ``formula(v, a, b)`` makes of the halves of ``x``, side by side as these are, or ``None``."""
    a, b = x.chunk(2, dim)
    if not looped(v, a, b):
        return None
    made = torch.empty_like(x)
    written = in_one_loop(formula, v, a, b, outputs=made.chunk(2, dim))
    return None if written is None else made


_gated = entry(GatedFunction, again=GatedFunction.forward)


def gated(op: str, x: Tensor, dim: int, gate: str) -> Tensor:
    """Return g(a) · b for the public function ``op``."""
    check_halves(op, x, dim)
    return _gated(x, dim, gate, not x.is_complex() and known_finite(x, loop=True))


def check_halves(op: str, x: Tensor, dim: int) -> None:
    """Check that ``x`` has two halves along ``dim``, as ``torch.nn.functional.glu`` does."""
    if x.dim() == 0 or x.size(dim) % 2:
        rule = f"an even size of dimension {dim}"
        raise RuntimeError(wrong(op, rule, shape(x), "it holds the gate, then the values"))


def halves(op: str, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the two halves of ``x`` along ``dim``; an odd size raises."""
    check_halves(op, x, dim)
    a, b = x.chunk(2, dim)
    return a, b
