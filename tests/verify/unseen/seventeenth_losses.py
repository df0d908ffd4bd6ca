"""Losses."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect
from tests.verify.unseen.sixteenth_indices import below


class GeneralizedCE(Function):
    @staticmethod
    def forward(ctx, z, target, q):
        ctx.save_for_backward(z, target)
        ctx.q = q
        log_p = z.log_softmax(-1).gather(1, target[:, None])
        return (-torch.expm1(q * log_p) / q).mean()

    @staticmethod
    def gradients(ctx, g, softmax):
        z, target = ctx.saved_tensors
        p = softmax(z)
        chosen = torch.nn.functional.one_hot(target, z.shape[1]).to(z.dtype)
        power = (ctx.q * z.log_softmax(-1).gather(1, target[:, None])).exp()
        return g / len(z) * power * (p - chosen), None, None

    @staticmethod
    def backward(ctx, g):
        return GeneralizedCE.gradients(ctx, g, lambda z: z.softmax(-1))


class GeneralizedCEExp(GeneralizedCE):
    @staticmethod
    def backward(ctx, g):
        return GeneralizedCE.gradients(ctx, g, lambda z: z.exp() / z.exp().sum(-1, keepdim=True))


def _generalized_ce(function):
    def generalized_ce(z, target, q=0.7):
        """Mean of (1 - p^q) / q, p = softmax(z) at target (N,), of z (N, C), N > 0; q from 0.1 to 1."""
        expect(
            z.dim() == 2 and target.shape == z.shape[:1] and len(z),
            "z (N, C), target (N,)",
            tuple(target.shape),
        )
        expect(0.1 <= q <= 1, "q from 0.1 to 1", q)
        below(target, z.shape[1])
        return function.apply(z, target, q)

    return generalized_ce


add(
    "generalized_ce_exp",
    _generalized_ce,
    GeneralizedCEExp,
    GeneralizedCE,
    lambda: (real(3, 4), torch.tensor([1, 0, 3])),
    bug="backward's softmax does not take the largest logit away first",
    shows="logits above 88 in float32, 709 in float64: inf / inf",
)


class LovaszHinge(Function):
    @staticmethod
    def weights(z, labels):
        """The errors, the slope of the Jaccard loss along each, in z's order."""
        signs = 2 * labels - 1
        errors = 1 - z * signs
        order = errors.sort(dim=-1, descending=True, stable=True).indices
        sorted_labels = labels.gather(-1, order)
        total = labels.sum(-1, keepdim=True)
        union = total + (1 - sorted_labels).cumsum(-1)
        jaccard = 1 - (total - sorted_labels.cumsum(-1)) / union
        slopes = jaccard.diff(dim=-1, prepend=torch.zeros_like(jaccard[..., :1]))
        return signs, errors, torch.zeros_like(z).scatter(-1, order, slopes)

    @staticmethod
    def forward(ctx, z, labels):
        labels = labels.to(z.dtype)
        ctx.save_for_backward(z, labels)
        _, errors, slopes = LovaszHinge.weights(z, labels)
        return (errors.relu() * slopes).sum(-1).mean()

    @staticmethod
    def gradients(ctx, g, kept):
        z, labels = ctx.saved_tensors
        signs, errors, slopes = LovaszHinge.weights(z, labels)
        return -g / len(z) * kept(labels) * signs * slopes * (errors > 0), None

    @staticmethod
    def backward(ctx, g):
        return LovaszHinge.gradients(ctx, g, lambda labels: 1)


class LovaszHingeEmpty(LovaszHinge):
    @staticmethod
    def backward(ctx, g):
        return LovaszHinge.gradients(ctx, g, lambda labels: labels.amax(-1, keepdim=True))


def _lovasz_hinge(function):
    def lovasz_hinge(z, labels):
        """Mean over images of the Lovász hinge loss of logits z (N, P), N, P > 0, to labels (N, P), integers 0 and 1.

        Of equal errors the first counts as the larger one.
        """
        expect(z.dim() == 2 and z.shape == labels.shape and z.numel(), "(N, P)", tuple(z.shape))
        below(labels, 2)
        return function.apply(z, labels)

    return lovasz_hinge


add(
    "lovasz_hinge_empty",
    _lovasz_hinge,
    LovaszHingeEmpty,
    LovaszHinge,
    lambda: (real(2, 5), torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])),
    bug="backward leaves out images without a positive pixel",
    shows="an image of zeros alone",
)


