"""Recurrent layers, in stacks and alone."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class TwoWays(Function):
    """A stack of layers; in each, h = tanh(x w + u h) runs along the sequence and against it."""

    @staticmethod
    def run(x, w, u):
        h, out = torch.zeros_like(x[0] @ w), []
        for step in x:
            h = (step @ w + u * h).tanh()
            out.append(h)
        return torch.stack(out)

    @staticmethod
    def run_back(g, x, w, u, h):
        """The gradients of x, w and u; h are the states of run."""
        carry, total_u, parts = torch.zeros_like(h[0]), torch.zeros_like(u), []
        before = torch.cat((torch.zeros_like(h[:1]), h[:-1]))
        for t in range(len(x) - 1, -1, -1):
            d = (g[t] + carry) * (1 - h[t] ** 2)
            total_u = total_u + (d * before[t]).sum(0)
            carry = d * u
            parts.append(d)
        d = torch.stack(parts[::-1])
        return d @ w.mT, torch.einsum("tnd,tnh->dh", x, d), total_u

    @staticmethod
    def layer(x, w, u):
        return TwoWays.run(x, w[0], u[0]), TwoWays.run(x.flip(0), w[1], u[1]).flip(0)

    @staticmethod
    def forward(ctx, x, w, u):
        ctx.save_for_backward(x, w, u)
        for layer in range(len(w)):
            x = torch.cat(TwoWays.layer(x, w[layer], u[layer]), -1)
        return x

    @staticmethod
    def gradients(ctx, g, dy_again):
        """dy_again: what the second direction reads as the layer's gradient, after the first wrote its dx."""
        x, w, u = ctx.saved_tensors
        inputs = [x]
        for layer in range(len(w) - 1):
            inputs.append(torch.cat(TwoWays.layer(inputs[-1], w[layer], u[layer]), -1))
        grad_w, grad_u = torch.zeros_like(w), torch.zeros_like(u)
        size = w.shape[-1]
        for i in range(len(w) - 1, -1, -1):
            ahead, back = TwoWays.layer(inputs[i], w[i], u[i])
            dx, grad_w[i, 0], grad_u[i, 0] = TwoWays.run_back(
                g[..., :size], inputs[i], w[i, 0], u[i, 0], ahead
            )
            g = dy_again(i, g, dx)
            other, grad_w[i, 1], grad_u[i, 1] = TwoWays.run_back(
                g[..., size:].flip(0), inputs[i].flip(0), w[i, 1], u[i, 1], back.flip(0)
            )
            g = dx + other.flip(0)
        return g, grad_w, grad_u

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return TwoWays.gradients(ctx, g, lambda i, g, dx: g)


class TwoWaysBuffer(TwoWays):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        last = len(ctx.saved_tensors[1]) - 1
        return TwoWays.gradients(ctx, g, lambda i, g, dx: dx if 0 < i < last else g)


def _two_ways(function):
    def two_ways(x, w, u):
        """A stack of L > 0 two-way recurrent layers: (T, N, 2 H) to (T, N, 2 H), T > 0.

        w (L, 2, 2 H, H) are their input weights, u (L, 2, H) their recurrent ones, of both directions; the states
        start at 0.
        """
        require(x.dim() == 3 and x.shape[0] > 0, "x must be (T, N, 2 H), T > 0")
        good = w.dim() == 4 and w.shape[0] > 0 and w.shape[1:3] == (2, x.shape[2])
        require(good and x.shape[2] == 2 * w.shape[3], "w must be (L, 2, 2 H, H), L > 0")
        require(u.shape == (w.shape[0], 2, w.shape[3]), "u must be (L, 2, H)")
        return function.apply(x, w, u)

    return two_ways


add(
    "two_ways_buffer",
    _two_ways,
    TwoWaysBuffer,
    TwoWays,
    lambda: (real(3, 2, 4), real(2, 2, 4, 2, seed=1), real(2, 2, 2, seed=2)),
    bug="dx overwrites dy before the second direction has read it, in the middle (apache/mxnet#18203)",
    trigger="three layers or more",
)


