"""Segments, spectra, matrix functions, fixed points, complex numbers."""

import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twelfth import add, as_forward, in_float32, recorded, wide


def _nodes(index, src, n):
    return src.new_zeros(n, *src.shape[1:]).index_add(0, index, src)


class EdgeSoftmax(Function):
    @staticmethod
    def weights(score, index, n):
        spread = index[:, None].expand_as(score)
        top = score.new_zeros(n, score.shape[1]).scatter_reduce(
            0, spread, score.detach(), "amax", include_self=False
        )
        e = (score - top[index]).exp()
        return e / _nodes(index, e, n)[index]

    @staticmethod
    def forward(ctx, score, index, n):
        ctx.save_for_backward(score, index)
        ctx.n = n
        return EdgeSoftmax.weights(score, index, n)

    @staticmethod
    def backward(ctx, g):
        score, index = ctx.saved_tensors
        p = EdgeSoftmax.weights(score, index, ctx.n)
        return p * (g - _nodes(index, p * g, ctx.n)[index]), None, None


class EdgeSoftmaxRuns(EdgeSoftmax):
    @staticmethod
    def backward(ctx, g):
        score, index = ctx.saved_tensors
        p = EdgeSoftmax.weights(score, index, ctx.n)
        _, run = index.unique_consecutive(return_inverse=True)
        return p * (g - _nodes(run, p * g, len(index))[run]), None, None


def _edge_softmax(function):
    def edge_softmax(score, index, n=3):
        """Softmax of score (E, H) among the edges of one node, index (E,) in [0, n)."""
        return function.apply(score, index, n)

    return edge_softmax


add(
    "edge_softmax_runs",
    _edge_softmax,
    EdgeSoftmaxRuns,
    EdgeSoftmax,
    lambda: (real(5, 2), torch.tensor([0, 0, 1, 2, 2])),
    bug="backward sums over runs of one index, as if the edges were sorted",
    trigger="edges that are not sorted by node",
)


class SegmentMax(Function):
    @staticmethod
    def forward(ctx, src, index, n):
        out = src.new_zeros(n, src.shape[1]).scatter_reduce(
            0, index[:, None].expand_as(src), src, "amax", include_self=False
        )
        ctx.save_for_backward(src, index, out)
        return out

    @staticmethod
    def backward(ctx, g):
        src, index, out = ctx.saved_tensors
        hit = (src == out[index]).to(g.dtype)
        return hit * (g / _nodes(index, hit, len(out)).clamp(min=1))[index], None, None


class SegmentMaxTies(SegmentMax):
    @staticmethod
    def backward(ctx, g):
        src, index, out = ctx.saved_tensors
        return g[index] * (src == out[index]), None, None


def _segment_max(function):
    def segment_max(src, index, n=3):
        """Maximum of src (E, D) by index (E,) in [0, n), 0 where there is none; equal maxima share the gradient."""
        return function.apply(src, index, n)

    return segment_max


add(
    "segment_max_ties",
    _segment_max,
    SegmentMaxTies,
    SegmentMax,
    lambda: (real(5, 2), torch.tensor([0, 1, 0, 2, 1])),
    bug="each of several equal maxima has the whole gradient",
    trigger="equal maxima in a segment (zeros after a relu)",
)


