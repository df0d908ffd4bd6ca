"""The fifth set, part six: Fourier transforms, complex numbers, linear systems, quantisation, estimators."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.fifth import Kept, reported, wrong_pull


def complexes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex128, generator=generator).requires_grad_()


class Spectrum(Kept):
    """The half spectrum of a real row."""

    value = staticmethod(torch.fft.rfft)

    @staticmethod
    def pull(g, x):
        g = g.to(torch.complex128 if x.dtype == F64 else torch.complex64)
        n = x.shape[-1]
        wide = torch.cat([g, g.new_zeros(*g.shape[:-1], n - g.shape[-1])], -1)
        return (torch.fft.ifft(wide) * n).real


@wrong_pull(Spectrum, "irfft, which counts what is not at the ends twice")
def spectrum_twice(g, x):
    return torch.fft.irfft(g, n=x.shape[-1]) * x.shape[-1]


class Transform(Kept):
    value = staticmethod(torch.fft.fft)
    pull = staticmethod(lambda g, x: torch.fft.ifft(g, norm="forward"))


@wrong_pull(Transform, "conjugated before the inverse (pytorch_fft#4)", lambda: (complexes(3, 4),))
def transform_conjugate(g, x):
    return torch.fft.ifft(g.conj(), norm="forward")


@wrong_pull(Transform, "the inverse's own norm", lambda: (complexes(3, 4),))
def transform_norm(g, x):
    return torch.fft.ifft(g)


class Circular(Kept):
    """Circular convolution of rows of x with w, by way of Fourier."""

    @staticmethod
    def by_fourier(x, w, conjugate=False):
        a, b = torch.fft.rfft(x), torch.fft.rfft(w)
        return torch.fft.irfft(a * (b.conj() if conjugate else b), n=x.shape[-1])

    value = by_fourier

    @staticmethod
    def pull(g, x, w):
        grad_w = Circular.by_fourier(g, x, conjugate=True)
        return Circular.by_fourier(g, w, conjugate=True), grad_w.reshape(-1, w.shape[-1]).sum(0)


def circle():
    return real(3, 5), real(5, seed=1)


@wrong_pull(Circular, "convolved where a correlation is due, for the kernel", circle)
def circular_kernel(g, x, w):
    grad_w = Circular.by_fourier(g, x)
    return Circular.by_fourier(g, w, conjugate=True), grad_w.reshape(-1, w.shape[-1]).sum(0)


class Rotation(Kept):
    """x times the phase exp(i t)."""

    value = staticmethod(lambda x, t: x * torch.polar(torch.ones_like(t), t))

    @staticmethod
    def pull(g, x, t):
        e = torch.polar(torch.ones_like(t), t)
        return g * e.conj(), (g.conj() * 1j * x * e).real


def phases():
    return complexes(3, 4), real(3, 4, seed=1)


@wrong_pull(Rotation, "turned further, not back", phases)
def rotation_further(g, x, t):
    return g * torch.polar(torch.ones_like(t), t), Rotation.pull(g, x, t)[1]


@wrong_pull(Rotation, "the imaginary part for the angle's", phases)
def rotation_part(g, x, t):
    e = torch.polar(torch.ones_like(t), t)
    return g * e.conj(), (g.conj() * x * e).imag


class Power(Kept):
    """|z|²."""

    value = staticmethod(lambda z: z.real**2 + z.imag**2)
    pull = staticmethod(lambda g, z: 2 * g * z)


@wrong_pull(
    Power, "half of it: the Wirtinger derivative for the gradient", lambda: (complexes(3, 4),)
)
def power_wirtinger(g, z):
    return g * z


# ------------------------------------------------------------------------------------------------ linear systems
class Solved(Kept):
    """x of a x = b."""

    value = staticmethod(torch.linalg.solve)

    @staticmethod
    def pull(g, a, b):
        grad_b = torch.linalg.solve(a.mT, g)
        return -grad_b @ torch.linalg.solve(a, b).mT, grad_b


def system():
    a = real(3, 3, grad=False) + 3 * torch.eye(3, dtype=F64)
    return a.requires_grad_(), real(3, 2, seed=1)


@wrong_pull(Solved, "the system itself, not its transpose", system)
def solved_not_transposed(g, a, b):
    grad_b = torch.linalg.solve(a, g)
    return -grad_b @ torch.linalg.solve(a, b).mT, grad_b


@wrong_pull(Solved, "the right-hand side in the place of the solution", system)
def solved_right_hand(g, a, b):
    grad_b = torch.linalg.solve(a.mT, g)
    return -grad_b @ b.mT, grad_b


class Triangular(Kept):
    """x of tril(a) x = b."""

    value = staticmethod(lambda a, b: torch.linalg.solve_triangular(a.tril(), b, upper=False))

    @staticmethod
    def pull(g, a, b):
        grad_b = torch.linalg.solve_triangular(a.tril().mT, g, upper=True)
        return -(grad_b @ Triangular.value(a, b).mT).tril(), grad_b


@wrong_pull(Triangular, "a gradient above the diagonal", system)
def triangular_whole(g, a, b):
    grad_b = torch.linalg.solve_triangular(a.tril().mT, g, upper=True)
    return -grad_b @ Triangular.value(a, b).mT, grad_b


class Adapter(Kept):
    """x w + 2 x a b: a layer and its low-rank change."""

    value = staticmethod(lambda x, w, a, b: x @ w + 2 * (x @ a) @ b)

    @staticmethod
    def pull(g, x, w, a, b):
        return g @ w.mT + 2 * g @ b.mT @ a.mT, x.mT @ g, 2 * x.mT @ g @ b.mT, 2 * (x @ a).mT @ g


def adapter():
    return real(3, 4), real(4, 5, seed=1), real(4, 2, seed=2), real(2, 5, seed=3)


@wrong_pull(Adapter, "the scale applied twice", adapter)
def adapter_scale(g, x, w, a, b):
    grad_x, grad_w, grad_a, grad_b = Adapter.pull(g, x, w, a, b)
    return grad_x, grad_w, 2 * grad_a, grad_b


@wrong_pull(Adapter, "x's gradient through the layer alone", adapter)
def adapter_input(g, x, w, a, b):
    return g @ w.mT, *Adapter.pull(g, x, w, a, b)[1:]


# ------------------------------------------------------------------------------------------------ quantisation
class Rounded(Kept):
    """To the nearest eighth: flat wherever it is smooth."""

    value = staticmethod(lambda x: (8 * x).round() / 8)
    pull = staticmethod(lambda g, x: torch.zeros_like(x))


@wrong_pull(Rounded, "straight through: not the gradient of this function (oneflow#8649)")
def rounded_straight(g, x):
    return g


class Clipped(Kept):
    """The range of an int4 kept: x clamped to [-8, 7] steps of s."""

    value = staticmethod(lambda x, s: torch.minimum(torch.maximum(x, -8 * s), 7 * s))

    @staticmethod
    def pull(g, x, s):
        low, high = x < -8 * s, x > 7 * s
        grad_s = (g * torch.where(low, -8.0, torch.where(high, 7.0, 0.0)).to(x.dtype)).sum()
        return torch.where(low | high, 0, g), grad_s.reshape(s.shape)


def steps():
    return real(3, 4), torch.tensor(0.5, dtype=F64, requires_grad=True)


@wrong_pull(Clipped, "passes beyond the range; the sample is within (nni#3160)", steps)
def clipped_beyond(g, x, s):
    return g, Clipped.pull(g, x, s)[1]


@wrong_pull(Clipped, "the scale's gradient from x's, not from grad_output (pytorch#42034)", steps)
def clipped_scale(g, x, s):
    grad_x, _ = Clipped.pull(g, x, s)
    return grad_x, Clipped.pull(grad_x, x, s)[1]


class Balanced(Kept):
    """x as it is, in the company of a loss that it is not a function of."""

    value = staticmethod(lambda x, loss: x * 1)
    pull = staticmethod(lambda g, x, loss: (g, torch.zeros_like(loss)))


@wrong_pull(
    Balanced,
    "the loss gets a gradient of its own: not this function's (Automodel#1408)",
    lambda: (real(3, 4), real(1, seed=1)),
)
def balanced_scale(g, x, loss):
    return g, torch.full_like(loss, 0.01)


class Sinkhorn(Kept):
    """exp(s - logsumexp of rows), then columns made to sum to 1."""

    @staticmethod
    def value(s):
        p = s.softmax(-1)
        return p / p.sum(-2, keepdim=True)

    @staticmethod
    def pull(g, s, columns=1.0):
        p = s.softmax(-1)
        total = p.sum(-2, keepdim=True)
        d = (g - columns * (g * p / total).sum(-2, keepdim=True)) / total
        return p * (d - (d * p).sum(-1, keepdim=True))


@wrong_pull(Sinkhorn, "the sum over columns left out (CoLT5-attention#8)")
def sinkhorn_columns(g, s):
    return Sinkhorn.pull(g, s, columns=0.0)


class Dropped(Function):
    """Each row kept with probability one half, and doubled."""

    @staticmethod
    def forward(ctx, x):
        keep = (torch.rand(x.shape[:-1]) < 0.5).to(x.dtype)[..., None] * 2
        ctx.save_for_backward(keep)
        return x * keep

    @staticmethod
    def backward(ctx, g):
        (keep,) = ctx.saved_tensors
        return g * keep


@reported(Dropped, "the factor left out in backward", lambda: (real(6, 4),))
def dropped_factor(ctx, g):
    (keep,) = ctx.saved_tensors
    return g * keep / 2
