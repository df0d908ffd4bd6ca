r"""Gradient clip: y = x in forward; in backward the gradient is clipped, by value or by norm, where it passes.

Derivation (a rule, not a derivative: that of the identity would be 1):
    by value:  grad_x = min(max(grad_y, -c), c), element by element                            (1)
    by norm:   grad_x = grad_y · M / max(M, ‖grad_y‖_p)                                        (2)
    ‖·‖_p runs over the dimensions "dim", so that every index of the others is clipped for itself; None: over all.
    Forward mode stays the identity's: a tangent is no gradient, and is not clipped.

Saves:
    Nothing.

Edge values:
    ‖grad_y‖ ≤ M, 0 included: unchanged, bit for bit.   The norm is taken of grad_y over the power of two below its
    largest, so that 1e30 does not overflow into a gradient of 0.   ±∞ by value: ±c.   ±∞ by norm, and NaN: NaN for all
    that share the norm, so that a gradient that is broken stays visible.

Sources:
    Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2012, arXiv:1211.5063 (2).
"""

from collections.abc import Iterator
from math import inf, nan

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, fused, in_float32, public
from torchbp.ops._jagged import row_by_row
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["GradientClip", "GradientClipFunction", "gradient_clip"]

_NAME = "gradient_clip"
# A norm above this had no squares that underflowed; one below it, and other powers, are taken of scaled values.
_PLAIN = {1.0: 0.0, 2.0: 1e-15, inf: 0.0}
Dims = int | tuple[int, ...] | None


