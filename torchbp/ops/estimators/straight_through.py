r"""Straight-through: y = q(x), a quantizer, in forward; in backward the gradient passes as if y were x.

Derivation (a rule, not a derivative: that of a step is 0 or does not exist):
    y = min(max(q(x), min), max), where bounds are given                                      (1)
        "round": to the nearest integer, halves to even;   "sign": 1 where x ≥ 0, else -1;   "clamp": q(x) = x
    grad_x = grad_y                                                                           (2)
    grad_x = grad_y · [l ≤ x ≤ u], with the window (l, u)                                     (3)
    Forward mode follows the rule too: tangent_y = tangent_x, inside the window.

    Everything passes by default, also where y is clamped, which keeps a saturated unit trainable. The window is that of
    binarized networks, (-1, 1) around "sign": there it is the derivative of hardtanh.

Saves:
    Nothing; with a window the mask of (3), a bool (1 byte an element).

Edge values:
    On the window's edge the gradient passes.   NaN: y is NaN for the built-in quantizers; outside every window.

Sources:
    Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", 2013, arXiv:1308.3432 (2);
    Courbariaux, Hubara, Soudry, El-Yaniv, Bengio, "Binarized Neural Networks", 2016, arXiv:1602.02830 ("sign", (3)).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, public
from torchbp.ops._jagged import row_by_row
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample

__all__ = ["StraightThrough", "StraightThroughFunction", "straight_through"]

_NAME = "straight_through"
Quantizer = Callable[[Tensor], Tensor]
Window = tuple[float, float] | None


class StraightThroughFunction(Function):
    """Another tensor in the place of x, and x's gradient. Call it through :func:`straight_through`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, window: Window
    ) -> tuple[Tensor, Tensor | None]:  # (*), (*) -> (*), (*) bool
        passes = None if window is None else (x >= window[0]) & (x <= window[1])
        return y.view_as(y), passes

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Window], output: tuple[Tensor, Tensor | None]
    ) -> None:
        _, passes = output
        if passes is not None:
            ctx.mark_non_differentiable(passes)
        ctx.save_for_backward(passes)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor, _: None) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return _where(passes, grad_y), None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return _where(passes, tangent_x), None


def _where(passes: Tensor | None, v: Tensor) -> Tensor:
    return v.view_as(v) if passes is None else torch.where(passes, v, 0)  # (2), (3)


_straight_through = entry(StraightThroughFunction)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1, torch.where(x >= 0, 1, x))  # NaN stays


_QUANTIZERS: dict[str, Quantizer] = {"round": torch.round, "sign": _sign, "clamp": lambda x: x}


@public
@row_by_row()
def straight_through(
    input: Tensor,
    quantizer: str | Callable[[Tensor], Tensor] = "round",
    *,
    min: float | None = None,
    max: float | None = None,
    window: tuple[float, float] | None = None,
) -> Tensor:
    r"""Quantize, :math:`y = q(x)`, with the gradient of the identity.

    Args:
        input: Any shape ``(*)``, floating point.
        quantizer: ``"round"``, ``"sign"`` (±1: 1 at 0), ``"clamp"`` (nothing but the bounds), or a function of a
            tensor that returns one of the same shape and dtype. It runs without autograd, must not write to its
            argument, and parameters of its own get no gradient.
        min: Lower bound of the output, if any.
        max: Upper bound of the output, if any.
        window: ``(l, u)``: the gradient passes only where :math:`l \le x \le u`; everywhere by default.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        ValueError: An unknown name; ``"clamp"`` without a bound; a window that is empty; a quantizer that changes
            the shape.
        TypeError: A quantizer that changes the dtype.

    Example:
        >>> import torch
        >>> from torchbp.functional import straight_through
        >>> x = torch.tensor([-0.3, 0.4, 2.6], requires_grad=True)
        >>> y = straight_through(x, "sign", window=(-1, 1))
        >>> y.detach()
        tensor([-1.,  1.,  1.])
        >>> torch.autograd.grad(y.sum(), x)
        (tensor([1., 1., 0.]),)
    """
    function = _named(quantizer, min, max, window)
    with torch.no_grad():
        x = input.detach()
        y = function(x)
        if isinstance(y, Tensor) and y.shape != x.shape:
            rule = f"quantizer to return the input's shape {shape(x)}"
            raise ValueError(wrong(_NAME, rule, shape(y), "quantize element by element"))
        if not isinstance(y, Tensor) or y.dtype != x.dtype:
            rule = f"quantizer to return a tensor of dtype {x.dtype}"
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(wrong(_NAME, rule, got, "cast it"))
        if min is not None or max is not None:
            y = y.clamp(min, max)  # (1)
    return _straight_through(input, y, window)[0]


