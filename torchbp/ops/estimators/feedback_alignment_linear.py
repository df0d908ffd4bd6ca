r"""Feedback alignment: y = x Wᵀ + b in forward; in backward the error goes down through a fixed random B, not W.

Derivation (a rule, not a derivative: grad_x would be grad_y · W), per row of x (N, I), with W and B (O, I), b (O,):
    grad_x = grad_y · conj(B)                                                                 (1)
    grad_W = grad_yᵀ · conj(x)                                                                (2)
    grad_b = Σ over the rows of grad_y                                                        (3)
    tangent_y = tangent_x · Bᵀ + x · tangent_Wᵀ + tangent_b                                   (4)
    B gets no gradient. It need not resemble W: W comes to resemble it, until the two agree on the direction downhill.

Saves:
    x and B: W, which plain backpropagation would need, is not kept.

Edge values:
    None of its own. In half precision every sum is accumulated in float32.

Sources:
    Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for deep
    learning", 2016, doi:10.1038/ncomms13276.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, in_autocast_dtype, public
from torchbp.ops._jagged import row_by_row
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample, stored
from torchbp.ops.linear.linear import LinearFunction, rows

__all__ = [
    "FeedbackAlignmentLinear",
    "FeedbackAlignmentLinearFunction",
    "feedback_alignment_linear",
]

_NAME = "feedback_alignment_linear"


class FeedbackAlignmentLinearFunction(Function):
    """Affine map with another matrix in its backward. Call it through :func:`feedback_alignment_linear`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None
    ) -> Tensor:  # (*, I), (O, I), (O, I), (O,) -> (*, O)
        return LinearFunction.forward(x, weight, bias)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, _, feedback, _ = inputs
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, feedback if ctx.needs_input_grad[0] else None
        )
        ctx.save_for_forward(x, feedback)

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        x, feedback = ctx.saved_tensors
        need_x, need_weight, _, need_bias = ctx.needs_input_grad
        grad_x = grad_y @ feedback.conj() if need_x else None  # (1)
        grad_weight = rows(grad_y).mT @ rows(x).conj() if need_weight else None  # (2)
        grad_bias = rows(grad_y).sum(0) if need_bias else None  # (3)
        return grad_x, grad_weight, None, grad_bias

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_weight: Tensor | None,
        _: Tensor | None,
        tangent_bias: Tensor | None,
    ) -> Tensor:
        x, feedback = ctx.saved_tensors
        terms = []  # (4)
        if tangent_x is not None:
            terms.append(F.linear(tangent_x, feedback))
        if tangent_weight is not None:
            terms.append(F.linear(x, tangent_weight))
        if tangent_bias is not None:
            terms.append(tangent_bias.expand(*x.shape[:-1], feedback.shape[0]))
        return sum(terms[1:], terms[0])


_feedback_alignment_linear = entry(FeedbackAlignmentLinearFunction)


@public
@row_by_row(-1)
def feedback_alignment_linear(
    input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Affine map of the last dimension, :math:`y = x W^T + b`; :math:`x` gets the gradient :math:`g B`.

    Args:
        input: ``(*, I)``, floating point.
        weight: ``(O, I)``.
        feedback: :math:`B`, ``(O, I)``: takes the place of ``weight`` in backward. It gets no gradient.
        bias: ``(O,)``.

    Returns:
        Tensor ``(*, O)``. Under autocast it is computed in the lower precision, as torch's ``linear`` is.

    Raises:
        ValueError: ``weight`` is no matrix, or ``feedback`` has another shape.
        RuntimeError: Other shapes or dtypes that do not fit.

    Example:
        >>> import torch
        >>> from torchbp.functional import feedback_alignment_linear
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> w, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5, -0.5]])
        >>> feedback_alignment_linear(x, w, b).backward()
        >>> x.grad
        tensor([[ 0.5000, -0.5000]])
    """
    if weight.dim() != 2 or feedback.shape != weight.shape:
        rule = "weight and feedback of one shape (O, I)"
        got = f"{shape(weight)} and {shape(feedback)}"
        raise ValueError(wrong(_NAME, rule, got, "feedback stands in for weight"))
    if autocasts(input.device.type):
        input, weight, feedback, bias = in_autocast_dtype(input, weight, feedback, bias)
    return _feedback_alignment_linear(input, weight, feedback, bias)


class FeedbackAlignmentLinear(nn.Linear):
    """Module form of :func:`feedback_alignment_linear`; its ``feedback`` is a buffer, saved in the ``state_dict``.

    Initialised as :class:`torch.nn.Linear`, which is drawn first; the feedback afterwards, from the weight's
    distribution, uniform in ±1/√I.
    """

    __module__ = "torchbp.nn"
    feedback: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("feedback", torch.empty_like(self.weight, requires_grad=False))
        self.reset_feedback()

    def reset_feedback(self) -> None:
        """Draw the feedback anew."""
        nn.init.kaiming_uniform_(self.feedback, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        return feedback_alignment_linear(input, self.weight, self.feedback, self.bias)


def _rule(input: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None = None) -> Tensor:
    path = F.linear(input, feedback.detach())
    return F.linear(input.detach(), weight, bias) + (path - path.detach())


def _all_samples(make: Make) -> Iterator[Sample]:
    def constant(*dims: int) -> Tensor:
        return make.normal(*dims, requires_grad=False)

    for dims in ((4, 3), (3,), (2, 4, 3), (0, 3), (1, 3), (2, 0, 3)):
        tensors = (make.normal(*dims), make.normal(5, 3), constant(5, 3), make.normal(5))
        yield Sample(tensors, name="x".join(map(str, dims)))
    yield Sample((make.normal(4, 3), make.normal(5, 3), constant(5, 3)), name="no-bias")
    frozen = (make.normal(4, 3), constant(5, 3), constant(5, 3), make.normal(5))
    yield Sample(frozen, name="frozen-weight")
    data = (constant(4, 3), make.normal(5, 3), constant(5, 3), make.normal(5))
    yield Sample(data, name="data-input")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x = Sample((make.normal(4, 3),))
    yield FeedbackAlignmentLinear, Sample((3, 5)), x
    yield FeedbackAlignmentLinear, Sample((3, 5), {"bias": False}), Sample(x.args, name="no-bias")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = _samples.square(make, n).args
    width = x.shape[-1]
    feedback = make.normal(width, width, requires_grad=False)
    return Sample((x, make.normal(width, width), feedback, make.normal(width)))


def _saved_bytes(x: Tensor, weight: Tensor, feedback: Tensor, bias: Tensor | None = None) -> int:
    return stored(x if weight.requires_grad else None, feedback if x.requires_grad else None)


OP = Op(
    function=feedback_alignment_linear,
    modules=(FeedbackAlignmentLinear,),
    reference=_rule,
    samples=_all_samples,
    module_samples=_module_samples,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    estimator=True,
)