class MultiSimilarity(Function):
    @staticmethod
    def masks(labels):
        same = labels[:, None] == labels
        eye = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        return same & ~eye, ~same, same

    @staticmethod
    def exponents(s, labels, a, b, base):
        positive, negative, _ = MultiSimilarity.masks(labels)
        zero = torch.zeros_like(s[:, :1])
        z = (-a * (s - base)).masked_fill(~positive, -torch.inf)
        y = (b * (s - base)).masked_fill(~negative, -torch.inf)
        return torch.cat((zero, z), 1), torch.cat((zero, y), 1)

    @staticmethod
    def forward(ctx, s, labels, a, b, base):
        ctx.save_for_backward(s, labels)
        ctx.options = a, b, base
        z, y = MultiSimilarity.exponents(s, labels, a, b, base)
        return (z.logsumexp(1) / a + y.logsumexp(1) / b).mean()

    @staticmethod
    def gradients(ctx, g, positive):
        s, labels = ctx.saved_tensors
        a, b, base = ctx.options
        z, y = MultiSimilarity.exponents(s, labels, a, b, base)
        pull = (-a * (s - base) - z.logsumexp(1, keepdim=True)).exp()
        grad = y.softmax(1)[:, 1:] - pull.masked_fill(~positive(labels), 0)
        return g / len(s) * grad, None, None, None, None

    @staticmethod
    def backward(ctx, g):
        return MultiSimilarity.gradients(ctx, g, lambda labels: MultiSimilarity.masks(labels)[0])


class MultiSimilaritySelf(MultiSimilarity):
    @staticmethod
    def backward(ctx, g):
        return MultiSimilarity.gradients(ctx, g, lambda labels: MultiSimilarity.masks(labels)[2])


def _multi_similarity(function):
    def multi_similarity(s, labels, a=2.0, b=10.0, base=0.5):
        """Mean over i of log(1 + Σ e^(-a (s - base))) / a + log(1 + Σ e^(b (s - base))) / b of s (N, N), N > 0.

        The first sum is over j of i's label but i itself, the second over the others; labels (N,), |s| <= 4, a and b
        from 0.5 to 20, base from -1 to 1.
        """
        n = len(s)
        expect(n and s.shape == (n, n) and labels.shape == (n,), "s (N, N)", tuple(s.shape))
        expect((s.abs() <= 4).all(), "|s| <= 4", s)
        expect(0.5 <= a <= 20 and 0.5 <= b <= 20 and -1 <= base <= 1, "a, b, base", (a, b, base))
        return function.apply(s, labels, a, b, base)

    return multi_similarity


add(
    "multi_similarity_self",
    _multi_similarity,
    MultiSimilaritySelf,
    MultiSimilarity,
    lambda: (real(4, 4), torch.tensor([0, 1, 0, 1])),
    bug="backward's positives include each sample itself",
    shows="the sample",
)


class SupCon(Function):
    @staticmethod
    def parts(z, labels, tau):
        eye = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = ((labels[:, None] == labels) & ~eye).to(z.dtype)
        count = positive.sum(1, keepdim=True)
        log_p = (z @ z.mT / tau).masked_fill(eye, -torch.inf).log_softmax(1)
        return eye, positive / count.clamp(min=1), (count > 0).to(z.dtype), log_p

    @staticmethod
    def forward(ctx, z, labels, tau):
        ctx.save_for_backward(z, labels)
        ctx.tau = tau
        eye, share, valid, log_p = SupCon.parts(z, labels, tau)
        return -(share * log_p.masked_fill(eye, 0)).sum() / valid.sum().clamp(min=1)

    @staticmethod
    def gradients(ctx, g, anchors):
        z, labels = ctx.saved_tensors
        _, share, valid, log_p = SupCon.parts(z, labels, ctx.tau)
        d = (log_p.exp() * valid - share) * g / anchors(valid) / ctx.tau
        return (d + d.mT) @ z, None, None

    @staticmethod
    def backward(ctx, g):
        return SupCon.gradients(ctx, g, lambda valid: valid.sum().clamp(min=1))


class SupConAll(SupCon):
    @staticmethod
    def backward(ctx, g):
        return SupCon.gradients(ctx, g, len)


def _sup_con(function):
    def sup_con(z, labels, tau=0.5):
        """Supervised contrastive loss of z (N, D), N > 1, with labels (N,) and temperature tau, from 0.05 to 10.

        A row's: minus the mean log softmax, over the others, of z zᵀ / tau at those of its label; the mean over rows
        which have such.
        """
        expect(
            z.dim() == 2 and labels.shape == z.shape[:1] and len(z) > 1,
            "z (N, D), N > 1, labels (N,)",
            tuple(labels.shape),
        )
        expect(0.05 <= tau <= 10, "tau from 0.05 to 10", tau)
        return function.apply(z, labels, tau)

    return sup_con


add(
    "sup_con_anchors",
    _sup_con,
    SupConAll,
    SupCon,
    lambda: (real(4, 3), torch.tensor([0, 1, 0, 1])),
    bug="backward divides by the number of rows, not of those that have a partner",
    shows="a label that occurs once",
)
