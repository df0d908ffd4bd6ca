r"""Surrogate spike: y = 1 where x > 0, else 0; in backward a smooth pulse h(x) stands for the derivative, which is 0.

Derivation (a rule, not a derivative), with z = k · x and the sharpness k:
    "fast_sigmoid":  h = k / (1 + |z|)²                                                        (1)
    "arctan":        h = k / (1 + (π z)²)                                                      (2)
    "triangle":      h = k · max(1 - |z|, 0)                                                   (3)
    grad_x = grad_y · h(x)                                                                     (4)

Saves:
    x, in its own dtype: 4 bytes per float32 element.

Edge values:
    x = 0: no spike, and h = k, its peak.   x → ±∞: h → 0.   NaN: no spike; the gradient is NaN.

Sources:
    Neftci, Mostafa, Zenke, "Surrogate Gradient Learning in Spiking Neural Networks", 2019, arXiv:1901.09948;
    Zenke, Ganguli, "SuperSpike", 2018, doi:10.1162/neco_a_01086 (fast sigmoid).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, public
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample

__all__ = ["SurrogateSpike", "SurrogateSpikeFunction", "surrogate_spike"]


class SurrogateSpikeFunction(Function):
    """Step function with a pulse for its derivative. Call it through :func:`surrogate_spike`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: str, k: float) -> Tensor:  # x, y: (*)
        return (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, str, float], output: Tensor) -> None:
        x, ctx.surrogate, ctx.k = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _times_pulse(grad_y, x, ctx.surrogate, ctx.k), None, None  # (4)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return _times_pulse(tangent_x, x, ctx.surrogate, ctx.k)


_PULSES = {
    "fast_sigmoid": lambda z: 1 / ((1 + z.abs()) * (1 + z.abs())),  # (1)
    "arctan": lambda z: 1 / (1 + math.pi**2 * z * z),  # (2)
    "triangle": lambda z: torch.relu(1 - z.abs()),  # (3)
}


def _times_pulse(v: Tensor, x: Tensor, surrogate: str, k: float) -> Tensor:
    return in_pieces(lambda v, x: v * (k * _PULSES[surrogate](k * x)), v, x)


_surrogate_spike = entry(SurrogateSpikeFunction, again=SurrogateSpikeFunction.forward)


@public
def surrogate_spike(
    input: Tensor, surrogate: str = "fast_sigmoid", sharpness: float = 10.0
) -> Tensor:
    r"""Spike where ``input`` is positive: :math:`y = [x > 0]`, with the gradient of a smooth step.

    Args:
        input: Membrane potential above the threshold, any shape ``(*)``, floating point.
        surrogate: The pulse :math:`h`: ``"fast_sigmoid"``, ``"arctan"`` or ``"triangle"``.
        sharpness: :math:`k > 0`: the height of the pulse, and the inverse of its width.

    Returns:
        Tensor of the shape and dtype of ``input``; values are 0 or 1.

    Raises:
        ValueError: An unknown ``surrogate``.

    Example:
        >>> import torch
        >>> from torchbp.functional import surrogate_spike
        >>> x = torch.tensor([-0.1, 0.3], requires_grad=True)
        >>> y = surrogate_spike(x)
        >>> y.detach()
        tensor([0., 1.])
        >>> torch.autograd.grad(y.sum(), x)
        (tensor([2.5000, 0.6250]),)
    """
    if surrogate not in _PULSES:
        rule = f"surrogate to be one of {', '.join(_PULSES)}"
        raise ValueError(wrong("surrogate_spike", rule, repr(surrogate), "pass one of them"))
    return _surrogate_spike(input, surrogate, sharpness)


class SurrogateSpike(nn.Module):
    """Module form of :func:`surrogate_spike`."""

    __module__ = "torchbp.nn"

    def __init__(self, surrogate: str = "fast_sigmoid", sharpness: float = 10.0) -> None:
        super().__init__()
        self.surrogate = surrogate
        self.sharpness = sharpness

    def extra_repr(self) -> str:
        return f"surrogate={self.surrogate}, sharpness={self.sharpness}"

    def forward(self, input: Tensor) -> Tensor:
        return surrogate_spike(input, self.surrogate, self.sharpness)


def _rule(input: Tensor, surrogate: str = "fast_sigmoid", sharpness: float = 10.0) -> Tensor:
    """The step's values with the gradient of a function whose derivative the pulse is."""

    def smooth(x: Tensor) -> Tensor:
        z = sharpness * x
        if surrogate == "fast_sigmoid":
            return z / (1 + z.abs())
        if surrogate == "arctan":
            return torch.arctan(math.pi * z) / math.pi
        inside = z.clamp(-1, 1)
        return inside - inside * inside.abs() / 2

    y = in_pieces(smooth, input)
    return (input > 0).to(input.dtype) + (y - y.detach()).to(input.dtype)


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for surrogate in _PULSES:
        yield Sample((make.normal(3, 4), surrogate, 0.7), name=surrogate)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield SurrogateSpike, Sample(), Sample((make.normal(3, 4),))
    for surrogate in _PULSES:
        yield SurrogateSpike, Sample((surrogate, 0.7)), Sample((make.normal(3, 4),), name=surrogate)


OP = Op(
    function=surrogate_spike,
    modules=(SurrogateSpike,),
    reference=_rule,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    estimator=True,
)
