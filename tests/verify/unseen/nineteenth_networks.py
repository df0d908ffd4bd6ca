"""Small networks, differentiated by hand."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, given, sized, uniform


class Planar(Function):
    @staticmethod
    def layers(x, w1, b1, w2, b2):
        a1 = (w1 @ x + b1).tanh()
        return a1, w2 @ a1 + b2

    @staticmethod
    def forward(ctx, x, y, w1, b1, w2, b2):
        ctx.save_for_backward(x, y, w1, b1, w2, b2)
        _, z2 = Planar.layers(x, w1, b1, w2, b2)
        return (torch.nn.functional.softplus(z2) - y * z2).sum() / x.shape[1]

    @staticmethod
    def gradients(ctx, g, scale):
        x, y, w1, b1, w2, b2 = ctx.saved_tensors
        a1, z2 = Planar.layers(x, w1, b1, w2, b2)
        m = x.shape[1]
        dz2 = g * (z2.sigmoid() - y)
        dz1 = scale(w2.mT @ dz2 * (1 - a1.square()), m)
        dw1, db1 = dz1 @ x.mT / m, dz1.sum(1, keepdim=True) / m
        dw2, db2 = dz2 @ a1.mT / m, dz2.sum(1, keepdim=True) / m
        return w1.mT @ dz1 / m, -g * z2 / m, dw1, db1, dw2, db2

    @staticmethod
    def backward(ctx, g):
        return Planar.gradients(ctx, g, lambda dz, m: dz)


class PlanarTwice(Planar):
    @staticmethod
    def backward(ctx, g):
        return Planar.gradients(ctx, g, lambda dz, m: dz / m)


def _planar(function):
    def planar(x, y, w1, b1, w2, b2):
        """Mean cross-entropy of a network of x (D, M), M > 0, with labels y (1, M) from 0 to 1.

        One hidden layer of tanh, w1 (H, D) and b1 (H, 1), and a sigmoid, w2 (1, H) and b2 (1, 1).
        """
        sized("x", x, None, None)
        check(x.shape[1] > 0, "x: expected examples, got none")
        sized("y", y, 1, x.shape[1])
        check(bool(((y >= 0) & (y <= 1)).all()), "y: expected labels from 0 to 1")
        sized("w1", w1, None, x.shape[0])
        sized("b1", b1, w1.shape[0], 1)
        sized("w2", w2, 1, w1.shape[0])
        sized("b2", b2, 1, 1)
        return function.apply(x, y, w1, b1, w2, b2)

    return planar


add(
    "planar_mean",
    _planar,
    PlanarTwice,
    Planar,
    lambda: (
        real(2, 3, grad=False),
        given([[1.0, 0.0, 1.0]], grad=False),
        real(4, 2, seed=1),
        real(4, 1, seed=2),
        real(1, 4, seed=3),
        real(1, 1, seed=4),
    ),
    bug="dZ1 is divided by m, and so are dW1 and db1 (community.deeplearning.ai/t/63071)",
)


class TwoLayers(Function):
    @staticmethod
    def layers(x, theta1, b1, theta2, b2):
        h1 = (x @ theta1 + b1).sigmoid()
        return h1, (h1 @ theta2 + b2).sigmoid()

    @staticmethod
    def forward(ctx, x, y, theta1, b1, theta2, b2):
        ctx.save_for_backward(x, y, theta1, b1, theta2, b2)
        return 0.5 * (TwoLayers.layers(x, theta1, b1, theta2, b2)[1] - y).square().sum()

    @staticmethod
    def gradients(ctx, g, slope):
        x, y, theta1, b1, theta2, b2 = ctx.saved_tensors
        h1, h2 = TwoLayers.layers(x, theta1, b1, theta2, b2)
        dh2 = h2 - y
        dz2 = g * dh2 * slope(h2, dh2)
        dz1 = dz2 @ theta2.mT * h1 * (1 - h1)
        first = x.mT @ dz1, dz1.sum(0, keepdim=True)
        return dz1 @ theta1.mT, -g * dh2, *first, h1.mT @ dz2, dz2.sum(0, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return TwoLayers.gradients(ctx, g, lambda h, d: h * (1 - h))


class TwoLayersError(TwoLayers):
    @staticmethod
    def backward(ctx, g):
        return TwoLayers.gradients(ctx, g, lambda h, d: 1 - d)


def _two_layers(function):
    def two_layers(x, y, theta1, b1, theta2, b2):
        """Half the squared error of a network of two sigmoid layers, x (N, D) and y (N, C).

        theta1 (D, H), b1 (1, H), theta2 (H, C) and b2 (1, C).
        """
        sized("x", x, None, None)
        sized("theta1", theta1, x.shape[1], None)
        sized("b1", b1, 1, theta1.shape[1])
        sized("theta2", theta2, theta1.shape[1], None)
        sized("b2", b2, 1, theta2.shape[1])
        sized("y", y, x.shape[0], theta2.shape[1])
        return function.apply(x, y, theta1, b1, theta2, b2)

    return two_layers


add(
    "two_layers_slope",
    _two_layers,
    TwoLayersError,
    TwoLayers,
    lambda: (
        real(3, 2, grad=False),
        uniform(3, 2, seed=1, grad=False),
        real(2, 3, seed=2),
        real(1, 3, seed=3),
        real(3, 2, seed=4),
        real(1, 2, seed=5),
    ),
    bug="the last sigmoid's slope is taken of the error, dh2 (1 - dh2) (datascience.stackexchange.com/q/20139)",
)


class Chain(Function):
    @staticmethod
    def forward(ctx, x, y, w1, w2):
        ctx.save_for_backward(x, y, w1, w2)
        return (((x @ w1).sigmoid() @ w2).sigmoid() - y).square().sum()

    @staticmethod
    def gradients(ctx, g, cost):
        x, y, w1, w2 = ctx.saved_tensors
        a1 = (x @ w1).sigmoid()
        a2 = (a1 @ w2).sigmoid()
        slope, error = a2 * (1 - a2), 2 * (a2 - y)
        first = g * (slope * cost(error)) @ w2.mT * a1 * (1 - a1)
        exact = g * (slope * error) @ w2.mT * a1 * (1 - a1)
        return exact @ w1.mT, -g * error, x.mT @ first, g * a1.mT @ (slope * error)

    @staticmethod
    def backward(ctx, g):
        return Chain.gradients(ctx, g, lambda error: error)


class ChainCut(Chain):
    @staticmethod
    def backward(ctx, g):
        return Chain.gradients(ctx, g, torch.ones_like)


def _chain(function):
    def chain(x, y, w1, w2):
        """Squared error of σ(σ(x w1) w2) and y, of x (N, D), w1 (D, H), w2 (H, C) and y (N, C)."""
        sized("x", x, None, None)
        sized("w1", w1, x.shape[1], None)
        sized("w2", w2, w1.shape[1], None)
        sized("y", y, x.shape[0], w2.shape[1])
        return function.apply(x, y, w1, w2)

    return chain


add(
    "chain_cost",
    _chain,
    ChainCut,
    Chain,
    lambda: (
        real(3, 2, grad=False),
        uniform(3, 1, seed=1, grad=False),
        real(2, 4, seed=2),
        real(4, 1, seed=3),
    ),
    bug="the first layer's gradient is without that of the cost (math.techqa.club 4158072, 2-layer network)",
)


class FourLayers(Function):
    @staticmethod
    def forward(ctx, a, y, *weights):
        ctx.save_for_backward(a, y, *weights)
        for w in weights:
            a = (w @ a).sigmoid()
        return 0.5 * (a - y).square().sum()

    @staticmethod
    def gradients(ctx, g, sent):
        a, y, *weights = ctx.saved_tensors
        outputs = [a]
        for w in weights:
            outputs.append((w @ outputs[-1]).sigmoid())
        delta, grads = g * (outputs[-1] - y), []
        dy = -delta
        for w, before, after in zip(
            reversed(weights), outputs[-2::-1], outputs[:0:-1], strict=True
        ):
            tmp = delta * after * (1 - after)
            grads.insert(0, tmp @ before.mT)
            delta = w.mT @ sent(tmp, delta)
        return delta, dy, *grads

    @staticmethod
    def backward(ctx, g):
        return FourLayers.gradients(ctx, g, lambda tmp, delta: tmp)


class FourLayersDelta(FourLayers):
    @staticmethod
    def backward(ctx, g):
        return FourLayers.gradients(ctx, g, lambda tmp, delta: delta)


def _four_layers(function):
    def four_layers(a, y, w0, w1, w2):
        """Half the squared error of three sigmoid layers of columns a (D, N) and y (C, N).

        w0 (H, D), w1 (K, H) and w2 (C, K), without biases.
        """
        sized("a", a, None, None)
        sized("w0", w0, None, a.shape[0])
        sized("w1", w1, None, w0.shape[0])
        sized("w2", w2, None, w1.shape[0])
        sized("y", y, w2.shape[0], a.shape[1])
        return function.apply(a, y, w0, w1, w2)

    return four_layers


add(
    "four_layers_delta",
    _four_layers,
    FourLayersDelta,
    FourLayers,
    lambda: (
        uniform(4, 1, grad=False),
        uniform(2, 1, seed=1, grad=False),
        real(3, 4, seed=2),
        real(3, 3, seed=3),
        real(2, 3, seed=4),
    ),
    bug="the error goes back without the sigmoids' slopes (stackoverflow.com/q/53287032)",
)