class GatedStack(Function):
    """Layers of h = h + z (c - h), with the gate z and the candidate c made of the layer's input."""

    @staticmethod
    def gates(x, w):
        z, c = (x @ w).chunk(2, -1)
        return z.sigmoid(), c.tanh()

    @staticmethod
    def run(x, w):
        z, c = GatedStack.gates(x, w)
        h, out = torch.zeros_like(z[0]), []
        for gate, new in zip(z, c, strict=True):
            h = h + gate * (new - h)
            out.append(h)
        return torch.stack(out)

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        for weight in w:
            x = GatedStack.run(x, weight)
        return x

    @staticmethod
    def gradients(ctx, g, source):
        """source: of a layer, what its weight's gradient takes for its input."""
        x, w = ctx.saved_tensors
        values = [x]
        for weight in w:
            values.append(GatedStack.run(values[-1], weight))
        total = torch.zeros_like(w)
        for i in range(len(w) - 1, -1, -1):
            z, c = GatedStack.gates(values[i], w[i])
            before = torch.cat((torch.zeros_like(z[:1]), values[i + 1][:-1]))
            carry, parts = torch.zeros_like(z[0]), []
            for t in range(len(z) - 1, -1, -1):
                d = g[t] + carry
                dz = d * (c[t] - before[t]) * z[t] * (1 - z[t])
                parts.append(torch.cat((dz, d * z[t] * (1 - c[t] ** 2)), -1))
                carry = d * (1 - z[t])
            d = torch.stack(parts[::-1])
            total[i] = torch.einsum("tnd,tnh->dh", values[source(i)], d)
            g = d @ w[i].mT
        return g, total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return GatedStack.gradients(ctx, g, lambda i: i)


class GatedStackPointer(GatedStack):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        last = len(ctx.saved_tensors[1]) - 1
        return GatedStack.gradients(ctx, g, lambda i: i + 1 if 0 < i < last else i)


def _gated_stack(function):
    def gated_stack(x, w):
        """A stack of L > 0 gated recurrent layers on x (T, N, D), T > 0; w is (L, D, 2 D), gate and candidate."""
        require(x.dim() == 3 and x.shape[0] > 0, "x must be (T, N, D), T > 0")
        size = x.shape[2]
        require(
            w.dim() == 3 and w.shape[0] > 0 and w.shape[1:] == (size, 2 * size), "w: (L, D, 2 D)"
        )
        return function.apply(x, w)

    return gated_stack


add(
    "gated_stack_pointer",
    _gated_stack,
    GatedStackPointer,
    GatedStack,
    lambda: (real(4, 2, 3), real(2, 3, 6, seed=1)),
    bug="the weights of the layers in the middle get their output for input (apache/mxnet#18203)",
    trigger="three layers or more",
)


class Lstm(Function):
    @staticmethod
    def step(x, h, c, w, u):
        i, f, o, new = (x @ w + h @ u).chunk(4, -1)
        i, f, o, new = i.sigmoid(), f.sigmoid(), o.sigmoid(), new.tanh()
        return i, f, o, new, f * c + i * new

    @staticmethod
    def forward(ctx, x, w, u):
        ctx.save_for_backward(x, w, u)
        h = c = x.new_zeros(x.shape[1], u.shape[0])
        out = []
        for step in x:
            _, _, o, _, c = Lstm.step(step, h, c, w, u)
            h = o * c.tanh()
            out.append(h)
        return torch.stack(out)

    @staticmethod
    def gradients(ctx, g, recurrent):
        x, w, u = ctx.saved_tensors
        h = c = x.new_zeros(x.shape[1], u.shape[0])
        kept = []
        for step in x:
            i, f, o, new, after = Lstm.step(step, h, c, w, u)
            kept.append((h, c, i, f, o, new, after.tanh()))
            h, c = o * after.tanh(), after
        grad_w, grad_u, dh, dc = torch.zeros_like(w), torch.zeros_like(u), 0, 0
        parts = []
        for t in range(len(x) - 1, -1, -1):
            h, c, i, f, o, new, bent = kept[t]
            d = g[t] + dh
            dc = dc + d * o * (1 - bent**2)
            gates = (
                dc * new * i * (1 - i),
                dc * c * f * (1 - f),
                d * bent * o * (1 - o),
                dc * i * (1 - new**2),
            )
            d = torch.cat(gates, -1)
            grad_w, grad_u = grad_w + x[t].mT @ d, grad_u + h.mT @ d
            parts.append(d @ w.mT)
            dh, dc = recurrent(d @ u.mT), dc * f
        return torch.stack(parts[::-1]), grad_w, grad_u

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Lstm.gradients(ctx, g, lambda dh: dh)


class LstmCut(Lstm):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return Lstm.gradients(ctx, g, torch.zeros_like)


def _lstm(function):
    def lstm(x, w, u):
        """The states (T, N, H) of an LSTM on x (T, N, D), T > 0, that start at 0; w is (D, 4 H), u (H, 4 H).

        The gates stand in the order input, forget, output, candidate.
        """
        require(x.dim() == 3 and x.shape[0] > 0, "x must be (T, N, D), T > 0")
        good = u.dim() == 2 and u.shape[1] == 4 * u.shape[0] and w.shape == (x.shape[2], u.shape[1])
        require(good, "w must be (D, 4 H), u (H, 4 H)")
        return function.apply(x, w, u)

    return lstm


add(
    "lstm_recurrent_cut",
    _lstm,
    LstmCut,
    Lstm,
    lambda: (real(3, 2, 3), real(3, 8, seed=1), real(2, 8, seed=2)),
    bug="the gradient that goes back through the hidden state is set to 0 (ooples/AiDotNet#722)",
    trigger="the sample (two steps or more)",
)
