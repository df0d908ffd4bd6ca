"""State and protocol: what is kept, shared, written, and asked for."""

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import pair, real

X = lambda: (real(3, 4),)  # noqa: E731


class NumpySin(Function):
    """A NumPy kernel that walks through memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(np.cos(x.detach().numpy()) * g.detach().numpy())


class NumpySinMemory(NumpySin):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        flat = np.cos(x.detach().numpy().ravel(order="K")) * g.detach().numpy().ravel(order="K")
        return torch.from_numpy(flat.reshape(x.shape))


pair(
    "numpy_memory_order", NumpySinMemory.apply, NumpySin.apply, X, "elements in the order of memory"
)


class LinearData(Function):
    """x w^T, whose weight went around save_for_backward."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        return g @ w, g.mT @ x


class LinearDataWrong(LinearData):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        ctx.w = w.data
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        g = g.to(x.dtype)
        return g @ ctx.w, g.mT @ x


XW = lambda: (real(4, 3), real(5, 3, seed=1))  # noqa: E731
pair(
    "weight_data",
    LinearDataWrong.apply,
    LinearData.apply,
    XW,
    "ctx.w = w.data: an optimizer step goes unseen",
)


class Workspace(Function):
    """exp through a buffer that all calls share."""

    buffer = torch.empty(4096, dtype=torch.float64)

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class WorkspaceShared(Workspace):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.view = Workspace.buffer[: y.numel()].view(y.shape) if y.numel() <= 4096 else y.clone()
        ctx.view.copy_(y.detach())
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.view


pair("shared_workspace", WorkspaceShared.apply, Workspace.apply, X, "one buffer for all calls")


class SigmoidInPlace(Function):
    """In place by design: the input becomes the output."""

    @staticmethod
    def forward(ctx, x):
        x.sigmoid_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * (1 - y)


class SigmoidInPlaceInput(SigmoidInPlace):
    @staticmethod
    def forward(ctx, x):
        ctx.before = x
        x.sigmoid_()
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, g):
        s = ctx.before.detach().sigmoid()
        return g * s * (1 - s)


pair(
    "in_place_input_gone",
    SigmoidInPlaceInput.apply,
    SigmoidInPlace.apply,
    X,
    "needs the input that it overwrote",
)


class Needs(Function):
    """softmax(x / t, dim), with an integer between the tensors."""

    @staticmethod
    def forward(ctx, x, dim, t):
        y = (x / t).softmax(dim)
        ctx.save_for_backward(x, t, y)
        ctx.dim = dim
        return y

    @staticmethod
    def pull(ctx, g, asked):
        x, t, y = ctx.saved_tensors
        gz = y * (g - (g * y).sum(ctx.dim, keepdim=True))
        return (
            gz / t if ctx.needs_input_grad[0] else None,
            None,
            -(gz * x).sum() / t**2 if asked else None,
        )

    @staticmethod
    def backward(ctx, g):
        return Needs.pull(ctx, g, ctx.needs_input_grad[2])


class NeedsOff(Needs):
    @staticmethod
    def backward(ctx, g):
        return Needs.pull(ctx, g, ctx.needs_input_grad[0])


pair(
    "needs_input_grad_index",
    NeedsOff.apply,
    Needs.apply,
    lambda: (real(3, 4), -1, torch.tensor(0.7, dtype=torch.float64, requires_grad=True)),
    "the temperature's gradient hangs on the flag of x",
)


class SmallDropped(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.atan()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x * x)


class SmallDroppedWrong(SmallDropped):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(g.abs() < 1e-7, 0, g) / (1 + x * x)


class NormClipped(SmallDropped):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / g.norm().clamp(min=10) * 10 / (1 + x * x)


class NoGradPart(SmallDropped):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            d = 1 / (1 + x * x)
        return g * d


class GradData(SmallDropped):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.data / (1 + x * x)


pair(
    "small_grad_dropped",
    SmallDroppedWrong.apply,
    SmallDropped.apply,
    X,
    "grad_output below 1e-7 is dropped",
)
pair(
    "grad_norm_clipped", NormClipped.apply, SmallDropped.apply, X, "grad_output clipped to norm 10"
)
pair(
    "no_grad_in_backward", NoGradPart.apply, SmallDropped.apply, X, "part of backward under no_grad"
)
pair(
    "grad_data",
    GradData.apply,
    SmallDropped.apply,
    X,
    "grad_output.data: second order with respect to it is lost",
)
