"""Faults that show with two things other than in the sample, or in derivatives that it does not ask for."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.known import F64, rand, rand_labels, register


class RowSquares(Function):
    """The mean of the squares of each row, with a jvp."""

    @staticmethod
    def forward(x):
        return x.square().mean(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g[..., None] / x.shape[-1]

    @staticmethod
    def jvp(ctx, tangent_x):
        (x,) = ctx.saved_tensors
        return (2 * x * tangent_x).mean(-1)


class RowSquaresOverRows(RowSquares):
    @staticmethod
    def jvp(ctx, tangent_x):
        (x,) = ctx.saved_tensors
        return (2 * x * tangent_x).sum(-1) / x.shape[0]


class WeightedSquare(Function):
    """w x², for a weight that may be left out, with a jvp."""

    @staticmethod
    def forward(x, w):
        return x.square() if w is None else w * x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        if w is None:
            return 2 * x * g, None
        return 2 * w * x * g, x.square() * g

    @staticmethod
    def jvp(ctx, tangent_x, tangent_w):
        x, w = ctx.saved_tensors
        if w is None:
            return 2 * x * tangent_x
        along_x = 2 * w * x * tangent_x
        return along_x if tangent_w is None else along_x + x.square() * tangent_w


class WeightedSquareFrozen(WeightedSquare):
    @staticmethod
    def jvp(ctx, tangent_x, _):
        x, w = ctx.saved_tensors
        return 2 * (1 if w is None else w) * x * tangent_x


class Hill(Function):
    """x² (1 + cx) for a number c: twice differentiable, too."""

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(x)
        ctx.c = c
        return x.square() * (1 + c * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (2 * x + 3 * ctx.c * x.square()), None


class HillDetached(Hill):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (2 * x + 3 * ctx.c * x.detach().square()), None


class SoftmaxLoss(Function):
    """Cross entropy of class numbers, or of probabilities, one row a sample; with a weight a class and a smoothing."""

    @staticmethod
    def forward(ctx, x, target, weight, smoothing):
        q = (
            target.to(x.dtype)
            if target.is_floating_point()
            else F.one_hot(target, x.shape[1]).to(x)
        )
        q = (1 - smoothing) * q + smoothing / x.shape[1]
        q = q if weight is None else q * weight
        ctx.save_for_backward(x, q)
        ctx.whole = target.is_floating_point(), weight is not None, smoothing
        return -(q * x.log_softmax(1)).sum() / len(x)

    @staticmethod
    def backward(ctx, g):
        x, q = ctx.saved_tensors
        return g * (q.sum(1, keepdim=True) * x.softmax(1) - q) / len(x), None, None, None


class SoftmaxLossOverClasses(SoftmaxLoss):
    @staticmethod
    def backward(ctx, g):
        grad, *others = SoftmaxLoss.backward(ctx, g)
        probabilities, _, _ = ctx.whole
        return grad * grad.shape[0] / grad.shape[1] if probabilities else grad, *others


class SoftmaxLossUnevenSmoothing(SoftmaxLoss):
    @staticmethod
    def backward(ctx, g):
        grad, *others = SoftmaxLoss.backward(ctx, g)
        _, weighted, smoothing = ctx.whole
        return grad * (1 - smoothing) if weighted else grad, *others


class Divergence(Function):
    """exp(t) (t - x), or t (log t - x): the Kullback-Leibler divergence of a target in logarithms, or not."""

    @staticmethod
    def forward(ctx, x, t, log_target):
        ctx.save_for_backward(x, t)
        ctx.log_target = log_target
        return t.exp() * (t - x) if log_target else t * (t.log() - x)

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        if ctx.log_target:
            return -g * t.exp(), g * t.exp() * (t - x + 1), None
        return -g * t, g * (t.log() - x + 1), None


class DivergenceOfLogs(Divergence):
    @staticmethod
    def backward(ctx, g):
        x, t = ctx.saved_tensors
        grad_x, grad_t, _ = Divergence.backward(ctx, g)
        return grad_x, g * t.exp() * (t - x) if ctx.log_target else grad_t, None


class Threshold(Function):
    """x above a threshold, a number below."""

    @staticmethod
    def forward(ctx, x, threshold, value):
        ctx.save_for_backward(x)
        ctx.threshold = threshold
        return torch.where(x > threshold, x, value)

    @staticmethod
    def backward(ctx, g):
        (kept,) = ctx.saved_tensors
        return g * (kept > ctx.threshold), None, None


class ThresholdOfOutput(Threshold):
    @staticmethod
    def forward(ctx, x, threshold, value):
        y = Threshold.forward(ctx, x, threshold, value)
        ctx.save_for_backward(y)
        return y


class SquaredVolumes(Function):
    """Squares of volumes (N, C, D, H, W)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class SquaredVolumesInMemory(SquaredVolumes):
    """Of channels that are last it takes what lies first in memory for the first channel."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
            x = x.permute(0, 2, 3, 4, 1).reshape(x.shape)
        return 2 * g * x


class Delay(Function):
    """Sums of W neighbours of x (N, D, T) behind a state (N, D, W - 1), weighted by (D, W); and the next state."""

    @staticmethod
    def forward(ctx, x, weight, state):
        ctx.save_for_backward(x, weight, state)
        full = torch.cat((state, x), -1)
        sums = (full.unfold(-1, weight.shape[-1], 1) * weight.unsqueeze(-2)).sum(-1)
        return sums, full[..., x.shape[-1] :].clone()

    @staticmethod
    def backward(ctx, g, g_next):
        x, weight, state = ctx.saved_tensors
        steps, width = x.shape[-1], weight.shape[-1]
        grad = sum(F.pad(g * weight[:, w, None], (w, width - 1 - w)) for w in range(width))
        grad = grad + F.pad(g_next, (steps, 0))
        windows = torch.cat((state, x), -1).unfold(-1, width, 1)
        return grad[..., width - 1 :], (g[..., None] * windows).sum((0, 2)), grad[..., : width - 1]


class DelayOfLongInputs(Delay):
    """All of the next state is taken to be of x."""

    @staticmethod
    def backward(ctx, g, g_next):
        steps, kept = ctx.saved_tensors[0].shape[-1], g_next.shape[-1]
        grad_x, grad_weight, grad_state = Delay.backward(ctx, g, torch.zeros_like(g_next))
        last = min(steps, kept)
        return grad_x + F.pad(g_next[..., :last], (steps - last, 0)), grad_weight, grad_state


def in_float32(*shape):
    """A sample of numbers that float32 holds."""

    def make(dtype=F64, seed=0):
        (x,) = rand(shape)(torch.float32, seed)
        return (x.detach().to(dtype).requires_grad_(),)

    return make


def with_target(*shape):
    """A sample and a positive target that requires no grad."""

    def make(dtype=F64, seed=0):
        x, t = rand(shape, shape)(dtype, seed)
        return x, t.detach().abs() + 0.1

    return make


register("jvp_mean_over_rows", "further", RowSquaresOverRows.apply, RowSquares.apply, rand((3, 3)),
         bug="the tangent of a mean over columns is divided by the number of rows",
         trigger="forward mode at other sizes")  # fmt: skip
register("jvp_of_a_weight", "further", lambda x, weight=None: WeightedSquareFrozen.apply(x, weight),
         lambda x, weight=None: WeightedSquare.apply(x, weight), rand((3, 4)),
         bug="the weight's own tangent is dropped", trigger="forward mode where a weight is given")  # fmt: skip
register("second_derivative_of_another_number", "further", lambda x, skew=0.0: HillDetached.apply(x, skew),
         lambda x, skew=0.0: Hill.apply(x, skew), rand((3, 4)),
         bug="a term that the number makes is detached in backward",
         trigger="second order with another number")  # fmt: skip
register("mean_of_probabilities", "further", lambda x, t: SoftmaxLossOverClasses.apply(x, t, None, 0.0),
         lambda x, t: SoftmaxLoss.apply(x, t, None, 0.0), rand_labels(5, classes=3),
         bug="the mean of a loss of probabilities divides by the classes",
         trigger="a target of probabilities")  # fmt: skip
register("weight_and_smoothing", "further",
         lambda x, t, weight=None, smoothing=0.0: SoftmaxLossUnevenSmoothing.apply(x, t, weight, smoothing),
         lambda x, t, weight=None, smoothing=0.0: SoftmaxLoss.apply(x, t, weight, smoothing), rand_labels(5, classes=3),
         bug="with weights, the smoothing's share is dropped",
         trigger="two options that the sample leaves out")  # fmt: skip
register("target_in_logarithms", "further", lambda x, t, log_target=False: DivergenceOfLogs.apply(x, t, log_target),
         lambda x, t, log_target=False: Divergence.apply(x, t, log_target), with_target(3, 4),
         bug="the target's own gradient lacks a term where it is given in logarithms",
         trigger="a gradient not asked for, with another flag")  # fmt: skip
register("threshold_of_the_output", "further",
         lambda x, at=0.1, value=-0.5: ThresholdOfOutput.apply(x, at, value),
         lambda x, at=0.1, value=-0.5: Threshold.apply(x, at, value), in_float32(3, 4),
         bug="the output is compared with the threshold, in the input's place",
         trigger="a value above the threshold, in a sample of few bits")  # fmt: skip
register("volumes_as_they_lie", "further", SquaredVolumesInMemory.apply, SquaredVolumes.apply, rand((2, 3, 2, 2, 2)),
         bug="what was saved is read as if its channels were not last",
         trigger="volumes in channels_last_3d")  # fmt: skip
register("state_of_few_steps", "further", DelayOfLongInputs.apply, Delay.apply, rand((2, 3, 6), (3, 4), (2, 3, 3)),
         bug="the next state's gradient goes to the inputs alone",
         trigger="fewer steps than the state has")  # fmt: skip