class GradientClipFunction(Function):
    """Identity whose gradient is clipped. Call it through :func:`gradient_clip`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, max_norm: float | None, clip_value: float | None, p: float, dim: Dims
    ) -> Tensor:  # x, y: (*)
        return x.view_as(x)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, float | None, float | None, float, Dims],
        output: Tensor,
    ) -> None:
        _, ctx.max_norm, ctx.clip_value, ctx.p, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.clip_value is not None:
            grad_x = grad_y.clamp(-ctx.clip_value, ctx.clip_value)  # (1)
        else:
            grad_x = in_float32(lambda g: _within(g, ctx.max_norm, ctx.p, ctx.dim), grad_y)
        return grad_x, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        return tangent_x.view_as(tangent_x)


def _within(g: Tensor, max_norm: float, p: float, dim: Dims) -> Tensor:
    if not g.numel():
        return g
    if p in _PLAIN and dim is None and g.is_cpu and fused(g):
        norm = _norm_of_all(g, p)
        if _PLAIN[p] < norm < inf:
            return g if norm <= max_norm else g * (max_norm / norm)  # (2)
    # not vector_norm(g, inf), which takes twenty times as long
    largest = g.detach().abs().amax(() if dim is None else dim, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    power = torch.exp2(
        largest.log2().floor()
    )  # dividing by it rounds nothing; a constant for derivatives
    norm = power * torch.linalg.vector_norm(g / power, p, dim, keepdim=True)
    # not max_norm / max(max_norm, norm), by the reciprocal in torch: it is not always 1 within the norm
    return g * torch.where(norm <= max_norm, 1, max_norm / norm)  # (2)


def _norm_of_all(g: Tensor, p: float) -> float:
    """Return the norm of all elements, a number: by rows, whose norms are put together in float64."""
    if p == inf:
        low, high = torch.aminmax(g)
        return max(-low.item(), high.item()) if not low.isnan() else nan
    rows = torch.linalg.vector_norm(g, p, dim=-1) if g.dim() else g.abs()
    return torch.linalg.vector_norm(rows, p, dtype=torch.float64).item()


_gradient_clip = entry(GradientClipFunction)


@public
@row_by_row()
def gradient_clip(
    input: Tensor,
    *,
    max_norm: float | None = None,
    clip_value: float | None = None,
    norm_type: float = 2.0,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    r"""Pass ``input`` on, and its gradient back, clipped: to norm :math:`M`, or elementwise to :math:`\pm c`.

    What is clipped is the gradient at this point of the graph, summed over all that uses the output, at every
    backward by itself; :func:`torch.nn.utils.clip_grad_norm_` clips what parameters have accumulated.

    Args:
        input: Any shape ``(*)``, floating point; complex too, by norm.
        max_norm: :math:`M > 0`, the largest norm that passes unchanged. Give this or ``clip_value``.
        clip_value: :math:`c > 0`, the largest absolute value of an element.
        norm_type: The :math:`p > 0` of the norm; ``inf`` for the largest absolute value.
        dim: Dimensions that a norm runs over: ``-1`` clips each row for itself, ``None`` the whole tensor at once.

    Returns:
        A view of ``input``.

    Raises:
        ValueError: Both of ``max_norm`` and ``clip_value``, or neither; one that is not positive.
        IndexError: ``input`` has no such ``dim``.
        TypeError: A complex ``input`` by value.

    Example:
        >>> import torch
        >>> from torchbp.functional import gradient_clip
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (gradient_clip(x, max_norm=1.0) @ torch.tensor([3.0, 4.0])).backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """
    _check(max_norm, clip_value, norm_type)
    if clip_value is not None and input.is_complex():
        message = wrong(_NAME, "a real input to clip by value", input.dtype, "clip by max_norm")
        raise TypeError(message)
    for d in (dim,) if isinstance(dim, int) else dim or ():
        if not -input.dim() <= d < max(1, input.dim()):
            rule = f"dim to be one of the {input.dim()} of {shape(input)}"
            raise IndexError(wrong(_NAME, rule, d, "count from 0, or back from -1"))
    return _gradient_clip(input, max_norm, clip_value, norm_type, dim)


def _check(max_norm: float | None, clip_value: float | None, norm_type: float) -> None:
    if (max_norm is None) == (clip_value is None):
        got = f"max_norm={max_norm}, clip_value={clip_value}"
        raise ValueError(wrong(_NAME, "one of max_norm and clip_value", got, "give the one"))
    for name, value in (
        ("max_norm", max_norm),
        ("clip_value", clip_value),
        ("norm_type", norm_type),
    ):
        if value is not None and not value > 0:
            advice = "gradient_scale(input, 0) stops a gradient" if name != "norm_type" else "try 2"
            raise ValueError(wrong(_NAME, f"{name} > 0", value, advice))


class GradientClip(nn.Module):
    """Module form of :func:`gradient_clip`; its arguments are checked at construction."""

    __module__ = "torchbp.nn"

    def __init__(
        self,
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
        norm_type: float = 2.0,
        dim: int | tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        _check(max_norm, clip_value, norm_type)
        self.max_norm = max_norm
        self.clip_value = clip_value
        self.norm_type = norm_type
        self.dim = dim

    def extra_repr(self) -> str:
        if self.clip_value is not None:
            return f"clip_value={self.clip_value}"
        return f"max_norm={self.max_norm}, norm_type={self.norm_type}, dim={self.dim}"

    def forward(self, input: Tensor) -> Tensor:
        return gradient_clip(
            input,
            max_norm=self.max_norm,
            clip_value=self.clip_value,
            norm_type=self.norm_type,
            dim=self.dim,
        )


def _rule(
    input: Tensor,
    *,
    max_norm: float | None = None,
    clip_value: float | None = None,
    norm_type: float = 2.0,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """The identity with a hook on its gradient, which is clipped as ``torch.nn.utils`` clips, without its 1e-6."""
    if clip_value is not None and input.is_complex():
        raise TypeError
    y = input.view_as(input)

    def clipped(g: Tensor) -> Tensor:
        if clip_value is not None:
            return torch.where(
                g > clip_value, clip_value, torch.where(g < -clip_value, -clip_value, g)
            )
        if not g.numel() or max_norm is None:
            return g
        norm = torch.linalg.vector_norm(g, norm_type, dim, keepdim=True)
        return torch.where(norm > max_norm, g * max_norm / norm, g)

    if y.requires_grad:
        y.register_hook(clipped)
    return y


_WAYS = {
    "rows": {"max_norm": 0.5, "dim": -1},
    "value": {"clip_value": 0.5},
    "norm-1": {"max_norm": 2.0, "norm_type": 1.0},
    "norm-inf": {"max_norm": 0.5, "norm_type": inf, "dim": (0, 1)},
    "large": {"max_norm": 1e3},
}


def _all_samples(make: Make) -> Iterator[Sample]:
    for sample in _samples.elementwise(make):
        yield Sample(sample.args, {"max_norm": 0.5}, sample.name)
    for name, options in _WAYS.items():
        yield Sample((make.normal(3, 4),), options, name)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    for name, options in _WAYS.items():
        yield GradientClip, Sample(kwargs=options), Sample((make.normal(3, 4),), name=name)


def _benchmark(make: Make, n: int) -> Sample:
    return Sample(_samples.square(make, n).args, {"max_norm": 1.0})


OP = Op(
    function=gradient_clip,
    modules=(GradientClip,),
    reference=_rule,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=lambda *_, **__: 0,
    benchmark=_benchmark,
    estimator=True,
)
