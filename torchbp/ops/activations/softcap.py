r"""Softcap: y = c · tanh(x / c), with the cap c.

Derivation:
    dy/dx  = 1 - tanh²(x/c) = 1 - (y/c)²           from the output                              (1)
           = 4 · σ(2x/c) · σ(-2x/c)                from the input                               (1')
    grad_x = grad_y · conj(dy/dx)                                                                   (2)

Saves:
    float32 and wider: y (4 bytes per float32 element).   bfloat16, float16: x (2 bytes), since 1 - (y/c)² is 0
    from |x| = 3.47 c on in bfloat16, where dy/dx is still 3.9e-3.

Edge values:
    x → ±∞: y → ±c, dy/dx → 0.   NaN gives NaN.

Sources:
    Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024, arXiv:2408.00118;
    Bello et al., "Neural Combinatorial Optimization with Reinforcement Learning", 2016, arXiv:1611.09940.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, fused, is_half, public
from torchbp.ops._jagged import row_by_row
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations._tanh import tanh
from torchbp.ops.kernels import in_one_loop

__all__ = ["Softcap", "SoftcapFunction", "softcap"]


class SoftcapFunction(Function):
    """Softcap with a hand-written derivative. Call it through :func:`softcap`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cap: float) -> Tensor:  # x, y: (*)
        return _value(x, cap)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.cap = inputs
        kept = x if is_half(x) else output
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        grad_x = in_one_loop(_times(ctx.cap, is_half(kept)), grad_y, kept)
        return _times_derivative(grad_y, kept, ctx.cap) if grad_x is None else grad_x, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, _: None) -> Tensor:
        (kept,) = ctx.saved_tensors
        return _times_derivative(tangent_x, kept.conj(), ctx.cap)


def _value(input: Tensor, cap: float) -> Tensor:
    def formula(x: Tensor) -> Tensor:
        y = tanh(x / cap)
        return y.mul_(cap) if fused(y) else y * cap

    return in_pieces(formula, input)


def _times(cap: float, half: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def of_x(v: Tensor, x: Tensor) -> Tensor:
        e = torch.exp(-(2 / cap * x).abs())
        d = 1 + e
        return v * (4 * e / (d * d))  # (1'), which is even in x

    def of_y(v: Tensor, y: Tensor) -> Tensor:
        t = y * (1 / cap)
        return v - v * (t * t)  # (1), rounded once where t is small

    return of_x if half else of_y


def _times_derivative(v: Tensor, kept: Tensor, cap: float) -> Tensor:
    if is_half(kept):
        return in_pieces(
            lambda v, x: v * (4 * torch.sigmoid(2 / cap * x) * torch.sigmoid(-2 / cap * x)), v, kept
        )  # (1')
    t = kept / cap
    if fused(v, t) and not t.is_complex():
        t.mul_(t)
        return torch.addcmul(v, v, t, value=-1, out=t)
    return v * (1 - t * t).conj()  # (1)


_softcap = entry(SoftcapFunction, again=SoftcapFunction.forward)


@public
@row_by_row()
def softcap(input: Tensor, cap: float) -> Tensor:
    r"""Soft cap of logits, elementwise: :math:`y = c \tanh(x / c)`.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        cap: The bound :math:`c > 0` of :math:`|y|`.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor.
        ValueError: ``cap`` is not positive.

    Example:
        >>> import torch
        >>> from torchbp.functional import softcap
        >>> softcap(torch.tensor([-100.0, 1.0, 50.0]), 30.0)
        tensor([-29.9237,   0.9996,  27.9333])
    """
    if not cap > 0:
        raise ValueError(wrong("softcap", "cap > 0", cap, "pass the bound of the values"))
    return _softcap(input, cap)


class Softcap(nn.Module):
    """Module form of :func:`softcap`."""

    __module__ = "torchbp.nn"

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def extra_repr(self) -> str:
        return f"cap={self.cap}"

    def forward(self, input: Tensor) -> Tensor:
        return softcap(input, self.cap)


def _benchmark(make: Make, n: int) -> Sample:
    return Sample((*_samples.square(make, n).args, 30.0))


def _all_samples(make: Make) -> Iterator[Sample]:
    for sample in _samples.elementwise(make):
        yield Sample((*sample.args, 2.0), name=sample.name)
    yield Sample((make.normal(3, 4), 30.0), name="wide")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Softcap, Sample((2.0,)), Sample((make.normal(3, 4),))


def _reference(input: Tensor, cap: float) -> Tensor:
    return in_pieces(lambda x: torch.tanh(x / cap) * cap, input)


OP = Op(
    function=softcap,
    modules=(Softcap,),
    reference=_reference,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_benchmark,
    elementwise=False,
)
