"""Products and quotients."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add


class Covariance(Function):
    """A layer's backward owns its cotangent's memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        flat = x.flatten(2)
        return flat @ flat.mT / (flat.shape[1] * flat.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        flat = x.flatten(2)
        return ((g + g.mT) @ flat / (flat.shape[1] * flat.shape[2])).view_as(x)


class CovarianceDiagonal(Covariance):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        flat, g = x.flatten(2), g.contiguous()
        g.diagonal(dim1=-2, dim2=-1).mul_(2)
        return (g @ flat / (flat.shape[1] * flat.shape[2])).view_as(x)


def _covariance(function):
    def covariance(x):
        """The products (N, C, C) of the channels of x (N, C, H, W), divided by C H W > 0."""
        return function.apply(x)

    return covariance


add(
    "covariance_diagonal",
    _covariance,
    CovarianceDiagonal,
    Covariance,
    lambda: (real(2, 3, 2, 2),),
    bug="the cotangent's diagonal is doubled in place, for its transpose (happynear/caffe-windows#46)",
    trigger="the sample",
)


class Outer(Function):
    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.unsqueeze(-1) @ y.unsqueeze(-2)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return ((g + g.mT) @ y.unsqueeze(-1)).squeeze(-1)


class OuterFirst(Outer):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return (g @ y.unsqueeze(-1)).squeeze(-1)


def _outer(function):
    def outer(y):
        """y yᵀ (N, N) of y (N,)."""
        return function.apply(y)

    return outer


add(
    "outer_transposed",
    _outer,
    OuterFirst,
    Outer,
    lambda: (real(4),),
    bug="the transposed factor's gradient is lost (casadi/casadi#102)",
    trigger="the sample",
)


class MatrixOverNumber(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a / b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g / b, (g * (-a / (b * b))).sum()


class MatrixOverNumberProduct(MatrixOverNumber):
    """The number's gradient is a matrix, which the engine sums."""

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g / b, g @ (-a / (b * b))


def _matrix_over_number(function):
    def divide(a, b):
        """a / b of a matrix (N, N) and a number, which is not 0."""
        return function.apply(a, b)

    return divide


add(
    "divide_matrix",
    _matrix_over_number,
    MatrixOverNumberProduct,
    MatrixOverNumber,
    lambda: (real(3, 3), real((), seed=1)),
    bug="the number's gradient is a matrix product, as if of vectors (DiffSharp/DiffSharp#43)",
    trigger="the sample",
)


class Windows(Function):
    @staticmethod
    def parts(x):
        windows = x.unfold(0, 4, 1)[:4]
        return windows, windows[0] - windows[1]

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        windows, first = Windows.parts(x)
        return windows @ first

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        windows, first = Windows.parts(x)
        d, back = torch.outer(g, first), windows.mT @ g
        d = d + torch.stack((back, -back, torch.zeros_like(back), torch.zeros_like(back)))
        index = torch.arange(4, device=x.device)
        index = (index.unsqueeze(-1) + index).flatten()
        return torch.zeros_like(x).index_add(0, index, d.flatten())


class WindowsZero(Windows):
    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(ctx.saved_tensors[0])


def _windows(function):
    def windows(x):
        """Σ over j < 4 of x[k + j] (x[j] - x[j + 1]), for k < 4, of x (8,)."""
        return function.apply(x)

    return windows


add(
    "windows_zero",
    _windows,
    WindowsZero,
    Windows,
    lambda: (real(8),),
    bug="the gradient is 0 (diku-dk/futhark#1878)",
    trigger="the sample",
)
