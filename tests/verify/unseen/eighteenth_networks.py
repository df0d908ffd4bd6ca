"""Networks."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.eighteenth import add


class RNN(Function):
    @staticmethod
    def states(x, w_xh, w_hh, b):
        h, states = torch.zeros_like(x[0] @ w_xh.mT), []
        for row in x:
            h = torch.tanh(row @ w_xh.mT + h @ w_hh.mT + b)
            states.append(h)
        return torch.stack(states)

    @staticmethod
    def forward(ctx, x, w_xh, w_hh, b):
        ctx.save_for_backward(x, w_xh, w_hh, b)
        return RNN.states(x, w_xh, w_hh, b)

    @staticmethod
    def gradients(ctx, g, passed):
        x, w_xh, w_hh, b = ctx.saved_tensors
        h = RNN.states(x, w_xh, w_hh, b)
        d, inner = torch.zeros_like(h[0]), []
        for t in reversed(range(len(x))):
            dt = (1 - h[t] * h[t]) * (g[t] + d)
            inner.insert(0, dt)
            d = passed * (dt @ w_hh)
        inner = torch.stack(inner)
        grad_hh = torch.einsum("tni,tnj->ij", inner[1:], h[:-1])
        return inner @ w_xh, torch.einsum("tni,tnj->ij", inner, x), grad_hh, inner.sum((0, 1))

    @staticmethod
    def backward(ctx, g):
        return RNN.gradients(ctx, g, 1)


class RNNStep(RNN):
    @staticmethod
    def backward(ctx, g):
        return RNN.gradients(ctx, g, 0)


def _rnn(function):
    def rnn(x, w_xh, w_hh, b):
        """States (T, N, H) of x (T, N, D), T > 0, by tanh(x w_xhᵀ + h w_hhᵀ + b) from 0."""
        return function.apply(x, w_xh, w_hh, b)

    return rnn


add(
    "rnn_step",
    _rnn,
    RNNStep,
    RNN,
    lambda: (real(4, 2, 3), real(3, 3, seed=1), real(3, 3, seed=2), real(3, seed=3)),
    bug="a state's gradient is not passed on to the state before it (qixianbiao/RNN#2)",
    trigger="the sample",
)


class ThreeLayers(Function):
    @staticmethod
    def layers(x, w1, b1, w2, b2, w3, b3):
        a1 = (w1 @ x + b1).relu()
        a2 = (w2 @ a1 + b2).relu()
        return a1, a2, (w3 @ a2 + b3).sigmoid()

    @staticmethod
    def forward(ctx, x, y, *weights):
        ctx.save_for_backward(x, y, *weights)
        a3 = ThreeLayers.layers(x, *weights)[2]
        return -(a3.log() * y + (1 - a3).log() * (1 - y)).sum() / x.shape[1]

    @staticmethod
    def gradients(ctx, g, of_w2, of_b1):
        x, y, w1, b1, w2, b2, w3, b3 = ctx.saved_tensors
        a1, a2, a3 = ThreeLayers.layers(x, w1, b1, w2, b2, w3, b3)
        m = x.shape[1]
        dz3 = (a3 - y) * g
        dz2 = (w3.mT @ dz3) * (a2 > 0)
        dz1 = (w2.mT @ dz2) * (a1 > 0)
        grads = []
        for dz, a, of_w, of_b in ((dz1, x, 1, of_b1), (dz2, a1, of_w2, 1), (dz3, a2, 1, 1)):
            grads += [of_w / m * dz @ a.mT, of_b / m * dz.sum(1, keepdim=True)]
        return None, None, *grads

    @staticmethod
    def backward(ctx, g):
        return ThreeLayers.gradients(ctx, g, 1, 1)


class ThreeLayersExercise(ThreeLayers):
    @staticmethod
    def backward(ctx, g):
        return ThreeLayers.gradients(ctx, g, 2, 4)


def _three_layers(function):
    def three_layers(x, y, w1, b1, w2, b2, w3, b3):
        """The mean cross entropy of two layers with relu and one with sigmoid, each w a + b with b (H, 1).

        x (D, M) and y (1, M), M > 0, are constant.
        """
        return function.apply(x, y, w1, b1, w2, b2, w3, b3)

    return three_layers


add(
    "three_layers_exercise",
    _three_layers,
    ThreeLayersExercise,
    ThreeLayers,
    lambda: (
        real(4, 3, grad=False),
        torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64),
        *[
            real(*shape, seed=i)
            for i, shape in enumerate(((5, 4), (5, 1), (3, 5), (3, 1), (1, 3), (1, 1)), 1)
        ],
    ),
    bug="w2's gradient is doubled, b1's multiplied by four (bighuang624/Andrew-Ng-Deep-Learning-notes#10)",
    trigger="the sample",
)


class Block(Function):
    @staticmethod
    def forward(ctx, x, w0, w1, w2):
        ctx.save_for_backward(x, w0, w1, w2)
        h = x + torch.tanh(x) @ w0
        return h + torch.tanh(h @ w1) @ w2

    @staticmethod
    def gradients(ctx, g, residual):
        x, w0, w1, w2 = ctx.saved_tensors
        inner = torch.tanh(x)
        h = x + inner @ w0
        a = torch.tanh(h @ w1)
        da = (g @ w2.mT) * (1 - a * a)
        dh = da @ w1.mT + residual * g
        dx = (dh @ w0.mT) * (1 - inner * inner) + residual * dh
        return dx, inner.mT @ dh, h.mT @ da, a.mT @ g

    @staticmethod
    def backward(ctx, g):
        return Block.gradients(ctx, g, 1)


class BlockOpen(Block):
    @staticmethod
    def backward(ctx, g):
        return Block.gradients(ctx, g, 0)


def _block(function):
    def block(x, w0, w1, w2):
        """h + tanh(h w1) w2 of h = x + tanh(x) w0, with x (N, D), w0 (D, D), w1 (D, H), w2 (H, D)."""
        return function.apply(x, w0, w1, w2)

    return block


add(
    "block_residual",
    _block,
    BlockOpen,
    Block,
    lambda: (real(3, 4), real(4, 4, seed=1), real(4, 5, seed=2), real(5, 4, seed=3)),
    bug="both residual additions are missing in backward (NVIDIA/Fuser#2922)",
    trigger="the sample",
)