def _named(
    quantizer: str | Quantizer, low: float | None, high: float | None, window: Window
) -> Quantizer:
    """Return the quantizer as a function, or raise what :func:`straight_through` documents."""
    if isinstance(quantizer, str) and quantizer not in _QUANTIZERS:
        rule = f"quantizer to be one of {', '.join(_QUANTIZERS)}, or a function"
        raise ValueError(wrong(_NAME, rule, repr(quantizer), "pass one of them"))
    if quantizer == "clamp" and low is None and high is None:
        raise ValueError(wrong(_NAME, "a bound for clamp", "none", "pass min, max or both"))
    if window is not None and not window[0] <= window[1]:
        raise ValueError(wrong(_NAME, "a window (l, u) with l ≤ u", window, "swap them"))
    return _QUANTIZERS[quantizer] if isinstance(quantizer, str) else quantizer


class StraightThrough(nn.Module):
    """Module form of :func:`straight_through`; its arguments are checked at construction."""

    __module__ = "torchbp.nn"

    def __init__(
        self,
        quantizer: str | Callable[[Tensor], Tensor] = "round",
        *,
        min: float | None = None,
        max: float | None = None,
        window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _named(quantizer, min, max, window)
        self.quantizer = quantizer
        self.min = min
        self.max = max
        self.window = window

    def extra_repr(self) -> str:
        options = {"min": self.min, "max": self.max, "window": self.window}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        return ", ".join([f"quantizer={self.quantizer}", *given])

    def forward(self, input: Tensor) -> Tensor:
        return straight_through(
            input, self.quantizer, min=self.min, max=self.max, window=self.window
        )


def _rule(
    input: Tensor,
    quantizer: str | Callable[[Tensor], Tensor] = "round",
    *,
    min: float | None = None,
    max: float | None = None,
    window: tuple[float, float] | None = None,
) -> Tensor:
    x = input.detach()
    named = {"round": x.round(), "sign": 2 * (x >= 0).to(x.dtype) - 1, "clamp": x}
    y = named[quantizer] if isinstance(quantizer, str) else quantizer(x)
    y = y if min is None and max is None else torch.clamp(y, min, max)
    inside = torch.ones_like(x) if window is None else ((x >= window[0]) & (x <= window[1]))
    return y + inside.to(x.dtype) * (input - x)


def _halves(x: Tensor) -> Tensor:
    return (x * 2).round() / 2


_WAYS = {
    "sign": (("sign",), {"window": (-1, 1)}),
    "clamp": (("clamp",), {"min": -0.5, "max": 0.5}),
    "clamp-above": (("clamp",), {"max": 0.5}),
    "bounded-round": (("round",), {"min": -1, "max": 1, "window": (-1.5, 1.5)}),
    "function": ((_halves,), {}),
}


def _all_samples(make: Make) -> Iterator[Sample]:
    yield from _samples.elementwise(make)
    for name, (args, options) in _WAYS.items():
        yield Sample((make.normal(3, 4), *args), options, name)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield StraightThrough, Sample(), Sample((make.normal(3, 4),))
    for name, (args, options) in _WAYS.items():
        if name != "function":  # pickled by its file
            yield StraightThrough, Sample(args, options), Sample((make.normal(3, 4),), name=name)


def _saved_bytes(x: Tensor, *_: object, window: Window = None, **__: object) -> int:
    return 0 if window is None else x.numel()


OP = Op(
    function=straight_through,
    modules=(StraightThrough,),
    reference=_rule,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=_saved_bytes,
    benchmark=_samples.square,
    estimator=True,
)
