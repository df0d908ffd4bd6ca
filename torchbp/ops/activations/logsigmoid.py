r"""Log-sigmoid: y = log σ(x) = -log(1 + exp(-x)).

Derivation:
    dy/dx  = σ(-x)                                                                             (1)
    grad_x = grad_y · σ(-x)                                                                    (2)

Saves:
    x, in its own dtype: 4 bytes per float32 element. torch keeps x and a buffer: 8 bytes.

Edge values:
    x → +∞: y → 0, dy/dx → 0.   x → -∞: y → x, dy/dx → 1.   NaN gives NaN.

Sources:
    Goodfellow, Bengio, Courville, "Deep Learning", 2016, section 3.10 (σ and softplus identities).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._function import Context, entry, kernel, public, undifferentiated
from torchbp.ops._op import Op
from torchbp.ops._pieces import in_pieces
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import in_one_loop

__all__ = ["LogSigmoid", "LogSigmoidFunction", "logsigmoid"]

_softplus_backward = kernel("softplus_backward")


class LogSigmoidFunction(Function):
    """Log-sigmoid with a hand-written derivative. Call it through :func:`logsigmoid`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # x, y: (*)
        y = in_one_loop(F.logsigmoid, x)
        return F.logsigmoid(x) if y is None else y

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = in_one_loop(_times_derivative, grad_y, x)
        if grad_x is not None:
            return grad_x
        if undifferentiated():
            # log σ(x) = -softplus(-x): that kernel needs no buffer beside x; at 40 σ is 1 in every dtype
            return _softplus_backward(grad_y, x, -1, 40)
        return in_pieces(_times_derivative, grad_y, x)  # (2)

    @staticmethod
    def jvp(ctx: Context, tangent_x: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return in_pieces(_times_derivative, tangent_x, x)


def _times_derivative(v: Tensor, x: Tensor) -> Tensor:
    return v * torch.sigmoid(-x)  # (1); not 1 - σ(x), which is 0 where σ(x) rounds to 1


_logsigmoid = entry(LogSigmoidFunction, again=LogSigmoidFunction.forward)


@public
def logsigmoid(input: Tensor) -> Tensor:
    r"""Log of the logistic sigmoid, elementwise: :math:`y = \log \sigma(x)`.

    Args:
        input: Any shape ``(*)``, floating point.

    Returns:
        Tensor of the shape and dtype of ``input``; values are in ``[-∞, 0]``.

    Raises:
        TypeError: ``input`` is not a tensor.
        RuntimeError: ``input`` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from torchbp.functional import logsigmoid
        >>> logsigmoid(torch.tensor([0.0, 2.0]))
        tensor([-0.6931, -0.1269])
    """
    return _logsigmoid(input)


class LogSigmoid(nn.LogSigmoid):
    """Module form of :func:`logsigmoid`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor) -> Tensor:
        return logsigmoid(input)


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    yield LogSigmoid, Sample(), Sample((make.normal(3, 4),))


OP = Op(
    function=logsigmoid,
    modules=(LogSigmoid,),
    reference=F.logsigmoid,
    samples=_samples.elementwise,
    module_samples=_module_samples,
    errors=_samples.elementwise_errors,
    saved_bytes=lambda x, *_, **__: x.numel() * x.element_size(),
    benchmark=_samples.square,
    elementwise=True,
    fused="aten::softplus_backward",
)
