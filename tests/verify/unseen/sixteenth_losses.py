"""Losses."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.sixteenth import add, expect
from tests.verify.unseen.twelfth import softmax_backward


class RelativeError(Function):
    @staticmethod
    def forward(ctx, x, target, eps):
        ctx.save_for_backward(x, target)
        ctx.eps = eps
        return ((x - target).abs() / (target.abs() + eps)).mean()

    @staticmethod
    def gradients(ctx, g, of_target):
        x, target = ctx.saved_tensors
        size = target.abs() + ctx.eps
        grad = g * (x - target).sign() / size / x.numel()
        return grad, of_target(grad, x, target, size), None

    @staticmethod
    def backward(ctx, g):
        def of_target(grad, x, target, size):
            return -grad - grad * (x - target) / size * target.sign()

        return RelativeError.gradients(ctx, g, of_target)


class RelativeErrorMinus(RelativeError):
    @staticmethod
    def backward(ctx, g):
        return RelativeError.gradients(ctx, g, lambda grad, x, target, size: -grad)


def _relative_error(function):
    def relative_error(x, target, eps=1e-2):
        """Mean of |x - target| / (|target| + eps), of one shape, not empty; eps from 1e-4 to 10."""
        expect(x.shape == target.shape and x.numel(), "one shape, not empty", tuple(x.shape))
        expect(1e-4 <= eps <= 10, "eps from 1e-4 to 10", eps)
        return function.apply(x, target, eps)

    return relative_error


add(
    "relative_error_target",
    _relative_error,
    RelativeErrorMinus,
    RelativeError,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False)),
    bug="target's gradient is minus x's: the denominator's part is forgotten",
    shows="a target that requires grad",
)


class Charbonnier(Function):
    @staticmethod
    def forward(ctx, x, target, eps, reduction):
        ctx.save_for_backward(x, target)
        ctx.eps, ctx.reduction = eps, reduction
        loss = ((x - target).square() + eps**2).sqrt()
        return {"none": lambda a: a, "sum": torch.sum, "mean": torch.mean}[reduction](loss)

    @staticmethod
    def gradients(ctx, g, mean):
        x, target = ctx.saved_tensors
        d = x - target
        grad = g * d / (d.square() + ctx.eps**2).sqrt()
        grad = grad / d.numel() if mean else grad
        return grad, -grad, None, None

    @staticmethod
    def backward(ctx, g):
        return Charbonnier.gradients(ctx, g, ctx.reduction == "mean")


class CharbonnierMean(Charbonnier):
    @staticmethod
    def backward(ctx, g):
        return Charbonnier.gradients(ctx, g, True)


def _charbonnier(function):
    def charbonnier(x, target, eps=1e-3, reduction="mean"):
        """sqrt((x - target)² + eps²), of one shape, not empty; eps from 1e-4 to 10.

        reduction is "none", "sum" or "mean".
        """
        expect(x.shape == target.shape and x.numel(), "one shape, not empty", tuple(x.shape))
        expect(1e-4 <= eps <= 10, "eps from 1e-4 to 10", eps)
        expect(reduction in ("none", "sum", "mean"), '"none", "sum" or "mean"', reduction)
        return function.apply(x, target, eps, reduction)

    return charbonnier


add(
    "charbonnier_reduction",
    _charbonnier,
    CharbonnierMean,
    Charbonnier,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="backward divides by the number of elements, whatever reduction is",
    shows='reduction="sum", "none"',
)


class JensenShannon(Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        p, q, m = JensenShannon.logs(a, b)
        return ((p.exp() * (p - m) + q.exp() * (q - m)) / 2).sum(-1).mean()

    @staticmethod
    def logs(a, b):
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        return (
            p,
            q,
            torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype, device=p.device)),
        )

    @staticmethod
    def gradients(ctx, g, second):
        """The mixture's parts sum to 0."""
        p, q, m = JensenShannon.logs(*ctx.saved_tensors)
        g = g / 2 / p[..., 0].numel()
        return softmax_backward(p.exp(), g * (p - m)), softmax_backward(
            second(p, q).exp(), g * (q - m)
        )

    @staticmethod
    def backward(ctx, g):
        return JensenShannon.gradients(ctx, g, lambda p, q: q)


