r"""Gumbel-softmax: y = softmax((x + g) / τ) with Gumbel noise g = -log(e), e exponential: a soft draw from softmax(x).

Derivation, with all sums along the dimension:
    y = softmax(z), z = (x + g) / τ, of which softmax.py has the gradient:
    grad_z = y · (grad_y - Σ grad_y · y)                                                       (1)
    grad_x = grad_z / τ                                                                        (2)
    hard: the value is the one-hot of argmax y; the gradient is still that of y ("straight-through")     (3)

Saves:
    y (4 bytes per float32 element), as torch.

Edge values:
    x_i = -∞: y_i = 0, grad_x_i = 0.   τ → 0: y → one-hot, grad_x → 0 or ∞.

Randomness:
    Reproducible under ``torch.manual_seed``; the draws are torch's own.

Sources:
    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", 2016, arXiv:1611.01144;
    Maddison, Mnih, Teh, "The Concrete Distribution", 2016, arXiv:1611.00712.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import wrong
from torchbp.ops._function import Context, entry, fused, kernel, public, scale_fresh
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample
from torchbp.ops.activations.softmax import project
from torchbp.ops.kernels import over_softmax, over_softmax_backward

__all__ = ["GumbelSoftmaxFunction", "gumbel_softmax"]

_softmax_backward_data = kernel("_softmax_backward_data")


class GumbelSoftmaxFunction(Function):
    """Softmax of noisy logits with a hand-written gradient. Call it through :func:`gumbel_softmax`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, noise: Tensor, tau: float, dim: int) -> Tensor:  # (*), (*) -> (*)
        z = (x + noise) / tau
        y = over_softmax(z, dim)
        return torch.softmax(z, dim) if y is None else y

    @staticmethod
    def setup_context(
        ctx: Context, inputs: tuple[Tensor, Tensor, float, int], output: Tensor
    ) -> None:
        _, _, ctx.tau, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        grad_z = over_softmax_backward(grad_y, y, ctx.dim)  # (1)
        if grad_z is None and fused(grad_y, y):
            grad_z = _softmax_backward_data(grad_y, y, ctx.dim, y.dtype)
        elif grad_z is None:
            grad_z = project(grad_y, y, ctx.dim)
        if ctx.tau != 1:
            grad_z = scale_fresh(grad_z, grad_z.new_full((), 1 / ctx.tau))  # (2)
        return grad_z, None, None, None

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor, *_: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return project(tangent_x / ctx.tau, y, ctx.dim)


_gumbel_softmax = entry(GumbelSoftmaxFunction, again=GumbelSoftmaxFunction.forward)


@public
def gumbel_softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    r"""Draw from the Gumbel-softmax distribution: :math:`y = \mathrm{softmax}((x + g) / \tau)`, :math:`g` Gumbel noise.

    Args:
        logits: Unnormalized log-probabilities :math:`x`, any shape ``(*)``, floating point.
        tau: The temperature :math:`\tau > 0`.
        hard: Return the one-hot of the greatest value; its gradient is that of the soft draw.
        eps: Deprecated in torch, without effect.
        dim: The dimension whose values sum to 1.

    Returns:
        Tensor of the shape and dtype of ``logits``; values are in ``[0, 1]``.

    Raises:
        IndexError: ``logits`` has no dimension ``dim``.
        NotImplementedError: ``logits`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import gumbel_softmax
        >>> _ = torch.manual_seed(0)
        >>> gumbel_softmax(torch.tensor([0.0, 100.0, 0.0]), hard=True)
        tensor([0., 1., 0.])
    """
    if eps != 1e-10:
        message = wrong("gumbel_softmax", "no eps", eps, "it is deprecated and has no effect")
        warnings.warn(message, UserWarning, stacklevel=3)
    noise = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format)
    noise = -noise.detach().exponential_().log()
    y = _gumbel_softmax(logits, noise, tau, dim)
    if not hard:
        return y
    soft = y.detach()
    greatest = soft.argmax(dim, keepdim=True)
    one_hot = torch.zeros_like(soft).scatter(dim, greatest, 1.0)
    return one_hot - soft + y  # (3)


def _all_samples(make: Make) -> Iterator[Sample]:
    for shape in ((3, 4), (5,), (2, 3, 2), (1,)):
        yield Sample((make.normal(*shape),), name="x".join(map(str, shape)))
    yield Sample((make.normal(3, 4), 0.5), {"dim": 0}, name="tau0.5")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    return iter(())


def _errors(make: Make) -> Iterator[Sample]:
    yield Sample((make.normal(3, 4),), {"dim": 2}, name="no-such-dim")
    yield Sample((make.labels(3, 4, classes=2),), name="integers")


OP = Op(
    function=gumbel_softmax,
    modules=(),
    reference=F.gumbel_softmax,
    samples=_all_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    random=True,
    fused="aten::_softmax_backward_data",
)
