r"""Dropout: y = x · m / (1 - p), where each m is 0 with probability p, else 1, drawn anew at every call.

Derivation:
    dy/dx  = m / (1 - p)                                                                      (1)
    grad_x = grad_y · m / (1 - p)                                                             (2)

Saves:
    m as one byte an element; torch on the CPU keeps it as a number of x's dtype (4 bytes for float32).
    Of less than 4096 float32 or float64 on the CPU m / (1 - p), as torch: a byte has to be widened in each product.

Edge values:
    p = 0, or not training: y is x itself.   p = 1: y is x · 0.   ±inf or NaN: NaN where dropped, as in torch.

Randomness:
    Reproducible under ``torch.manual_seed``, on every device; the stream is not torch's. On the CPU one 64-bit draw
    serves two elements, whose 32 bits are compared with p · 2³²: P(m = 0) is p to 2⁻³³.

Sources:
    Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting", 2014, Journal of Machine Learning Research 15.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.dropout._factor import times_factor
from torchbp.ops.dropout._mask import draw, draw_factor, is_few, is_identity, masked

__all__ = ["Dropout", "DropoutFunction", "dropout"]


class DropoutFunction(Function):
    """Product with a drawn mask. Call it through :func:`dropout`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor, scale: float, inplace: bool) -> Tensor:  # (*), (*) -> (*)
        return x.mul_(mask).mul_(scale) if inplace else masked(x, mask, scale, alike=True)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor
    ) -> None:
        x, mask, ctx.scale, inplace = inputs
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return masked(grad_y, mask, ctx.scale, alike=True), None, None, None  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return masked(tangent_x, mask, ctx.scale)


_dropout = entry(DropoutFunction, again=DropoutFunction.forward)


@public
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    r"""Zero each element with probability ``p`` and scale the others: :math:`y = x \cdot m / (1 - p)`.

    Args:
        input: Any shape ``(*)``, floating point or complex.
        p: Probability of an element to be zeroed, in ``[0, 1]``.
        training: Where false, ``input`` is returned as it is.
        inplace: Write the result into ``input``.

    Returns:
        Tensor of the shape and dtype of ``input``; its expectation is ``input``.

    Raises:
        ValueError: ``p`` is outside ``[0, 1]``.
        RuntimeError: ``input`` is of integers; ``inplace`` on a leaf that requires grad.

    Example:
        >>> import torch
        >>> from torchbp.functional import dropout
        >>> _ = torch.manual_seed(0)
        >>> sorted(set(dropout(torch.ones(100), p=0.75).tolist()))
        [0.0, 4.0]
    """
    if is_identity("dropout", input, p, training):
        return input
    factor = draw_factor(input, p)
    if factor is not None:
        return times_factor(input, factor, inplace)
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return _dropout(input, draw(input, p), scale, inplace)


class Dropout(nn.Dropout):
    """Module form of :func:`dropout`; it is active in training mode only."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


def _with_probabilities(make: Make) -> Iterator[Sample]:
    for sample in _samples.elementwise(make):
        yield Sample(sample.args, {"p": 0.5}, sample.name)
    for p in (0.0, 0.1, 1.0):
        yield Sample((make.normal(3, 5), p), name=f"p{p}")
    yield Sample((make.normal(3, 4), 0.5, False), name="eval")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Dropout, Sample(), Sample((make.normal(3, 4),))
    x = make.normal(3, 4, requires_grad=False)
    yield Dropout, Sample((0.2,), {"inplace": True}), Sample((x,), name="inplace")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3), -0.1), name="negative")
    yield Sample((make.normal(3), 1.5), name="above-one")
    yield Sample((make.labels(3, classes=5),), name="integers")


def _saved_bytes(x: Tensor, p: float = 0.5, training: bool = True) -> int:
    each = x.element_size() if is_few(x) else 1
    return x.numel() * each if p and training else 0


OP = Op(
    function=dropout,
    modules=(Dropout,),
    reference=None,
    samples=_with_probabilities,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_samples.square,
    elementwise=True,
    random=True,
)
