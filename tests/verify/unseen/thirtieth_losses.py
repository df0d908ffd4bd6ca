"""Losses and statistics."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtieth import add, bounded, check, indices, sized


# The multi-class hinge of Weston and Watkins: for each row the sum over the other classes of
# max(0, 1 + x_j - x_t), and the mean over the rows
def multi_class_hinge(wrong):
    class Hinge(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            gap = 1 + x - x.gather(1, t[:, None])
            return gap.clamp(min=0).scatter(1, t[:, None], 0).sum() / len(x)

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            over = (1 + x - x.gather(1, t[:, None]) > 0).to(x.dtype).scatter(1, t[:, None], 0)
            total = over.amax(1, keepdim=True) if wrong else over.sum(1, keepdim=True)
            return grad_y * over.scatter(1, t[:, None], -total) / len(x), None

    def loss(x, t):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        bounded("x", x, -100, 100)
        return Hinge.apply(x, t.long())

    return loss


add(
    "multi_class_hinge_target",
    multi_class_hinge,
    lambda: (real(4, 5), whole(5, 4)),
    bug="The target's score gets -1 for a row, not -1 for each class over the margin",
)


# The perplexity: the exponential of the mean cross entropy
def perplexity(wrong):
    class Perplexity(Function):
        @staticmethod
        def forward(ctx, x, t):
            ctx.save_for_backward(x, t)
            return F.nll_loss(x.log_softmax(1), t).exp()

        @staticmethod
        def backward(ctx, grad_y):
            x, t = ctx.saved_tensors
            log_p = x.log_softmax(1)
            grad = grad_y / len(x)
            if not wrong:
                grad = grad * F.nll_loss(log_p, t).exp()
            return grad * (log_p.exp() - F.one_hot(t, x.shape[1])), None

    def loss(x, t):
        sized("x", x, None, None)
        sized("t", t, len(x))
        indices("t", t, x.shape[1])
        bounded("x", x, -5, 5)
        return Perplexity.apply(x, t.long())

    return loss


add(
    "perplexity_chain",
    perplexity,
    lambda: (real(4, 3), whole(3, 4)),
    bug="Backward is that of the cross entropy, without the exponential's factor",
)


# Mean squared error of a linear head, by blocks of 64 rows, so that all outputs never stand at once
def blocked_error(wrong):
    class Error(Function):
        @staticmethod
        def forward(ctx, x, w, t):
            ctx.save_for_backward(x, w, t)
            total = x.new_zeros(())
            for a, b in zip(x.split(64), t.split(64), strict=True):
                total = total + (a @ w - b).square().sum()
            return total / len(x)

        @staticmethod
        def backward(ctx, grad_y):
            x, w, t = ctx.saved_tensors
            block = min(len(x), 64)
            rows = block * -(-len(x) // block) if wrong else len(x)
            grads, grad_w = [], torch.zeros_like(w)
            for a, b in zip(x.split(64), t.split(64), strict=True):
                over = grad_y * 2 / rows * (a @ w - b)
                grads.append(over[:, None] * w)
                grad_w = grad_w + a.mT @ over
            return torch.cat(grads), grad_w, None

    def loss(x, w, t):
        sized("x", x, None, None)
        sized("w", w, x.shape[1])
        sized("t", t, len(x))
        check(not t.requires_grad, "t: targets are constants")
        return Error.apply(x, w, t)

    return loss


add(
    "cut_rows_mean",
    blocked_error,
    lambda: (real(5, 3), real(3, seed=1), real(5, seed=2, grad=False)),
    bug="Backward counts the last block as full",
    trigger="more than 64 rows, the last block not full",
)


# The central moment of each row, of an order from 2 to 4
def central_moment(wrong):
    class Moment(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, order):
            return (x - x.mean(-1, keepdim=True)).pow(order).mean(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.order = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            slope = (x - x.mean(-1, keepdim=True)).pow(ctx.order - 1)
            if not wrong:
                slope = slope - slope.mean(-1, keepdim=True)
            return grad_y[..., None] * ctx.order / x.shape[-1] * slope, None

    def moment(x, order=2):
        check(isinstance(order, int) and 2 <= order <= 4, "order: expected an integer from 2 to 4")
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected one number in a row at least")
        bounded("x", x, -10, 10)
        return Moment.apply(x, order)

    return moment


add(
    "central_moment_mean",
    central_moment,
    lambda: (real(3, 5),),
    bug="The mean is taken to be constant, which is right for the variance only",
    trigger="an order above 2; the default is 2",
)


# The effective number of samples of log-weights: 1 / Σ p², p their softmax
def effective_size(wrong):
    class Size(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return 1 / x.softmax(-1).square().sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            p = x.softmax(-1)
            total = p.square().sum(-1, keepdim=True)
            # Σ p² - p_i, which would lose its digits where one weight prevails
            rest = (p[..., None, :] * (p[..., None, :] - p[..., None])).sum(-1)
            slope = p if wrong else 2 * p
            return grad_y[..., None] * slope * rest / total.square()

    def size(x):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected one sample at least")
        bounded("x", x, -1e4, 1e4)
        return Size.apply(x)

    return size


add(
    "effective_size_factor",
    effective_size,
    lambda: (real(3, 5),),
    bug="The square's factor 2 is forgotten",
)


# The k-th smallest number of each row, counted from 1; where several are equal, one gets the gradient
def kth_smallest(wrong):
    class Kth(Function):
        @staticmethod
        def forward(ctx, x, k):
            y, place = x.kthvalue(k, -1, keepdim=True)
            ctx.save_for_backward(*((x, y) if wrong else (place,)))
            ctx.n = x.shape[-1]
            return y[..., 0]

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                x, y = ctx.saved_tensors
                return grad_y[..., None] * (x == y), None
            (place,) = ctx.saved_tensors
            zeros = grad_y.new_zeros(*grad_y.shape, ctx.n)
            return zeros.scatter(-1, place, grad_y[..., None]), None

    def kth(x, k=1):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected one number in a row at least")
        check(isinstance(k, int) and 1 <= k <= x.shape[-1], "k: expected one of a row's places")
        bounded("x", x, -1e30, 1e30)
        return Kth.apply(x, k)

    return kth


add(
    "kth_value_ties",
    kth_smallest,
    lambda: (real(3, 5), 2),
    bug="Each number that equals the k-th gets the whole gradient",
    trigger="equal numbers",
)


# The Frobenius norms of the rows of x, computed in float32 where x is of a half type
def row_norms(wrong):
    class Norms(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return wide(x).square().sum(-1).sqrt().to(x.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            rows = x if wrong else wide(x)
            total = rows.square().sum(-1, keepdim=True)
            unit = rows / torch.where(total > 0, total, 1).sqrt()
            return (grad_y[..., None].to(unit.dtype) * unit).to(x.dtype)

    def wide(t):
        return t.to(torch.promote_types(t.dtype, torch.float32))

    def norms(x):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected one number in a row at least")
        bounded("x", x, -1e3, 1e3)
        below = (x.abs() < 1e-4) & (x != 0)
        check(not bool(below.any()), "x: expected numbers of 1e-4 or more, or 0")
        return Norms.apply(x)

    return norms


add(
    "row_norm_half_square",
    row_norms,
    lambda: (real(3, 4),),
    own=True,
    bug="Forward squares in float32, backward in the input's type",
    trigger="float16 and numbers above 256, whose squares overflow",
)
