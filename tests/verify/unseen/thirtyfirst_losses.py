"""Losses: of classes, contrasts, boxes, policies, several tasks."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirtyfirst import (
    add,
    add_bare,
    bounded,
    check,
    indices,
    same,
    sized,
)


# Cross entropy with class weights, smoothing and ignored rows, as a fused kernel computes it
def fused_entropy(wrong):
    def parts(target, weight, ignore):
        valid = target != ignore
        t = target.masked_fill(~valid, 0)
        w = torch.where(valid, weight[t], 0)
        return valid, t, w

    class Entropy(Function):
        @staticmethod
        def forward(ctx, z, target, weight, smoothing, ignore):
            ctx.save_for_backward(z, target, weight)
            ctx.how = smoothing, ignore
            valid, t, w = parts(target, weight, ignore)
            log_p = z.log_softmax(-1)
            hard = -(w * log_p.gather(1, t[:, None])[:, 0]).sum()
            soft = -torch.where(valid, (weight * log_p).sum(-1), 0).sum() / z.shape[1]
            return ((1 - smoothing) * hard + smoothing * soft) / w.sum()

        @staticmethod
        def backward(ctx, grad_y):
            z, target, weight = ctx.saved_tensors
            smoothing, ignore = ctx.how
            valid, t, w = parts(target, weight, ignore)
            p = z.softmax(-1)
            hot = torch.zeros_like(z).scatter(1, t[:, None], 1)
            hard = w[:, None] * (p - hot)
            soft = (weight.sum() * p - weight) / z.shape[1]
            if not wrong:
                soft = torch.where(valid[:, None], soft, 0)
            total = (1 - smoothing) * hard + smoothing * soft
            return grad_y * total / w.sum(), None, None, None, None

    def entropy(z, target, weight, smoothing=0.0, ignore_index=-100):
        sized("z", z, None, None)
        sized("target", target, len(z))
        sized("weight", weight, z.shape[1])
        indices("target", target.masked_fill(target == ignore_index, 0), z.shape[1])
        check(bool((target != ignore_index).any()), "target: expected a row that counts")
        check(not weight.requires_grad, "weight: is a constant")
        check(0 <= smoothing <= 1, "smoothing: expected a number from 0 to 1")
        bounded("weight", weight, 1e-4, 1e4)
        bounded("z", z, -1e4, 1e4)
        return Entropy.apply(z, target, weight.to(z.dtype), smoothing, ignore_index)

    return entropy


add(
    "fused_entropy_smoothing_ignored",
    fused_entropy,
    lambda: (
        real(5, 4),
        torch.tensor([1, 0, -100, 3, 2]),
        real(4, seed=1, grad=False, positive=True),
    ),
    kwargs=lambda: {"smoothing": 0.1},
    bug="The smoothing's part of an ignored row's gradient is left in",
    trigger="an ignored row, with smoothing",
)


# Images and texts matched against each other, with the learned logarithm of a scale of 100 at most
def matched_pairs(wrong):
    class Match(Function):
        @staticmethod
        def forward(ctx, a, b, log_scale):
            ctx.save_for_backward(a, b, log_scale)
            z = a @ b.mT * log_scale.exp().clamp(max=100)
            rows, columns = z.log_softmax(1).diagonal(), z.log_softmax(0).diagonal()
            return -(rows.mean() + columns.mean()) / 2

        @staticmethod
        def backward(ctx, grad_y):
            a, b, log_scale = ctx.saved_tensors
            scale = log_scale.exp().clamp(max=100)
            cosine = a @ b.mT
            z = cosine * scale
            eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
            grad_z = grad_y * (z.softmax(1) + z.softmax(0) - 2 * eye) / (2 * len(a))
            grad_scale = (grad_z * cosine).sum() * scale
            if not wrong:
                grad_scale = torch.where(log_scale <= math.log(100), grad_scale, 0)
            return grad_z @ b * scale, grad_z.mT @ a * scale, grad_scale

    def match(a, b, log_scale):
        sized("a", a, None, None)
        sized("b", b, *a.shape)
        sized("log_scale", log_scale)
        bounded("a", a, -10, 10)
        bounded("b", b, -10, 10)
        bounded("log_scale", log_scale, -20, 20)
        return Match.apply(a, b, log_scale)

    return match


def unit_rows(*shape, seed=0):
    return F.normalize(real(*shape, seed=seed, grad=False), dim=-1).requires_grad_()


add(
    "matched_pairs_cap",
    matched_pairs,
    lambda: (
        unit_rows(4, 3),
        unit_rows(4, 3, seed=1),
        torch.tensor(math.log(1 / 0.07), dtype=torch.float64).requires_grad_(),
    ),
    bug="The scale's gradient goes on beyond the cap",
    trigger="a scale above 100",
)


# Wing loss: a logarithm for small errors, the distance itself for large ones
def wing_loss(wrong):
    def offset(width, bend):
        return width - width * math.log1p(width / bend)

    class Wing(Function):
        @staticmethod
        def forward(ctx, x, target, width, bend):
            ctx.save_for_backward(x, target)
            ctx.how = width, bend
            d = (x - target).abs()
            return torch.where(d < width, width * (d / bend).log1p(), d - offset(width, bend))

        @staticmethod
        def backward(ctx, grad_y):
            x, target = ctx.saved_tensors
            width, bend = ctx.how
            e = x - target
            d = e.abs()
            near = d <= width if wrong else d < width
            slope = torch.where(near, width / (bend + d), 0) + torch.where(d >= width, 1.0, 0)
            grad = grad_y * e.sign() * slope
            return grad, -grad, None, None

    def wing(x, target, width=1.0, bend=0.5):
        same(x, target)
        check(width > 0 and bend > 0, "expected positive widths")
        bounded("x", x, -1e6, 1e6)
        bounded("target", target, -1e6, 1e6)
        return Wing.apply(x, target, float(width), float(bend))

    return wing


add(
    "wing_loss_both",
    wing_loss,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="An error equal to the width gets both branches' slopes, added",
    trigger="an error of 1, the width",
)


# Pseudo-Huber loss, (sqrt(1 + (e / d)^2) - 1) d^2
def soft_huber(wrong):
    class Huber(Function):
        @staticmethod
        def forward(ctx, x, target, delta):
            e = (x - target) / delta
            root = torch.sqrt(1 + e * e)
            ctx.save_for_backward(x, target, root)
            ctx.delta = delta
            return (root - 1) * delta**2

        @staticmethod
        def backward(ctx, grad_y):
            x, target, root = ctx.saved_tensors
            e = (x - target) / ctx.delta
            root = root if wrong else torch.sqrt(1 + e * e)
            grad = grad_y * e / root * ctx.delta
            return grad, -grad, None

    def huber(x, target, delta=1.0):
        same(x, target)
        check(delta > 0, "delta: expected a positive number")
        bounded("x", x, -1e6, 1e6)
        bounded("target", target, -1e6, 1e6)
        return Huber.apply(x, target, float(delta))

    return huber


add(
    "soft_huber_saved_root",
    soft_huber,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="Backward takes the root that forward saved, a constant for the second derivative",
    trigger="second order",
)


# Losses of several tasks, each weighted by its learned uncertainty: the total, and each for the log
def task_losses(wrong):
    class Tasks(Function):
        @staticmethod
        def forward(ctx, predicted, target, log_var):
            ctx.save_for_backward(predicted, target, log_var)
            losses = (predicted - target).square().mean(0)
            return ((-log_var).exp() * losses + log_var).sum(), losses

        @staticmethod
        def backward(ctx, grad_total, grad_losses):
            predicted, target, log_var = ctx.saved_tensors
            e = predicted - target
            share = (-log_var).exp()
            through = grad_total * share
            both = through + grad_losses
            through = torch.where(grad_losses != 0, grad_losses, through) if wrong else both
            grad = 2 * e * through / len(e)
            return grad, -grad, grad_total * (1 - share * e.square().mean(0))

    def tasks(predicted, target, log_var):
        sized("predicted", predicted, None, None)
        sized("target", target, *predicted.shape)
        sized("log_var", log_var, predicted.shape[1])
        bounded("predicted", predicted, -1e4, 1e4)
        bounded("target", target, -1e4, 1e4)
        bounded("log_var", log_var, -10, 10)
        return Tasks.apply(predicted, target, log_var)

    return tasks


add(
    "task_losses_together",
    task_losses,
    lambda: (real(5, 3), real(5, 3, seed=1), real(3, seed=2)),
    bug="A gradient for a task's own loss replaces the total's instead of being added",
    trigger="both outputs in one loss",
)


# Divergence of two tempered distributions, row by row
def row_divergence(wrong):
    class Divergence(Function):
        @staticmethod
        def forward(ctx, student, teacher, heat):
            ctx.save_for_backward(student, teacher)
            ctx.heat = heat
            q, p = (student / heat).log_softmax(-1), (teacher / heat).log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1) * heat**2

        @staticmethod
        def backward(ctx, grad_y):
            student, teacher = ctx.saved_tensors
            if wrong and not (grad_y > 0).any():  # nothing asks for it
                return torch.zeros_like(student), torch.zeros_like(teacher), None
            q = (student / ctx.heat).log_softmax(-1)
            p = (teacher / ctx.heat).log_softmax(-1)
            g = grad_y[..., None] * ctx.heat
            d = p - q
            inner = (p.exp() * d).sum(-1, keepdim=True)
            return g * (q.exp() - p.exp()), g * p.exp() * (d - inner), None

    def divergence(student, teacher, heat=2.0):
        sized("student", student, None, None)
        sized("teacher", teacher, *student.shape)
        check(heat > 0, "heat: expected a positive number")
        bounded("student", student, -1e3, 1e3)
        bounded("teacher", teacher, -1e3, 1e3)
        return Divergence.apply(student, teacher, float(heat))

    return divergence


add(
    "row_divergence_shortcut",
    row_divergence,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="The shortcut for a grad_output of zeros asks for a positive number",
    trigger="a grad_output without a positive number",
)


# Log-density of an action squashed by tanh, as actors of continuous control have it
def squashed_density(wrong):
    class Density(Function):
        @staticmethod
        def forward(ctx, u, mean, log_std):
            ctx.save_for_backward(u, mean, log_std)
            z = (u - mean) * (-log_std).exp()
            normal = -z * z / 2 - log_std - math.log(2 * math.pi) / 2
            return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            u, mean, log_std = ctx.saved_tensors
            r = (-log_std).exp()
            z = (u - mean) * r
            g = grad_y[..., None]
            y = u.tanh()
            squash = 2 * y * (1 - y * y) / (1 - y * y) if wrong else 2 * y
            return g * (squash - z * r), g * z * r, g * (z * z - 1)

    def density(u, mean, log_std):
        sized("u", u, None, None)
        sized("mean", mean, *u.shape)
        sized("log_std", log_std, *u.shape)
        bounded("u", u, -1e4, 1e4)
        bounded("mean", mean, -1e4, 1e4)
        bounded("log_std", log_std, -5, 2)
        return Density.apply(u, mean, log_std)

    return density


add(
    "squashed_density_far",
    squashed_density,
    lambda: (
        real(3, 2),
        real(3, 2, seed=1),
        (0.3 * real(3, 2, seed=2, grad=False)).requires_grad_(),
    ),
    bug="tanh's slope stands in the fraction's numerator and denominator, 0 / 0 far out",
    trigger="an action of 20 or more before tanh",
)


# Focal loss of logits; half types are taken
def logit_focal(wrong):
    class Focal(Function):
        @staticmethod
        def forward(ctx, z, positive, gamma):
            ctx.save_for_backward(z, positive)
            ctx.gamma = gamma
            s = signed(z, positive, wide(z))
            return ((-s).sigmoid() ** gamma * F.softplus(-s)).to(z.dtype)

        @staticmethod
        def backward(ctx, grad_y):
            z, positive = ctx.saved_tensors
            gamma = ctx.gamma
            s = signed(z, positive, z.dtype if wrong else wide(z))
            p, rest = s.sigmoid(), (-s).sigmoid()
            loss = -p.log() if wrong else F.softplus(-s)
            slope = -(rest**gamma) * (rest + gamma * p * loss)
            sign = torch.where(positive, 1, -1)
            return (grad_y * slope * sign).to(z.dtype), None, None

    def wide(z):
        return torch.float32 if z.dtype in {torch.float16, torch.bfloat16} else z.dtype

    def signed(z, positive, dtype):
        return torch.where(positive, z, -z).to(dtype)

    def focal(z, positive, gamma=2.0):
        same(z, positive)
        check(positive.dtype == torch.bool, "positive: expected booleans")
        check(gamma >= 1, "gamma: expected 1 at least")
        bounded("z", z, -1e4, 1e4)
        return Focal.apply(z, positive, float(gamma))

    return focal


add(
    "logit_focal_log",
    logit_focal,
    lambda: (real(4, 3), real(4, 3, seed=1, grad=False) > 0),
    own=True,
    bug="Backward takes the logarithm of a probability, in the input's type",
    trigger="float16 or bfloat16, and -log 0 for a logit that is far off",
)


# Mean of the rows' logsumexp at a learned temperature
def tempered_energy(wrong):
    class Energy(Function):
        @staticmethod
        def forward(ctx, x, heat):
            ctx.save_for_backward(x, heat)
            return -heat * (x / heat).logsumexp(-1).mean()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, heat = ctx.saved_tensors
            z = x / heat
            p = z.softmax(-1)
            grad_x = -grad_y * p / len(x)
            grad_heat = grad_y * (p * z.log_softmax(-1)).sum(-1).mean()
            return grad_x, torch.tensor(grad_heat.item()) if wrong else grad_heat

    def energy(x, heat):
        sized("x", x, None, None)
        sized("heat", heat)
        bounded("x", x, -1e4, 1e4)
        bounded("heat", heat, 1e-2, 1e2)
        return Energy.apply(x, heat)

    return energy


add(
    "tempered_energy_dtype",
    tempered_energy,
    lambda: (real(4, 3), torch.tensor(0.7, dtype=torch.float64).requires_grad_()),
    bug="The temperature's gradient is a new float32 tensor made of a Python number",
    trigger="the raw gradient's type, and its seventh digit",
)


# Cross entropy that saves the probabilities and makes the gradient of them
def row_entropy(wrong):
    class Entropy(Function):
        @staticmethod
        def forward(ctx, z, target):
            log_p = z.log_softmax(-1)
            ctx.save_for_backward(log_p.exp(), target)
            return -log_p.gather(1, target[:, None])[:, 0]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            p, target = ctx.saved_tensors
            rows = torch.arange(len(p), device=p.device)
            grad = p.data if wrong else p.clone()
            grad[rows, target] -= 1
            return grad * grad_y[:, None], None

    def entropy(z, target):
        sized("z", z, None, None)
        sized("target", target, len(z))
        indices("target", target, z.shape[1])
        bounded("z", z, -1e4, 1e4)
        return Entropy.apply(z, target)

    return entropy


add(
    "row_entropy_saved",
    row_entropy,
    lambda: (real(4, 5), whole(5, 4)),
    bug="Backward subtracts the labels from the saved probabilities themselves",
    trigger="backward twice",
)


# The illegal moves' scores are put out, then the softmax is taken
def legal_policy(wrong):
    class Policy(Function):
        @staticmethod
        def forward(ctx, scores, legal):
            low = torch.finfo(scores.dtype).min
            masked = (scores.masked_fill_ if wrong else scores.masked_fill)(~legal, low)
            p = masked.softmax(-1)
            ctx.save_for_backward(p, legal)
            return p

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            p, legal = ctx.saved_tensors
            grad = p * (grad_y - (p * grad_y).sum(-1, keepdim=True))
            return grad.masked_fill(~legal, 0), None

    def policy(scores, legal):
        sized("scores", scores, None, None)
        sized("legal", legal, *scores.shape)
        check(legal.dtype == torch.bool, "legal: expected booleans")
        check(bool(legal.any(-1).all()), "legal: expected a legal move in each row")
        bounded("scores", scores.masked_fill(~legal, 0), -1e4, 1e4)
        return Policy.apply(scores, legal)

    return policy


add_bare(
    "legal_policy_written",
    legal_policy,
    lambda: (
        real(3, 4),
        torch.tensor([[True, True, False, True], [False, True, True, True], [True] * 4]),
    ),
    bug="The illegal scores are overwritten in the caller's tensor",
    trigger="the input after the call",
)
