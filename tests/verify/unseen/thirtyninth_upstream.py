"""What arrives from above: two outputs, one of them unused, large and uneven grad_outputs."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyninth import add, alike, bounded, check, same, sized


# Haldane's law: the rate s / n and the inhibited share (s^2 / ki) / n, n = k + s + s^2 / ki
def haldane(wrong):
    class Haldane(Function):
        @staticmethod
        def forward(ctx, s, k, ki):
            ctx.save_for_backward(s, k, ki)
            q = s.square() / ki
            return s / (k + s + q), q / (k + s + q)

        @staticmethod
        def backward(ctx, rate, share):
            s, k, ki = ctx.saved_tensors
            q = s.square() / ki
            n = k + s + q
            first = rate * (k - q) / n.square()
            second = share * (s / ki) * (2 * k + s) / n.square()
            by_s = torch.where(share != 0, second, first) if wrong else first + second
            by_k = -(rate * s + share * q) / n.square()
            by_ki = (rate * s - share * (k + s)) * q / ki / n.square()
            return by_s, by_k, by_ki

    def law(s, k, ki):
        same(s, k, ki)
        alike(s, k, ki)
        for name, t in {"s": s, "k": k, "ki": ki}.items():
            bounded(name, t, 1e-2, 1e3)
        return Haldane.apply(s, k, ki)

    return law


add(
    "haldane_both",
    haldane,
    lambda: tuple(real(5, seed=s, positive=True) for s in (0, 1, 2)),
    bug="The share's gradient takes the place of the rate's instead of being added",
    trigger="both outputs used together",
)


# Squared errors of a signal (T) smoothed by non-local means, weights exp(-(x_i - x_j)^2 / h^2)
def smoothed_errors(wrong):
    def smooth(x, h):
        a = (-((x[:, None] - x) / h).square()).softmax(1)
        return a, a @ x

    class Errors(Function):
        @staticmethod
        def forward(ctx, x, target, h, reduction):
            ctx.save_for_backward(x, target)
            ctx.settings = h, reduction
            e = (smooth(x, h)[1] - target).square()
            return e if reduction == "none" else e.sum()

        @staticmethod
        def backward(ctx, g):
            x, target = ctx.saved_tensors
            h, reduction = ctx.settings
            if wrong and reduction == "none":
                g = g.mean()
            a, y = smooth(x, h)
            gy = 2 * g * (y - target)
            s = a * gy[:, None] * (x - y[:, None]) * (x[:, None] - x) * (2 / h**2)
            return gy @ a + s.sum(0) - s.sum(1), -gy, None, None

    def errors(x, target, h=1.0, reduction="none"):
        sized("x", x, None)
        same(x, target)
        alike(x, target)
        check(0.1 <= h <= 100, "h: expected a number from 0.1 to 100")
        check(reduction in ("none", "sum"), "reduction: expected 'none' or 'sum'")
        bounded("x", x, -100, 100)
        bounded("target", target, -100, 100)
        return Errors.apply(x, target, h, reduction)

    return errors


add(
    "smoothed_errors_none",
    smoothed_errors,
    lambda: (real(6), real(6, seed=1)),
    bug="Without reduction backward averages grad_output over the elements",
    trigger="a grad_output that isn't constant",
)


# Squeeze and excitation of x (B, C, T), which returns the gate as well
def excited(wrong):
    def gated(x, w1, w2):
        s = x.mean(2)
        h = (s @ w1.mT).tanh()
        return s, h, (h @ w2.mT).sigmoid()

    class Excited(Function):
        @staticmethod
        def forward(ctx, x, w1, w2):
            ctx.save_for_backward(x, w1, w2)
            ctx.set_materialize_grads(False)
            gate = gated(x, w1, w2)[2]
            return x * gate[:, :, None], gate

        @staticmethod
        def backward(ctx, gy, gg):
            if (gy is None and gg is None) or (wrong and gy is None):
                return None, None, None
            x, w1, w2 = ctx.saved_tensors
            s, h, gate = gated(x, w1, w2)
            gg = torch.zeros_like(gate) if gg is None else gg
            direct = torch.zeros_like(x) if gy is None else gy * gate[:, :, None]
            gg = gg if gy is None else gg + (gy * x).sum(2)
            a = gg * gate * (1 - gate)
            b = (a @ w2) * (1 - h.square())
            back = (b @ w1)[:, :, None] / x.shape[2]
            return direct + back, b.mT @ s, a.mT @ h

    def excite(x, w1, w2):
        sized("x", x, None, None, None)
        sized("w1", w1, None, x.shape[1])
        sized("w2", w2, x.shape[1], len(w1))
        alike(x, w1, w2)
        for name, t in {"x": x, "w1": w1, "w2": w2}.items():
            bounded(name, t, -100, 100)
        return Excited.apply(x, w1, w2)

    return excite


add(
    "excited_gate_alone",
    excited,
    lambda: (real(2, 3, 4), real(2, 3, seed=1), real(3, 2, seed=2)),
    bug="Backward returns nothing where the first output has no gradient",
    trigger="a loss of the gate alone",
)


# Bhattacharyya's distance of two normal densities, from means and logarithms of variances
def bhattacharyya(wrong):
    class Distance(Function):
        @staticmethod
        def forward(ctx, m1, v1, m2, v2):
            ctx.save_for_backward(m1, v1, m2, v2)
            total = torch.logaddexp(v1, v2)
            half = (total - (v1 + v2) / 2 - torch.log(torch.full_like(v1, 2))) / 2
            return (m1 - m2).square() * (-total).exp() / 4 + half

        @staticmethod
        def backward(ctx, g):
            m1, v1, m2, v2 = ctx.saved_tensors
            if wrong:
                g = g.clamp(-5, 5)
            total = torch.logaddexp(v1, v2)
            d = m1 - m2
            by_m = g * d * (-total).exp() / 2
            by_total = g * (0.5 - d.square() * (-total).exp() / 4)
            p = (v1 - total).exp()
            return by_m, by_total * p - g / 4, -by_m, by_total * (1 - p) - g / 4

    def distance(m1, v1, m2, v2):
        same(m1, v1, m2, v2)
        alike(m1, v1, m2, v2)
        for name, t in {"m1": m1, "m2": m2}.items():
            bounded(name, t, -1e3, 1e3)
        for name, t in {"v1": v1, "v2": v2}.items():
            bounded(name, t, -10, 10)
        return Distance.apply(m1, v1, m2, v2)

    return distance


add(
    "bhattacharyya_clamped",
    bhattacharyya,
    lambda: tuple(real(5, seed=s) for s in (0, 1, 2, 3)),
    bug="Backward clamps grad_output to [-5, 5], to be safe",
    trigger="a grad_output beyond 5",
)


# The rational quadratic kernel (1 + |x_i - y_j|^2 / (2 alpha l^2))^(-alpha)
def rational_kernel(wrong):
    class Kernel(Function):
        @staticmethod
        def forward(ctx, x, y, alpha, length):
            ctx.save_for_backward(x, y)
            ctx.settings = alpha, length
            square = (x[:, None] - y).square().sum(-1)
            return (1 + square / (2 * alpha * length**2)) ** -alpha

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            alpha, length = ctx.settings
            if wrong:
                g = g[0, 0]
            d = x[:, None] - y
            base = 1 + d.square().sum(-1) / (2 * alpha * length**2)
            pull = (-g * base ** (-alpha - 1) / length**2)[:, :, None] * d
            return pull.sum(1), -pull.sum(0), None, None

    def kernel(x, y, alpha=1.5, length=0.8):
        sized("x", x, None, None)
        sized("y", y, None, x.shape[1])
        alike(x, y)
        check(0.1 <= alpha <= 10, "alpha: expected a number from 0.1 to 10")
        check(0.1 <= length <= 10, "length: expected a number from 0.1 to 10")
        bounded("x", x, -100, 100)
        bounded("y", y, -100, 100)
        return Kernel.apply(x, y, alpha, length)

    return kernel


add(
    "rational_kernel_first",
    rational_kernel,
    lambda: (real(4, 2), real(3, 2, seed=1)),
    bug="Backward takes grad_output's first element for all, as after a sum",
    trigger="a grad_output that isn't constant",
)
