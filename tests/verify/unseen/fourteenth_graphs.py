"""Graphs and kernels."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


def shifted(index, offset):
    return torch.stack((index[0], index[1] + offset))


def shifted_in_place(index, offset):
    index[1] += offset
    return index


def _dense_to_sparse(shift):
    def dense_to_sparse(adj):
        """Edges (2, E), and their weights (E,), of a matrix (N, N) or of several (B, N, N), N > 0, put in one graph.

        An edge is an element that is not 0.
        """
        good = adj.dim() in (2, 3) and adj.shape[-1] == adj.shape[-2] > 0
        require(good, "adj must be (N, N) or (B, N, N), N > 0")
        size = adj.shape[-1]
        flat = adj.reshape(-1, size)
        index = flat.nonzero().t()
        weight = flat[index[0], index[1]]
        if adj.dim() == 3:
            index = shift(index, index[0] // size * size)
        return index, weight

    return dense_to_sparse


add(
    "dense_to_sparse_offset",
    _dense_to_sparse,
    shifted_in_place,
    shifted,
    lambda: (real(4, 4),),
    bug="the indices that backward needs are changed in place: it raises (pyg-team/pytorch_geometric#10318)",
    trigger="a batch of matrices",
    missed="backward raises, and a batch that is laid out in one graph is not tried",
)


class Chebyshev(Function):
    @staticmethod
    def basis(x, graph, order):
        out = [x, graph @ x]
        while len(out) < order:
            out.append(2 * graph @ out[-1] - out[-2])
        return out[:order]

    @staticmethod
    def forward(ctx, x, graph, w):
        ctx.save_for_backward(x, graph, w)
        return sum(
            t @ weight for t, weight in zip(Chebyshev.basis(x, graph, len(w)), w, strict=True)
        )

    @staticmethod
    def gradients(ctx, g, back):
        x, graph, w = ctx.saved_tensors
        basis = Chebyshev.basis(x, graph, len(w))
        d = [g @ weight.mT for weight in w]
        grad = torch.zeros_like(graph)
        for k in range(len(w) - 1, 0, -1):
            factor = 2 if k > 1 else 1
            grad = grad + factor * d[k] @ basis[k - 1].mT
            d[k - 1] = d[k - 1] + factor * back(graph) @ d[k]
            if k > 1:
                d[k - 2] = d[k - 2] - d[k]
        return d[0], grad, torch.stack([t.mT @ g for t in basis])

    @staticmethod
    def backward(ctx, g):
        return Chebyshev.gradients(ctx, g, lambda graph: graph.mT)


class ChebyshevSame(Chebyshev):
    @staticmethod
    def backward(ctx, g):
        return Chebyshev.gradients(ctx, g, lambda graph: graph)


def _chebyshev(function):
    def chebyshev(x, graph, w):
        """Graph convolution (N, E) of x (N, D) by Chebyshev polynomials of the matrix graph (N, N).

        w is (K, D, E), K > 0.
        """
        require(x.dim() == 2 and graph.shape == (len(x), len(x)), "x must be (N, D), graph (N, N)")
        require(
            w.dim() == 3 and len(w) > 0 and w.shape[1] == x.shape[1], "w must be (K, D, E), K > 0"
        )
        return function.apply(x, graph, w)

    return chebyshev


def laplacian():
    ring = torch.eye(4, dtype=torch.float64).roll(1, 0)
    return -(ring + ring.mT) / 2


add(
    "chebyshev_directed",
    _chebyshev,
    ChebyshevSame,
    Chebyshev,
    lambda: (real(4, 3), laplacian(), real(3, 3, 2, seed=1)),
    bug="backward does not transpose the graph's matrix",
    trigger="a directed graph (the sample's is not)",
)


class Coordinates(Function):
    @staticmethod
    def forward(ctx, x, m):
        ctx.save_for_backward(x, m)
        return x + (x * m.sum(1, keepdim=True) - m @ x) / len(x)

    @staticmethod
    def gradients(ctx, g, reaction):
        x, m = ctx.saved_tensors
        grad = g + (g * m.sum(1, keepdim=True) - reaction(m.mT @ g)) / len(x)
        return grad, ((g * x).sum(1, keepdim=True) - g @ x.mT) / len(x)

    @staticmethod
    def backward(ctx, g):
        return Coordinates.gradients(ctx, g, lambda term: term)


class CoordinatesAction(Coordinates):
    @staticmethod
    def backward(ctx, g):
        return Coordinates.gradients(ctx, g, torch.zeros_like)


def _coordinates(function):
    def coordinates(x, m):
        """An E(n) layer's places x_i + Σ (x_i - x_j) m_ij / N, of x (N, D), N > 0, and messages m (N, N)."""
        require(x.dim() == 2 and len(x) > 0 and m.shape == (len(x), len(x)), "x: (N, D), m: (N, N)")
        return function.apply(x, m)

    return coordinates


