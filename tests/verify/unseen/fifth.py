"""The fifth set: functions that people write kernels for, with the faults that public projects report. Part one: norms,
rotations, gates, attention."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import FIFTH, pair, real

X = lambda: (real(3, 4),)  # noqa: E731


def reported(right, bug, make=X, **more):
    """Make of a backward a wrong Function with the forward of ``right``, and add both to the set."""

    def add(backward):
        wrong = type(backward.__name__, (right,), {"backward": staticmethod(backward)})
        pair(f"{backward.__name__}_5", wrong.apply, right.apply, make, bug, into=FIFTH, **more)
        return wrong

    return add


class Kept(Function):
    """A Function that saves its tensors; subclasses say ``value`` and ``pull(g, *inputs)``."""

    @classmethod
    def forward(cls, ctx, *inputs):
        ctx.save_for_backward(*(t for t in inputs if torch.is_tensor(t)))
        ctx.others = [t for t in inputs if not torch.is_tensor(t)]
        return cls.value(*inputs)

    @classmethod
    def backward(cls, ctx, *g):
        given = ctx.saved_tensors
        wide = [t.to(given[0].dtype) if t.is_floating_point() else t for t in g]
        grads = cls.pull(*wide, *given, *ctx.others)
        grads = grads if isinstance(grads, tuple) else (grads,)
        return *grads, *[None] * (len(given) + len(ctx.others) - len(grads))


def wrong_pull(right, bug, make=X, **more):
    """As :func:`reported`, for a Kept: of another ``pull``."""

    def add(pull):
        wrong = type(pull.__name__, (right,), {"pull": staticmethod(pull)})
        pair(f"{pull.__name__}_5", wrong.apply, right.apply, make, bug, into=FIFTH, **more)
        return wrong

    return add


# ------------------------------------------------------------------------------------------------ normalisations
def normed(x, eps=1e-5):
    c = x - x.mean(-1, keepdim=True)
    r = (c.square().mean(-1, keepdim=True) + eps).rsqrt()
    return c * r, r


class LayerNorm(Kept):
    value = staticmethod(lambda x, w, b: normed(x)[0] * w + b)

    @staticmethod
    def pull(g, x, w, b):
        h, r = normed(x)
        d = g * w
        grad = r * (d - d.mean(-1, keepdim=True) - h * (d * h).mean(-1, keepdim=True))
        rows = tuple(range(x.dim() - 1))
        return grad, (g * h).sum(rows), g.sum(rows)


def affine():
    return real(3, 4), real(4, seed=1), real(4, seed=2)


@wrong_pull(
    LayerNorm, "backward takes the first dimension as the only rows (FlagGems#5392)", affine
)
def layer_norm_rows(g, x, w, b):
    h, r = normed(x)
    d = g * w
    one, two = ((t.reshape(len(x), -1).mean(-1)) for t in (d, d * h))
    shape = (-1, *[1] * (x.dim() - 1))
    rows = tuple(range(x.dim() - 1))
    return r * (d - one.view(shape) - h * two.view(shape)), (g * h).sum(rows), g.sum(rows)


class LayerNormOutput(Function):
    """Keeps the output too; a wrong backward takes x̂ back from it: (y - b) / w."""

    @staticmethod
    def forward(ctx, x, w, b):
        y = normed(x)[0] * w + b
        ctx.save_for_backward(y, w, b, x)
        return y

    @staticmethod
    def back(ctx, g, index):
        y, w, b, x = ctx.saved_tensors
        g = g.to(y.dtype)
        r = normed(x)[1]
        h = (y - b[index(y)]) / w[index(y)]
        d = g * w
        grad = r * (d - d.mean(-1, keepdim=True) - h * (d * h).mean(-1, keepdim=True))
        rows = tuple(range(y.dim() - 1))
        return grad, (g * h).sum(rows), g.sum(rows)

    @staticmethod
    def backward(ctx, g):
        _, w, b, x = ctx.saved_tensors
        return LayerNorm.pull(g.to(x.dtype), x, w, b)


@reported(LayerNormOutput, "w and b read at the row's index (DeepSpeed#692)", affine)
def layer_norm_output_index(ctx, g):
    y = ctx.saved_tensors[0]
    n = y.shape[-1]
    rows = torch.arange(y.numel() // n) % n
    return LayerNormOutput.back(ctx, g, lambda y: rows.view(*y.shape[:-1], 1).expand(y.shape))


GROUP = 4


def grouped(x, w, eps=1e-6):
    parts = x.unflatten(-1, (-1, GROUP))
    r = (parts.square().mean(-1, keepdim=True) + eps).rsqrt()
    return parts, r, w.unflatten(0, (-1, GROUP))


class GroupRMS(Kept):
    """RMS norm over groups of four features."""

    @staticmethod
    def value(x, w):
        parts, r, v = grouped(x, w)
        return (parts * r * v).flatten(-2)

    @staticmethod
    def pull(g, x, w, over=-1):
        parts, r, v = grouped(x, w)
        h, d = parts * r, g.unflatten(-1, (-1, GROUP))
        mean = (d * v * h).mean(over, keepdim=True)
        rows = tuple(range(x.dim() - 1))
        return (r * (d * v - h * mean)).flatten(-2), (d * h).flatten(-2).sum(rows)


def groups():
    return real(3, 8), real(8, seed=1)


@wrong_pull(GroupRMS, "the group in backward is the whole row (mamba#547)", groups)
def group_rms_whole(g, x, w):
    return GroupRMS.pull(g, x, w, over=(-2, -1))


class GroupNormed(Kept):
    """Group norm of (N, C, L) in two groups, times a weight per channel."""

    @staticmethod
    def parts(x):
        h, r = normed(x.unflatten(1, (2, -1)).flatten(2))
        return h.view(x.shape), r

    @staticmethod
    def value(x, w):
        return GroupNormed.parts(x)[0] * w[:, None]

    @staticmethod
    def pull(g, x, w):
        h, r = GroupNormed.parts(x)
        d, k = ((t.unflatten(1, (2, -1)).flatten(2)) for t in (g * w[:, None], h))
        grad = r * (d - d.mean(-1, keepdim=True) - k * (d * k).mean(-1, keepdim=True))
        return grad.view(x.shape), (g * h).sum((0, 2))


def channels():
    return real(2, 4, 3), real(4, seed=1)


@wrong_pull(GroupNormed, "the weight's gradient reads the group c % G (tt-metal#56202)", channels)
def group_norm_modulo(g, x, w):
    grad = GroupNormed.pull(g, x, w)[0]
    parts = x.unflatten(1, (2, -1))
    mean = parts.mean((2, 3))
    r = (parts.var((2, 3), unbiased=False) + 1e-5).rsqrt()
    of = torch.arange(x.shape[1]) % 2
    return grad, (g * (x - mean[:, of, None]) * r[:, of, None]).sum((0, 2))


# ------------------------------------------------------------------------------------------------ rotations
def turned(x, sign, axis=1):
    """Rotate pairs of features of x (N, L, H, D), by the angle of their place along ``axis``."""
    half = x.shape[-1] // 2
    t = torch.arange(x.shape[axis], dtype=x.dtype)[:, None] / 3.0 ** torch.arange(half)
    t = t[:, None] if axis == 1 else t
    a, b = x[..., 0::2], x[..., 1::2]
    c, s = t.cos().to(x.dtype), sign * t.sin().to(x.dtype)
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


class Rotary(Kept):
    value = staticmethod(lambda x: turned(x, 1))
    pull = staticmethod(lambda g, x: turned(g, -1))


def heads():
    return (real(2, 3, 3, 4),)


@wrong_pull(Rotary, "rotated the same way: conjugate misspelled (flash-attention#569)", heads)
def rotary_not_back(g, x):
    return turned(g, 1)


@wrong_pull(Rotary, "the angle by the head, of which there are as many (DeepSpeed#8052)", heads)
def rotary_axis(g, x):
    return turned(g, -1, axis=2)


@wrong_pull(Rotary, "halves instead of pairs", heads)
def rotary_halves(g, x):
    half = x.shape[-1] // 2
    swapped = torch.stack([g[..., :half], g[..., half:]], -1).flatten(-2)
    back = turned(swapped, -1)
    return torch.cat([back[..., 0::2], back[..., 1::2]], -1)


# ------------------------------------------------------------------------------------------------ gates
class SwiGLU(Kept):
    value = staticmethod(lambda a, b: a * a.sigmoid() * b)

    @staticmethod
    def pull(g, a, b):
        s = a.sigmoid()
        return g * b * s * (1 + a * (1 - s)), g * a * s


def gates():
    return real(3, 4), real(3, 4, seed=1)


@wrong_pull(SwiGLU, "results stored in each other's buffer (unsloth#3314)", gates)
def swiglu_buffers(g, a, b):
    grad_a, grad_b = SwiGLU.pull(g, a, b)
    return grad_b, grad_a


@wrong_pull(SwiGLU, "every row's gradient stored in row 0 (Triton-distributed#180)", gates)
def swiglu_row_0(g, a, b):
    grad_a, grad_b = SwiGLU.pull(g, a, b)
    return torch.cat([grad_a[-1:], torch.zeros_like(grad_a[1:])]), grad_b


ROOT = math.sqrt(2 / math.pi)


class GELUTanh(Kept):
    value = staticmethod(lambda x: 0.5 * x * (1 + (ROOT * (x + 0.044715 * x**3)).tanh()))

    @staticmethod
    def pull(g, x):
        t = (ROOT * (x + 0.044715 * x**3)).tanh()
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * ROOT * (1 + 0.134145 * x * x))


@wrong_pull(GELUTanh, "the derivative of the exact gelu")
def gelu_exact(g, x):
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return g * (0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density)


class GatedMLP(Kept):
    """tanh(x u) (x v), element by element."""

    value = staticmethod(lambda x, u, v: (x @ u).tanh() * (x @ v))

    @staticmethod
    def pull(g, x, u, v):
        t, up = (x @ u).tanh(), x @ v
        gate, rise = g * up * (1 - t * t), g * t
        return gate @ u.mT + rise @ v.mT, x.mT @ gate, x.mT @ rise


def mlp():
    return real(3, 4), real(4, 5, seed=1), real(4, 5, seed=2)


@wrong_pull(GatedMLP, "one of two products lost from the accumulator (Liger-Kernel#1413)", mlp)
def gated_mlp_half(g, x, u, v):
    _, grad_u, grad_v = GatedMLP.pull(g, x, u, v)
    return (g * (x @ v) * (1 - (x @ u).tanh() ** 2)) @ u.mT, grad_u, grad_v
