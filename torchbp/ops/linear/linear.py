r"""Linear: y = x Wᵀ + b.

Derivation, per row n of x (N, I), with W (O, I), b (O,):
    y[n, o] = Σ_i x[n, i] · W[o, i] + b[o]
    grad_x[n, i] = Σ_o grad_y[n, o] · conj(W[o, i])       grad_x = grad_y · conj(W)           (1)
    grad_W[o, i] = Σ_n grad_y[n, o] · conj(x[n, i])       grad_W = grad_yᵀ · conj(x)          (2)
    grad_b[o]    = Σ_n grad_y[n, o]                                                           (3)
    tangent_y    = tangent_x · Wᵀ + x · tangent_Wᵀ + tangent_b                                (4)

Saves:
    x, W: what the products need. x is not kept where W needs no gradient, nor W where x needs none.

Edge values:
    None of its own. N = 0 gives zero gradients for W and b. In half precision every sum is accumulated in float32.

Sources:
    Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", 1986, doi:10.1038/323533a0.
"""

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, in_autocast_dtype, public, unviewed
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops._samples import square as _square

__all__ = ["Linear", "LinearFunction", "linear"]


class LinearFunction(Function):
    """Affine map with hand-written gradients. Call it through :func:`linear`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:  # (*, I), (O, I), (O,) -> (*, O)
        y = F.linear(x, weight, bias)
        return y if x.dim() == 2 else unviewed(y)

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, weight, bias = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(
        ctx: Context, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        if grad_y is None:
            return None, None, None
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight.conj()  # (1)
        if ctx.needs_input_grad[1]:
            grad_weight = rows(grad_y).mT @ rows(x).conj()  # (2)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum_to_size(ctx.bias_shape)  # (3)
        return grad_x, grad_weight, grad_bias

    @staticmethod
    def jvp(
        ctx: Context,
        tangent_x: Tensor | None,
        tangent_weight: Tensor | None,
        tangent_bias: Tensor | None,
    ) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = []  # (4)
        if tangent_x is not None:
            terms.append(F.linear(tangent_x, weight))
        if tangent_weight is not None:
            terms.append(F.linear(x, tangent_weight))
        if tangent_bias is not None:
            terms.append(tangent_bias.expand(*x.shape[:-1], weight.shape[0]))
        return sum(terms[1:], terms[0])


def rows(t: Tensor) -> Tensor:
    """Return ``t``, (*, D), as (N, D)."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _flops(x: Tensor, weight: Tensor, _bias: Tensor | None) -> int:
    return 2 * x.numel() * weight.shape[0]


_linear = entry(LinearFunction, again=LinearFunction.forward, flops=_flops)


@public
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Affine map of the last dimension: :math:`y = x W^T + b`.

    Args:
        input: ``(*, I)``, floating point, complex or integers.
        weight: ``(O, I)``, or ``(I,)``, of the dtype of ``input``.
        bias: ``(O,)``, or what can be expanded to the output.

    Returns:
        Tensor ``(*, O)``, or ``(*)`` for a ``weight`` of one dimension. Under autocast it is computed in the
        lower precision, as torch does.

    Raises:
        RuntimeError: Shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> from torchbp.functional import linear
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
        tensor([[11.5000]])
    """
    if weight.dim() in (1, 2) and input.dim() and input.shape[-1] != weight.shape[-1]:
        rule = f"input of shape (*, {weight.shape[-1]}) for a weight of shape {shape(weight)}"
        raise RuntimeError(
            wrong("linear", rule, shape(input), "the last dimension holds the features")
        )
    if autocasts(input.device.type):
        input, weight, bias = in_autocast_dtype(input, weight, bias)
    if weight.dim() == 1:
        return _linear(input, weight.unsqueeze(0), bias).squeeze(-1)
    return _linear(input, weight, bias)


class Linear(nn.Linear):
    """Module form of :func:`linear`; initialised as torch's: uniform in ±1/√I."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((4, 3), (3,), (2, 4, 3), (0, 3), (1, 3), (2, 0, 3)):
        name = "x".join(map(str, dims))
        yield Sample((make.normal(*dims), make.normal(5, 3), make.normal(5)), name=name)
    yield Sample((make.normal(4, 3), make.normal(5, 3)), name="no-bias")
    yield Sample((make.normal(4, 3), make.normal(3)), name="vector-weight")
    yield Sample((make.normal(3), make.normal(3)), name="vector-vector")
    yield Sample((make.normal(4, 3), make.normal(5, 3), make.normal(1)), name="broadcast-bias")
    yield Sample((make.normal(4, 3), make.normal(5, 3), make.normal(4, 5)), name="full-bias")
    frozen = make.normal(5, 3, requires_grad=False)
    yield Sample((make.normal(4, 3), frozen, make.normal(5)), name="frozen-weight")
    data = make.normal(4, 3, requires_grad=False)
    yield Sample((data, make.normal(5, 3), make.normal(5)), name="data-input")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield Linear, Sample((3, 5)), Sample((make.normal(4, 3),))
    yield Linear, Sample((3, 5), {"bias": False}), Sample((make.normal(4, 3),), name="no-bias")


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(4, 2), make.normal(5, 3)), name="features")
    yield Sample((make.normal(), make.normal(5, 3)), name="scalar")
    yield Sample((make.normal(4, 3), make.normal(5, 3), make.normal(4)), name="bias")
    yield Sample((make.normal(4, 3), make.normal(5, 3).half()), name="dtypes")
    yield Sample((make.normal(4, 3), make.normal(2, 5, 3)), name="weight-3d")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = _square(make, n).args
    width = x.shape[-1]
    return Sample((x, make.normal(width, width), make.normal(width)))


def _saved_bytes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    x_bytes = x.numel() * x.element_size() if weight.requires_grad else 0
    weight_bytes = weight.numel() * weight.element_size() if x.requires_grad else 0
    return x_bytes + weight_bytes


OP = Op(
    function=linear,
    modules=(Linear,),
    reference=F.linear,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
