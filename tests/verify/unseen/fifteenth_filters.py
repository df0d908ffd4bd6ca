"""Convolution, Toeplitz product and filter."""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.fifteenth_activations import raw
from tests.verify.unseen.twelfth import wide


class Conv1d(Function):
    @staticmethod
    def forward(ctx, x, w, stride, padding):
        ctx.save_for_backward(x, w)
        ctx.options = stride, padding
        return F.conv1d(wide(x), wide(w), None, stride, padding).to(x.dtype)

    @staticmethod
    def gradients(ctx, g):
        x, w = (wide(t) for t in ctx.saved_tensors)
        grad_x = torch.nn.grad.conv1d_input(x.shape, w, wide(g), *ctx.options)
        grad_w = torch.nn.grad.conv1d_weight(x, w.shape, wide(g), *ctx.options)
        return grad_x.to(g.dtype), grad_w.to(g.dtype), None, None

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Conv1d.gradients(ctx, g)


class Conv1dRaw(Conv1d):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Conv1d.gradients(ctx, raw(g))


def _conv1d(function):
    def conv1d(x, w, stride=1, padding=0):
        """torch's conv1d of x (N, C, L) with w (E, C, K), C, E, K > 0, of sizes that leave an output."""
        need(
            x.dim() == w.dim() == 3 and x.shape[1] == w.shape[1],
            "expected x (N, C, L), w (E, C, K)",
        )
        need(w.numel() > 0 and stride > 0 and padding >= 0, "expected C, E, K, stride > 0")
        need(x.shape[2] + 2 * padding >= w.shape[2], "expected L + 2 padding >= K")
        need(x.numel() > 0, "expected N, L > 0")
        return function.apply(x, w, stride, padding)

    return conv1d


add(
    "conv1d",
    _conv1d,
    Conv1dRaw,
    Conv1d,
    lambda: (real(2, 3, 5), real(2, 3, 3, seed=1)),
    bug="grad_output is read as if it were contiguous",
    trigger="a transposed or expanded grad_output, as that of y.sum()",
)


class Toeplitz(Function):
    @staticmethod
    def lags(size, device):
        place = torch.arange(size, device=device)
        return place[:, None] - place

    @staticmethod
    def matrices(k):
        lags = Toeplitz.lags(k.shape[1], k.device)
        return torch.where(lags >= 0, wide(k)[:, lags.clamp(min=0)], 0)

    @staticmethod
    def forward(ctx, x, k):
        ctx.save_for_backward(x, k)
        h = wide(x).unflatten(1, (len(k), -1))
        return torch.einsum("gts,ngcs->ngct", Toeplitz.matrices(k), h).flatten(1, 2).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, grouped):
        x, k = ctx.saved_tensors
        d = wide(g).unflatten(1, (len(k), -1))
        to_x = torch.einsum("gts,ngct->ngcs", Toeplitz.matrices(k), d).flatten(1, 2)
        to_m = torch.einsum("ngct,ngcs->gts", grouped(wide(g)), grouped(wide(x)))
        lags = Toeplitz.lags(k.shape[1], k.device)
        to_m = torch.where(lags >= 0, to_m, 0).flatten(1)
        to_k = torch.zeros_like(wide(k)).index_add(1, lags.clamp(min=0).flatten(), to_m)
        return to_x.to(g.dtype), to_k.to(g.dtype)

    @staticmethod
    def backward(ctx, g):
        groups = len(ctx.saved_tensors[1])
        return Toeplitz.gradients(ctx, g, lambda t: t.unflatten(1, (groups, -1)))


class ToeplitzModulo(Toeplitz):
    @staticmethod
    def backward(ctx, g):
        groups = len(ctx.saved_tensors[1])
        return Toeplitz.gradients(ctx, g, lambda t: t.unflatten(1, (-1, groups)).transpose(1, 2))


def _toeplitz(function):
    def toeplitz(x, k):
        """y_t = Σ_(s <= t) k_(t - s) x_s of x (N, C, T), T > 0, with the kernels k (G, T).

        G divides C > 0; each kernel is that of C / G neighbouring channels.
        """
        need(x.dim() == 3 and k.dim() == 2, "expected x (N, C, T) and k (G, T)")
        need(x.shape[2] == k.shape[1] and k.numel() > 0, "expected one T > 0 and G > 0")
        need(x.shape[1] > 0 and not x.shape[1] % len(k), "expected G that divides C > 0")
        return function.apply(x, k)

    return toeplitz


add(
    "toeplitz",
    _toeplitz,
    ToeplitzModulo,
    Toeplitz,
    lambda: (real(2, 4, 3), real(2, 3, seed=1)),
    bug="the kernels' gradient takes every G-th channel, not neighbours",
    trigger="the sample: two groups of two channels",
)


class PreEmphasis(Function):
    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return (wide(x) - wide(a) * F.pad(wide(x)[..., :-1], (1, 0))).to(x.dtype)

    @staticmethod
    def to_x(ctx, g):
        return (wide(g) - wide(ctx.saved_tensors[1]) * F.pad(wide(g)[..., 1:], (0, 1))).to(g.dtype)

    @staticmethod
    def to_a(ctx, g):
        return -(wide(g)[..., 1:] * wide(ctx.saved_tensors[0])[..., :-1]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return PreEmphasis.to_x(ctx, g), PreEmphasis.to_a(ctx, g).to(g.dtype)


class PreEmphasisFloat(PreEmphasis):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return PreEmphasis.to_x(ctx, g), torch.tensor(PreEmphasis.to_a(ctx, g).item())


def _pre_emphasis(function):
    def pre_emphasis(x, a):
        """y_t = x_t - a x_(t-1), y_0 = x_0, of signals x (*, T), T > 0, a ()."""
        need(x.dim() > 0 and x.shape[-1] > 0, "expected x (*, T), T > 0")
        need(a.dim() == 0, "expected a ()")
        return function.apply(x, a)

    return pre_emphasis


add(
    "pre_emphasis",
    _pre_emphasis,
    PreEmphasisFloat,
    PreEmphasis,
    lambda: (real(2, 5), torch.tensor(0.97, dtype=F64, requires_grad=True)),
    bug="the coefficient's gradient is made anew, a float32 number",
    trigger="the sample: float64, from the eighth digit on",
)
