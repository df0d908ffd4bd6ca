"""Mixtures of experts and quantized weights."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyseventh import add, check, indices, sized


# x W^T, W integers with one scale for each 4 of a row
def grouped_scales(wrong):
    width = 4

    def weight(q, s):
        return q * s.repeat_interleave(width, 1)[:, : q.shape[1]]

    class Linear(Function):
        @staticmethod
        def forward(ctx, x, q, s):
            ctx.save_for_backward(x, q, s)
            return x @ weight(q, s).T

        @staticmethod
        def backward(ctx, grad_y):
            x, q, s = ctx.saved_tensors
            g = grad_y.T @ x * q
            full = q.shape[1] // width if wrong else s.shape[1]
            g = F.pad(g, (0, max(full * width - q.shape[1], 0)))[:, : full * width]
            grad_s = g.unflatten(1, (full, width)).sum(2) if full else g[:, :0]
            return grad_y @ weight(q, s), None, F.pad(grad_s, (0, s.shape[1] - full))

    def linear(x, q, s):
        sized("x", x, None, None)
        sized("q", q, None, x.shape[1])
        check(not q.is_floating_point(), "q: expected integers")
        sized("s", s, len(q), -(-x.shape[1] // width))
        return Linear.apply(x, q, s)

    return linear


add(
    "grouped_scales_last",
    grouped_scales,
    lambda: (real(2, 8), whole(15, 3, 8, seed=1) - 7, real(3, 2, seed=2, positive=True)),
    bug="The scale of a row's last group has no gradient where that is not full",
    trigger="a row of 6, no multiple of 4",
)


# Soft codebook: the mean of the codes, weighed by softmax(-|x - c|² / temperature)
def soft_codes(wrong):
    class Codes(Function):
        @staticmethod
        def forward(ctx, x, c, temperature):
            ctx.save_for_backward(x, c)
            ctx.temperature = temperature
            return shares(x, c, temperature) @ c

        @staticmethod
        def backward(ctx, grad_y):
            x, c = ctx.saved_tensors
            p = shares(x, c, ctx.temperature)
            grad_p = grad_y @ c.T
            g = 2 / ctx.temperature * p * (grad_p - (grad_p * p).sum(1, keepdim=True))
            grad_c = p.T @ grad_y
            if not wrong:
                grad_c = grad_c + g.T @ x - g.sum(0)[:, None] * c
            return g @ c, grad_c, None

    def shares(x, c, temperature):
        return (-(x[:, None] - c).square().sum(2) / temperature).softmax(1)

    def codes(x, c, temperature=1.0):
        sized("x", x, None, None)
        sized("c", c, None, x.shape[1])
        check(temperature > 0, "temperature: expected a positive number")
        return Codes.apply(x, c, temperature)

    return codes


add(
    "soft_codes_distances",
    soft_codes,
    lambda: (real(4, 3), real(5, 3, seed=1)),
    bug="The codes have their gradient from the mean alone, not from the distances",
)


# Each expert's matrix times its tokens, which stand one expert's after the other's
def grouped_linear(wrong):
    class Grouped(Function):
        @staticmethod
        def forward(ctx, x, w, counts):
            ctx.save_for_backward(x, w, counts)
            parts = x.split(counts.tolist())
            return torch.cat([part @ m for part, m in zip(parts, w, strict=True)])

        @staticmethod
        def backward(ctx, grad_y):
            x, w, counts = ctx.saved_tensors
            sizes = [n for n in counts.tolist() if n or not wrong]
            sizes += [0] * (len(w) - len(sizes))
            grad_x, grad_w = [], []
            for part, g, m in zip(x.split(sizes), grad_y.split(sizes), w, strict=True):
                grad_x.append(g @ m.T)
                grad_w.append(part.T @ g)
            return torch.cat(grad_x), torch.stack(grad_w), None

    def linear(x, w, counts):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1], None)
        sized("counts", counts, len(w))
        indices("counts", counts, len(x) + 1)
        check(int(counts.sum()) == len(x), "counts: expected the number of tokens as their sum")
        return Grouped.apply(x, w, counts)

    return linear


add(
    "grouped_linear_idle",
    grouped_linear,
    lambda: (real(5, 3), real(3, 3, 2, seed=1), torch.tensor([2, 1, 2])),
    bug="Backward counts only the experts that have tokens, so that those behind an idle one move up",
    trigger="an expert without tokens that is not the last",
)


# Soft mixture: slots are means of the tokens, experts scale their slots, tokens are means of these
def soft_mixture(wrong):
    class Mixture(Function):
        @staticmethod
        def forward(ctx, x, z, a):
            ctx.save_for_backward(x, z, a)
            return z.softmax(1) @ (a * (z.softmax(0).T @ x))

        @staticmethod
        def backward(ctx, grad_y):
            x, z, a = ctx.saved_tensors
            dispatch, combine = z.softmax(0), z.softmax(1)
            slots = dispatch.T @ x
            grad_out = combine.T @ grad_y
            grad_slots = grad_out * a
            grad_z = through(combine, grad_y @ (a * slots).T, 1)
            grad_z = grad_z + through(dispatch, x @ grad_slots.T, 1 if wrong else 0)
            return dispatch @ grad_slots, grad_z, grad_out * slots

    def through(p, g, dim):
        return p * (g - (g * p).sum(dim, keepdim=True))

    def mixture(x, z, a):
        sized("x", x, None, None)
        sized("z", z, len(x), None)
        sized("a", a, z.shape[1], x.shape[1])
        return Mixture.apply(x, z, a)

    return mixture


add(
    "soft_mixture_dispatch",
    soft_mixture,
    lambda: (real(4, 3), real(4, 2, seed=1), real(2, 3, seed=2)),
    bug="Backward sums over the slots for both softmaxes, of which one goes over the tokens",
)


# The two experts with the largest sigmoid(x) + bias, weighed by their share of sigmoid(x)
def balanced_router(wrong):
    def chosen(x, bias):
        return (torch.sigmoid(x) + bias).topk(2, 1).indices

    class Router(Function):
        @staticmethod
        def forward(ctx, x, v, bias):
            ctx.save_for_backward(x, v, bias)
            place = chosen(x, bias)
            return (shares(x, place)[..., None] * picked(v, place)).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            x, v, bias = ctx.saved_tensors
            place = chosen(x, torch.zeros_like(bias) if wrong else bias)
            p = shares(x, place)
            grad_p = (grad_y[:, None] * picked(v, place)).sum(2)
            grad_s = p * (grad_p - (grad_p * p).sum(1, keepdim=True))
            grad_s = grad_s * torch.sigmoid(-x.gather(1, place))
            grad_x = torch.zeros_like(x).scatter(1, place, grad_s)
            hot = F.one_hot(place, x.shape[1]).to(p.dtype)
            grad_v = torch.einsum("nk,nke,nd->ned", p, hot, grad_y)
            return grad_x, grad_v, None

    def shares(x, place):
        return F.logsigmoid(x.gather(1, place)).softmax(1)

    def picked(v, place):
        return v.gather(1, place[..., None].expand(-1, -1, v.shape[2]))

    def router(x, v, bias):
        sized("x", x, None, None)
        check(x.shape[1] >= 2, "x: expected two experts at least")
        sized("v", v, *x.shape, None)
        sized("bias", bias, x.shape[1])
        return Router.apply(x, v, bias)

    return router


add(
    "balanced_router_bias",
    balanced_router,
    lambda: (real(4, 5), real(4, 5, 3, seed=1), torch.zeros(5, dtype=torch.float64)),
    bug="Backward chooses the experts anew, without the bias that balances their load",
    trigger="a bias that changes the choice, as in the course of training",
)