class JensenShannonCopied(JensenShannon):
    @staticmethod
    def backward(ctx, g):
        return JensenShannon.gradients(ctx, g, lambda p, q: p)


def _jensen_shannon(function):
    def jensen_shannon(a, b):
        """Mean over the rows of the Jensen-Shannon divergence of softmax(a) and softmax(b), (*, C), not empty."""
        expect(
            a.shape == b.shape and a.dim() and a.numel(),
            "one shape (*, C), not empty",
            tuple(a.shape),
        )
        return function.apply(a, b)

    return jensen_shannon


add(
    "jensen_shannon_copied",
    _jensen_shannon,
    JensenShannonCopied,
    JensenShannon,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="the line for b is a copy of that for a: it still reads a's softmax",
    shows="the sample",
)


class ListNet(Function):
    @staticmethod
    def masked(scores, mask):
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

    @staticmethod
    def forward(ctx, scores, relevance, mask):
        ctx.save_for_backward(scores, relevance, mask)
        p = ListNet.masked(scores, mask).log_softmax(-1)
        p = p if mask is None else p.masked_fill(~mask, 0)
        return -(ListNet.masked(relevance, mask).softmax(-1) * p).sum(-1).mean()

    @staticmethod
    def gradients(ctx, g, of_scores):
        scores, relevance, mask = ctx.saved_tensors
        target = ListNet.masked(relevance, mask).softmax(-1)
        return (
            g / scores.shape[0] * (ListNet.masked(scores, of_scores(mask)).softmax(-1) - target),
            None,
            None,
        )

    @staticmethod
    def backward(ctx, g):
        return ListNet.gradients(ctx, g, lambda mask: mask)


class ListNetPadding(ListNet):
    @staticmethod
    def backward(ctx, g):
        return ListNet.gradients(ctx, g, lambda mask: None)


def _list_net(function):
    def list_net(scores, relevance, mask=None):
        """Mean cross entropy of softmax(scores) to softmax(relevance), a constant, of lists (N, L), N and L > 0.

        Only where the bool mask (N, L) is true; each row has such a place.
        """
        expect(scores.shape == relevance.shape and scores.dim() == 2, "(N, L)", tuple(scores.shape))
        expect(scores.numel(), "N, L > 0", tuple(scores.shape))
        if mask is not None:
            expect(
                mask.shape == scores.shape and mask.dtype == torch.bool,
                "a bool mask (N, L)",
                mask.dtype,
            )
            expect(mask.any(-1).all(), "a true place in each row", mask)
        return function.apply(scores, relevance.detach(), mask)

    return list_net


add(
    "list_net_padding",
    _list_net,
    ListNetPadding,
    ListNet,
    lambda: (
        real(2, 4),
        real(2, 4, seed=1, grad=False),
        torch.tensor([[True, True, True, False], [True, True, True, True]]),
    ),
    bug="backward's softmax of the scores is over the padding too",
    shows="the sample",
)


class Huber(Function):
    @staticmethod
    def forward(ctx, x, target, delta):
        ctx.save_for_backward(x, target)
        ctx.delta = delta
        d = x - target
        return torch.where(d.abs() <= delta, d.square() / 2, delta * (d.abs() - delta / 2)).mean()

    @staticmethod
    def gradients(ctx, g, far):
        x, target = ctx.saved_tensors
        d = x - target
        grad = g / d.numel() * torch.where(d.abs() <= ctx.delta, d, far(d))
        return grad, -grad, None

    @staticmethod
    def backward(ctx, g):
        return Huber.gradients(ctx, g, lambda d: ctx.delta * d.sign())


class HuberSign(Huber):
    @staticmethod
    def backward(ctx, g):
        return Huber.gradients(ctx, g, torch.sign)


def _huber(function):
    def huber(x, target, delta=1.0):
        """Mean Huber loss of x and target, of one shape, not empty; delta from 0.01 to 100."""
        expect(x.shape == target.shape and x.numel(), "one shape, not empty", tuple(x.shape))
        expect(0.01 <= delta <= 100, "delta from 0.01 to 100", delta)
        return function.apply(x, target, delta)

    return huber


add(
    "huber_delta",
    _huber,
    HuberSign,
    Huber,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="beyond delta the slope is 1, not delta",
    shows="delta other than 1",
)
