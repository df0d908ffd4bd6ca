"""More small networks: two units, one layer and a single path."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, given, same, sized, uniform


class Diamond(Function):
    @staticmethod
    def forward(ctx, x, w1, w2, w3, w4, w5):
        ctx.save_for_backward(x, w1, w2, w3, w4, w5)
        first = (x * w1 + 1).sigmoid()
        left, right = (first * w2 + 1).sigmoid(), (first * w3 + 1).sigmoid()
        return (left * w4 + right * w5 + 1).sigmoid()

    @staticmethod
    def gradients(ctx, g, weighted):
        x, w1, w2, w3, w4, w5 = ctx.saved_tensors
        first = (x * w1 + 1).sigmoid()
        left, right = (first * w2 + 1).sigmoid(), (first * w3 + 1).sigmoid()
        out = (left * w4 + right * w5 + 1).sigmoid()
        d = g * out * (1 - out)
        of_left, of_right = left * (1 - left), right * (1 - right)
        slope = first * (1 - first)
        both = d * slope * (of_left * w4 * w2 + of_right * w5 * w3)
        of_w1 = both * x if weighted else d * slope * (of_left + of_right) * x
        inner = d * w4 * of_left * first, d * w5 * of_right * first
        return both * w1, of_w1, *inner, d * left, d * right

    @staticmethod
    def backward(ctx, g):
        return Diamond.gradients(ctx, g, True)


class DiamondBare(Diamond):
    @staticmethod
    def backward(ctx, g):
        return Diamond.gradients(ctx, g, False)


def _diamond(function):
    def diamond(x, w1, w2, w3, w4, w5):
        """s(s(s(x w1 + 1) w2 + 1) w4 + s(s(x w1 + 1) w3 + 1) w5 + 1), s the sigmoid; all of one shape."""
        same(x, w1, w2, w3, w4, w5)
        return function.apply(x, w1, w2, w3, w4, w5)

    return diamond


add(
    "diamond_weights",
    _diamond,
    DiamondBare,
    Diamond,
    lambda: (given([1.0]), *(given([0.5]) for _ in range(5))),
    bug="w1's gradient is without w4 w2 and w5 w3 (Stack Exchange, Is my back propagation math correct?)",
)


class TwoUnits(Function):
    @staticmethod
    def units(x, w, alpha, beta):
        z = torch.stack((x @ alpha, x @ beta), 1).sigmoid()
        return z, (z @ w).sigmoid()

    @staticmethod
    def forward(ctx, x, y, w, alpha, beta):
        ctx.save_for_backward(x, y, w, alpha, beta)
        return (y - TwoUnits.units(x, w, alpha, beta)[1]).square().sum()

    @staticmethod
    def gradients(ctx, g, sign):
        x, y, w, alpha, beta = ctx.saved_tensors
        z, s = TwoUnits.units(x, w, alpha, beta)
        d = -2 * g * (y - s) * s * (1 - s)
        dz = d.unsqueeze(1) * w * z * (1 - z)
        dx = dz @ torch.stack((alpha, beta))
        return dx, 2 * g * (y - s), sign * (z.mT @ d), x.mT @ dz[:, 0], x.mT @ dz[:, 1]

    @staticmethod
    def backward(ctx, g):
        return TwoUnits.gradients(ctx, g, 1)


class TwoUnitsSign(TwoUnits):
    @staticmethod
    def backward(ctx, g):
        return TwoUnits.gradients(ctx, g, -1)


def _two_units(function):
    def two_units(x, y, w, alpha, beta):
        """Σ (y - σ(w · z))² of z = (σ(alpha · x), σ(beta · x)), x (N, D), y (N,), w (2,), alpha and beta (D,)."""
        sized("x", x, None, None)
        sized("y", y, x.shape[0])
        sized("w", w, 2)
        sized("alpha", alpha, x.shape[1])
        sized("beta", beta, x.shape[1])
        return function.apply(x, y, w, alpha, beta)

    return two_units


add(
    "two_units_sign",
    _two_units,
    TwoUnitsSign,
    TwoUnits,
    lambda: (
        real(4, 3, grad=False),
        uniform(4, seed=1, grad=False),
        real(2, seed=2),
        real(3, seed=3),
        real(3, seed=4),
    ),
    bug="the answer loses the minus of y - σ in w's gradient (math.techqa.club 4075404, gradient of 2-layer network)",
)


class Layer(Function):
    @staticmethod
    def forward(ctx, w, o):
        ctx.save_for_backward(w, o)
        return (w @ o).sigmoid()

    @staticmethod
    def gradients(ctx, g, slope):
        w, o = ctx.saved_tensors
        out = (w @ o).sigmoid()
        return g * slope(out) @ o.mT, w.mT @ (g * out * (1 - out))

    @staticmethod
    def backward(ctx, g):
        return Layer.gradients(ctx, g, lambda out: out * (1 - out))


class LayerTwice(Layer):
    @staticmethod
    def backward(ctx, g):
        return Layer.gradients(ctx, g, lambda out: out.sigmoid() * (1 - out.sigmoid()))


def _layer(function):
    def layer(w, o):
        """σ(w o), of w (K, J) and o (J, N)."""
        sized("w", w, None, None)
        sized("o", o, w.shape[1], None)
        return function.apply(w, o)

    return layer


add(
    "layer_sigmoid",
    _layer,
    LayerTwice,
    Layer,
    lambda: (real(2, 3), uniform(3, 1, seed=1)),
    bug="the slope takes the sigmoid of the output again (makeyourownneuralnetwork.blogspot.com, Errata 4, page 99)",
)


class ReluNet(Function):
    @staticmethod
    def forward(ctx, x, y, w1, b1, w2, b2):
        ctx.save_for_backward(x, y, w1, b1, w2, b2)
        return (((x @ w1 + b1).relu() @ w2 + b2)[:, 0] - y).square().sum() / x.shape[0]

    @staticmethod
    def gradients(ctx, g, of_w1):
        x, y, w1, b1, w2, b2 = ctx.saved_tensors
        z = x @ w1 + b1
        error = 2 * g * ((z.relu() @ w2 + b2)[:, 0] - y) / x.shape[0]
        dz = error.unsqueeze(1) * w2.mT * (z > 0)
        dw2 = z.relu().mT @ error.unsqueeze(1)
        return dz @ w1.mT, -error, of_w1(x, dz, error, w2), dz.sum(0), dw2, error.sum().view(1)

    @staticmethod
    def backward(ctx, g):
        return ReluNet.gradients(ctx, g, lambda x, dz, error, w2: x.mT @ dz)


class ReluNetSummed(ReluNet):
    """(error x w2) summed over the hidden units, the same for each of them."""

    @staticmethod
    def backward(ctx, g):
        def of_w1(x, dz, error, w2):
            each = error.unsqueeze(1) * (x.unsqueeze(0) * w2.unsqueeze(-1)).sum(0)
            return each.sum(0).unsqueeze(1).expand(-1, w2.shape[0])

        return ReluNet.gradients(ctx, g, of_w1)


def _relu_net(function):
    def relu_net(x, y, w1, b1, w2, b2):
        """Mean squared error of relu(x w1 + b1) w2 + b2 and y.

        x (N, D), N > 0, y (N,), w1 (D, H), b1 (H,), w2 (H, 1) and b2 (1,).
        """
        sized("x", x, None, None)
        check(x.shape[0] > 0, "x: expected samples, got none")
        sized("y", y, x.shape[0])
        sized("w1", w1, x.shape[1], None)
        sized("b1", b1, w1.shape[1])
        sized("w2", w2, w1.shape[1], 1)
        sized("b2", b2, 1)
        return function.apply(x, y, w1, b1, w2, b2)

    return relu_net


add(
    "relu_net_hidden",
    _relu_net,
    ReluNetSummed,
    ReluNet,
    lambda: (
        real(5, 3, grad=False),
        real(5, seed=1, grad=False),
        real(3, 4, seed=2),
        real(4, seed=3),
        real(4, 1, seed=4),
        real(1, seed=5),
    ),
    bug="w1's gradient is summed over the hidden units and has no relu (forums.fast.ai/t/107030)",
)