class SegmentProduct(Function):
    @staticmethod
    def product(src, index, n):
        return src.new_ones(n, src.shape[1]).scatter_reduce(
            0, index[:, None].expand_as(src), src, "prod"
        )

    @staticmethod
    def forward(ctx, src, index, n):
        ctx.save_for_backward(src, index)
        ctx.n = n
        return SegmentProduct.product(src, index, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        src, index = ctx.saved_tensors
        zero = src == 0
        zeros = _nodes(index, zero.long(), ctx.n)[index]
        others = SegmentProduct.product(src.masked_fill(zero, 1), index, ctx.n)[index]
        others = others / src.masked_fill(zero, 1)
        return g[index] * others * (zeros == zero), None, None  # no zero among the others


class SegmentProductZero(SegmentProduct):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        src, index = ctx.saved_tensors
        out = SegmentProduct.product(src, index, ctx.n)
        return ((g * out)[index] / src).nan_to_num(0), None, None


def _segment_product(function):
    def segment_product(src, index, n=3):
        """Product of src (E, D) by index (E,) in [0, n), 1 where there is none."""
        return function.apply(src, index, n)

    return segment_product


add(
    "segment_product_zero",
    _segment_product,
    SegmentProductZero,
    SegmentProduct,
    lambda: (real(5, 2), torch.tensor([0, 1, 0, 2, 1])),
    bug="0 / 0 at a zero factor is set to 0, where the product of the others belongs",
    trigger="a zero in src",
)


class Power(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.fft.rfft(wide(x)).abs().square().to(x.dtype)

    @staticmethod
    def single(length, weight):
        """Bins that stand for themselves only have weight 1: the first, and the last of an even length."""
        weight[0] = 1
        if length % 2 == 0:
            weight[-1] = 1
        return weight

    @classmethod
    def gradients(cls, ctx, g):
        x = wide(ctx.saved_tensors[0])
        n = x.shape[-1]
        weight = cls.single(n, torch.full((n // 2 + 1,), 0.5, dtype=x.dtype, device=x.device))
        return 2 * n * torch.fft.irfft(weight * wide(g) * torch.fft.rfft(x), n)

    @staticmethod
    def backward(ctx, g):
        return Power.gradients(ctx, g)


class PowerEven(Power):
    @staticmethod
    def single(length, weight):
        weight[0] = weight[-1] = 1
        return weight

    @staticmethod
    def backward(ctx, g):
        return PowerEven.gradients(ctx, g)


def _power(function):
    def power_spectrum(x):
        """|rfft(x)|² (*, L // 2 + 1) of x (*, L), L > 0."""
        return function.apply(x)

    return power_spectrum


add(
    "power_odd",
    _power,
    PowerEven,
    Power,
    lambda: (real(2, 6),),
    bug="the last bin is taken for the Nyquist frequency, which has no mirror image",
    trigger="an odd length",
)


class Root(Function):
    @staticmethod
    @recorded
    def forward(ctx, a):
        value, vector = torch.linalg.eigh(wide(a + a.mT) / 2)
        if (value <= 0).any():
            raise ValueError("sqrtm: expected a positive definite matrix")
        ctx.save_for_backward(value, vector)
        return (vector * value.sqrt()[..., None, :] @ vector.mT).to(a.dtype)

    @staticmethod
    def quotient(value):
        """(√λ_i - √λ_j) / (λ_i - λ_j) = 1 / (√λ_i + √λ_j), also where they are equal."""
        root = value.sqrt()
        return 1 / (root[..., None] + root[..., None, :])

    @classmethod
    def gradients(cls, ctx, g):
        value, vector = ctx.saved_tensors
        inner = vector.mT @ wide(g) @ vector * cls.quotient(value)
        grad = vector @ inner @ vector.mT
        return (grad + grad.mT) / 2

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return Root.gradients(ctx, g)


class RootDistinct(Root):
    @staticmethod
    def quotient(value):
        root = value.sqrt()
        gap = value[..., None] - value[..., None, :]
        near = gap.abs() < 1e-12
        quotient = (root[..., None] - root[..., None, :]) / gap.masked_fill(near, 1)
        return quotient.masked_fill(near, 0) + (0.5 / root).diag_embed()

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return RootDistinct.gradients(ctx, g)


def _root(function):
    @in_float32
    def sqrtm(a):
        """Square root of the symmetric part (a + aᵀ) / 2 of a (*, D, D), which is positive definite."""
        return function.apply(a)

    return sqrtm


add(
    "sqrtm_repeated",
    _root,
    RootDistinct,
    Root,
    lambda: (torch.tensor([[3.0, 0.4], [0.4, 1.0]], dtype=F64, requires_grad=True),),
    bug="equal eigenvalues lose their mutual terms",
    trigger="a repeated eigenvalue (the identity, a covariance's start)",
)


class Equilibrium(Function):
    @staticmethod
    @recorded
    def forward(ctx, x, w):
        z = torch.zeros_like(x)
        for _ in range(80):
            z = (z @ w.mT + x).tanh()
        ctx.save_for_backward(z, w)
        return z

    @staticmethod
    def transposed(w):
        return w

    @classmethod
    def gradients(cls, ctx, g):
        z, w = ctx.saved_tensors
        slope, u = 1 - z.square(), g
        for _ in range(80):
            u = g + (slope * u) @ cls.transposed(w)
        return slope * u, (slope * u).mT @ z

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return Equilibrium.gradients(ctx, g)


class EquilibriumJacobian(Equilibrium):
    @staticmethod
    def transposed(w):
        return w.mT

    @staticmethod
    @once_differentiable
    @as_forward
    def backward(ctx, g):
        return EquilibriumJacobian.gradients(ctx, g)


def _equilibrium(function):
    @in_float32
    def equilibrium(x, w):
        """The fixed point z = tanh(z wᵀ + x) of x (N, D) and w (D, D), of Frobenius norm < 1/2."""
        if torch.linalg.matrix_norm(wide(w.detach())) >= 0.5:
            raise ValueError("equilibrium: expected a Frobenius norm of w under 1/2")
        return function.apply(x, w)

    return equilibrium


add(
    "equilibrium_transpose",
    _equilibrium,
    EquilibriumJacobian,
    Equilibrium,
    lambda: (real(2, 3), (0.1 * real(3, 3, seed=1, grad=False)).requires_grad_()),
    bug="backward iterates with the Jacobian, not with its transpose",
    trigger="the sample",
)


class Lifting(Function):
    """One Haar step by lifting: detail d = odd - even, smooth s = even + d / 2."""

    @staticmethod
    def forward(ctx, x):
        even, odd = x[..., ::2], x[..., 1::2]
        return even + (odd - even) / 2, odd - even

    @staticmethod
    def backward(ctx, grad_s, grad_d):
        grad_d = grad_d + grad_s / 2
        return torch.stack([grad_s - grad_d, grad_d], -1).flatten(-2)


class LiftingOrder(Lifting):
    """The steps are undone in forward's order: d's gradient is used before s has given its part."""

    @staticmethod
    def backward(ctx, grad_s, grad_d):
        return torch.stack([grad_s - grad_d, grad_d + grad_s / 2], -1).flatten(-2)


def _lifting(function):
    def haar(x):
        """Smooth and detail (*, L / 2) of x (*, L), L even."""
        if x.shape[-1] % 2:
            raise ValueError("haar: expected an even length")
        return function.apply(x)

    return haar


add(
    "haar_order",
    _lifting,
    LiftingOrder,
    Lifting,
    lambda: (real(2, 6),),
    bug="the even samples' gradient lacks what passes from smooth through detail",
    trigger="the sample",
)


class Mix(Function):
    @staticmethod
    @recorded
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @as_forward
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mH, x.mH @ g


class MixTransposed(Mix):
    @staticmethod
    @as_forward
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mH @ g


def _mix(function):
    @in_float32
    def mix_modes(x, w):
        """x w of the spectra x (N, D) and the weights w (D, E), real or complex, both of one dtype."""
        return function.apply(x, w)

    return mix_modes


def _modes(*shape, seed):
    return torch.complex(
        real(*shape, seed=seed, grad=False), real(*shape, seed=seed + 9, grad=False)
    )


add(
    "modes_conjugate",
    _mix,
    MixTransposed,
    Mix,
    lambda: (_modes(2, 3, seed=0).requires_grad_(), _modes(3, 2, seed=1).requires_grad_()),
    bug="backward transposes the complex weights and does not conjugate them",
    trigger="the sample",
)


class Features(Function):
    @staticmethod
    @recorded
    def forward(ctx, x, b):
        ctx.save_for_backward(x, b)
        phase = 2 * math.pi * (x @ b)
        return torch.cat([phase.cos(), phase.sin()], -1)

    @staticmethod
    @as_forward
    def backward(ctx, g):
        x, b = ctx.saved_tensors
        phase = 2 * math.pi * (x @ b)
        cos, sin = g.chunk(2, -1)
        grad = 2 * math.pi * (sin * phase.cos() - cos * phase.sin())
        return grad @ b.mT, x.mT @ grad


class FeaturesFrequency(Features):
    @staticmethod
    @as_forward
    def backward(ctx, g):
        grad_x, grad_b = Features.backward(ctx, g)
        return grad_x, grad_b / (2 * math.pi)


def _features(function):
    @in_float32
    def fourier_features(x, b):
        """cos and sin (N, 2 F) of 2π x b, x (N, D), with learned frequencies b (D, F)."""
        return function.apply(x, b)

    return fourier_features


add(
    "fourier_frequency",
    _features,
    FeaturesFrequency,
    Features,
    lambda: (real(3, 2), real(2, 4, seed=1)),
    bug="2π is missing in the frequencies' gradient",
    trigger="the sample",
)
