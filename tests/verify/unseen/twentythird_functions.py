"""Sequences, particles, several outputs, complex numbers and keyword arguments."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentythird import add, add_bare, check, same, sized


# LSTM over T steps whose inputs are already projected to the four gates
def lstm(wrong):
    class Steps(Function):
        @staticmethod
        def forward(ctx, x, u, b):
            ctx.save_for_backward(x, u, b)
            return torch.stack([s[1] for s in run(x, u, b)])

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, u, b = ctx.saved_tensors
            steps = run(x, u, b)
            grad_x, grad_u, grad_b = (grad_y.new_zeros(t.shape) for t in (x, u, b))
            grad_h = grad_c = torch.zeros_like(grad_y[0])
            for t in reversed(range(len(x))):
                (i, f, g, o), _, c = steps[t]
                h_before = steps[t - 1][1] if t else torch.zeros_like(c)
                c_before = steps[t - 1][2] if t else torch.zeros_like(c)
                grad_h = grad_h + grad_y[t]
                grad_c = grad_c + grad_h * o * (1 - c.tanh() ** 2)
                parts = [
                    grad_c * g * i * (1 - i),
                    grad_c * (c if wrong else c_before) * f * (1 - f),
                    grad_c * i * (1 - g**2),
                    grad_h * c.tanh() * o * (1 - o),
                ]
                d = torch.cat(parts)
                grad_x[t] = d
                grad_u += torch.outer(d, h_before)
                grad_b += d
                grad_h, grad_c = d @ u, grad_c * f
            return grad_x, grad_u, grad_b

    def run(x, u, b):
        steps = []
        h = c = x.new_zeros(u.shape[1])
        for z in x:
            i, f, g, o = (z + u @ h + b).chunk(4)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c = f * c + i * g
            h = o * c.tanh()
            steps.append(((i, f, g, o), h, c))
        return steps

    def forward(x, u, b):
        check(u.ndim == 2 and u.shape[1] >= 1, "u: expected a matrix")
        sized("u", u, 4 * u.shape[1], None)
        sized("x", x, None, len(u))
        sized("b", b, len(u))
        return Steps.apply(x, u, b)

    return forward


add(
    "lstm_step",
    lstm,
    lambda: (real(3, 8), real(8, 2, seed=1), real(8, seed=2)),
    bug="The forget gate's gradient takes the cell after the step instead of the one before",
)


# Energy of particles in a periodic box: exp(-d^2) over all pairs, d to the nearest image
def box_energy(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, box):
            ctx.save_for_backward(x)
            ctx.box = box
            d = apart(x, box)
            return (-d.square().sum(2)).exp().triu(1).sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            d = apart(x, ctx.box)
            e = (-d.square().sum(2)).exp()
            e = e - e.diagonal().diag()
            d = x[:, None] - x if wrong else d
            return -2 * grad_y * (e[:, :, None] * d).sum(1), None

    def apart(x, box):
        d = x[:, None] - x
        return d - box * (d / box).round()

    def energy(x, box=12.0):
        sized("x", x, None, 3)
        check(box > 0, "box: expected a length > 0")
        check(bool((x.abs() < 1e6).all()), "x: expected places near the box")
        return Energy.apply(x, box)

    return energy


add(
    "box_energy_image",
    box_energy,
    lambda: (real(4, 3),),
    bug="The force is not along the way to the nearest image",
    trigger="two particles next to each other across the box's side",
)


# Hyperbolic sine and cosine
def sinh_cosh(wrong):
    class Both(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return x.sinh(), x.cosh()

        @staticmethod
        def backward(ctx, grad_s, grad_c):
            (x,) = ctx.saved_tensors
            if grad_s is None and (wrong or grad_c is None):
                return None
            grad_x = 0 if grad_s is None else grad_s * x.cosh()
            return grad_x if grad_c is None else grad_x + grad_c * x.sinh()

    return Both.apply


add(
    "sinh_cosh_unused",
    sinh_cosh,
    lambda: (real(3, 4),),
    bug="No gradient where the first output is not used",
    trigger="the second output alone",
)


# Queries and keys, each turned by angles that grow with the place
def rotary(wrong):
    class Rotary(Function):
        @staticmethod
        def forward(ctx, q, k):
            return turn(q, 1), turn(k, 1)

        @staticmethod
        def backward(ctx, grad_q, grad_k):
            if wrong:
                grad_q, grad_k = grad_k, grad_q
            return turn(grad_q, -1), turn(grad_k, -1)

    def turn(x, sign):
        half = x.shape[1] // 2
        places = torch.arange(len(x), dtype=F64, device=x.device)[:, None]
        speeds = 100.0 ** (-torch.arange(half, dtype=F64, device=x.device) / half)
        angle = places * speeds
        c, s = angle.cos().to(x), sign * angle.sin().to(x)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * c - b * s, a * s + b * c], 1)

    def rotate(q, k):
        sized("q", q, None, None)
        same(q, k)
        check(q.shape[1] % 2 == 0, "expected an even number of columns")
        return Rotary.apply(q, k)

    return rotate


add(
    "rotary_swapped",
    rotary,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Backward takes the keys' gradient for the queries'",
    trigger="grad_outputs that differ",
)


# Complex signals multiplied element by element
def mixer(wrong):
    class Mix(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            return (grad_y * b, grad_y * a) if wrong else (grad_y * b.conj(), grad_y * a.conj())

    def mix(a, b):
        same(a, b)
        if a.dtype != b.dtype:
            raise TypeError("expected tensors of one dtype")
        return Mix.apply(a, b)

    return mix


def complex_real(*shape, seed=0):
    return torch.complex(real(*shape, seed=seed), real(*shape, seed=seed + 7)).detach()


add_bare(
    "mixer_conjugate",
    mixer,
    lambda: (complex_real(3, 4).requires_grad_(), complex_real(3, 4, seed=1).requires_grad_()),
    bug="Backward forgets to conjugate",
)


# Circular convolution by the Fourier transform
def circular(wrong):
    class Convolve(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return convolve(a, b)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            return convolve(grad_y, mirrored(b)), convolve(grad_y, mirrored(a))

    def mirrored(a):
        back = a.flip(0).roll(1)
        return back if wrong else back.conj()

    def convolve(a, b):
        y = torch.fft.ifft(torch.fft.fft(a) * torch.fft.fft(b))
        return y if a.is_complex() else y.real

    def filtered(a, b):
        sized("a", a, None)
        same(a, b)
        if a.dtype != b.dtype:
            raise TypeError("expected tensors of one dtype")
        if a.dtype in (torch.float16, torch.bfloat16):
            return Convolve.apply(a.float(), b.float()).to(a.dtype)
        return Convolve.apply(a, b)

    return filtered


add_bare(
    "circular_conjugate",
    circular,
    lambda: (real(6), real(6, seed=1)),
    bug="Backward mirrors a filter without conjugating it",
    trigger="complex signals",
)


# Weighted squared error, the weights a keyword
def weighted_error(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, x, t, w):
            ctx.save_for_backward(x, t, w)
            return (w * (x - t).square()).mean()

        @staticmethod
        def backward(ctx, grad_y):
            x, t, w = ctx.saved_tensors
            scale = grad_y / x.numel()
            grad_x = 2 * scale * w * (x - t)
            grad_w = scale * (x - t).square()
            return grad_x, -grad_x, None if wrong else grad_w

    def loss(x, t, *, weight):
        check(x.numel() > 0, "expected a tensor that is not empty")
        same(x, t, weight)
        return Loss.apply(x, t, weight)

    return loss


add(
    "weighted_error_keyword",
    weighted_error,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    kwargs=lambda: {"weight": real(3, 4, seed=2, positive=True)},
    bug="The weights, a keyword argument, get no gradient",
    trigger="weights that require one",
)


# Causal attention, where the last query sees all keys
def causal_attention(wrong):
    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return weights(q, k, len(k) - len(q)) @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            p = weights(q, k, 0 if wrong else len(k) - len(q))
            grad_p = grad_y @ v.T
            grad_s = p * (grad_p - (grad_p * p).sum(1, keepdim=True)) * q.shape[1] ** -0.5
            return grad_s @ k, grad_s.T @ q, p.T @ grad_y

    def weights(q, k, shift):
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(shift)
        return (q @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(1)

    def attend(q, k, v):
        sized("q", q, None, None)
        sized("k", k, None, q.shape[1])
        sized("v", v, len(k), None)
        check(len(k) >= len(q), "k: expected as many keys as queries or more")
        finite = (q @ k.T).isfinite().all() & v.isfinite().all()
        check(bool(finite), "expected finite numbers and scores")
        return Attend.apply(q, k, v)

    return attend


add(
    "causal_attention_lengths",
    causal_attention,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 4, seed=2)),
    bug="Backward's mask starts at the first key, forward's ends at the last",
    trigger="more keys than queries",
)