add(
    "coordinates_reaction",
    _coordinates,
    CoordinatesAction,
    Coordinates,
    lambda: (real(4, 3), real(4, 4, seed=1)),
    bug="the neighbour's share of a difference has no gradient",
    trigger="the sample",
)


class GaussianKernel(Function):
    @staticmethod
    def kernel(x, length):
        square = (x.unsqueeze(1) - x).square().sum(-1)
        return square, (-square / (2 * length**2)).exp()

    @staticmethod
    def forward(ctx, x, v, length):
        ctx.save_for_backward(x, v, length)
        ctx.dense = x.is_contiguous()
        return GaussianKernel.kernel(x, length)[1] @ v

    @staticmethod
    def backward(ctx, g):
        x, v, length = ctx.saved_tensors
        square, k = GaussianKernel.kernel(x, length)
        d = torch.outer(g, v) * k
        both = d + d.mT
        apart = x - x.unsqueeze(1)
        grad_x = (both.unsqueeze(-1) * apart).sum(1) / length**2
        return grad_x, k @ g, (d * square).sum() / length**3


class GaussianKernelDense(GaussianKernel):
    @staticmethod
    def backward(ctx, g):
        grad_x, grad_v, grad_length = GaussianKernel.backward(ctx, g)
        return grad_x, grad_v, grad_length if ctx.dense else None


def _gaussian_kernel(function):
    def gaussian_kernel(x, v, length):
        """K v (N,) for the matrix K of exp(-|x_i - x_j|² / 2 length²) of x (N, D), v (N,) and a length () > 0."""
        require(x.dim() == 2 and v.shape == x.shape[:1] and length.dim() == 0, "x: (N, D), v: (N,)")
        require(bool(length > 0), "length must be positive")
        return function.apply(x, v, length)

    return gaussian_kernel


add(
    "gaussian_kernel_layout",
    _gaussian_kernel,
    GaussianKernelDense,
    GaussianKernel,
    lambda: (real(5, 3), real(5, seed=1), real((), seed=2, positive=True)),
    bug="the length has no gradient if x is not contiguous (cornellius-gp/gpytorch#1543)",
    trigger="a transposed x",
)


class Conv2d(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w)

    @staticmethod
    def gradients(ctx, g, kernel):
        x, w = ctx.saved_tensors
        grad_w = F.conv2d(x.transpose(0, 1), g.transpose(0, 1)).transpose(0, 1)
        return F.conv_transpose2d(g, kernel(w)), grad_w

    @staticmethod
    def backward(ctx, g):
        return Conv2d.gradients(ctx, g, lambda w: w)


class Conv2dMemory(Conv2d):
    @staticmethod
    def memory(w):
        """The kernel's memory, read as that of a dense tensor."""
        dense = torch.empty(w.shape, device="meta").stride()
        return w.as_strided(w.shape, dense)

    @staticmethod
    def backward(ctx, g):
        return Conv2d.gradients(ctx, g, Conv2dMemory.memory)


def _conv2d(function):
    def conv2d(x, w):
        """Convolution of x (N, C, H, W) with w (E, C, K, L), no larger than x; no size is 0."""
        require(
            x.dim() == w.dim() == 4 and x.shape[1] == w.shape[1], "x: (N, C, H, W), w: (E, C, K, L)"
        )
        require(x.numel() > 0 and w.numel() > 0, "no size may be 0")
        require(
            w.shape[2] <= x.shape[2] and w.shape[3] <= x.shape[3], "w must not be larger than x"
        )
        return function.apply(x, w)

    return conv2d


add(
    "conv2d_kernel_layout",
    _conv2d,
    Conv2dMemory,
    Conv2d,
    lambda: (real(1, 2, 3, 3), real(2, 2, 2, 2, seed=1)),
    bug="backward reads the kernel's memory without its strides (huggingface/candle#3735)",
    trigger="a transposed kernel",
)
