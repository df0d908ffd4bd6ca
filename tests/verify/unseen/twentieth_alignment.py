"""Chains, alignments and lattices: the gradient is the expected use of each part."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import F64, real
from tests.verify.unseen.twentieth import add, check, indices, sized


# log of the sum over tags of exp(emissions + transitions), up to each length
def chain(wrong):
    class Chain(Function):
        @staticmethod
        def forward(ctx, emissions, transitions, lengths):
            sized("emissions", emissions, None, None, None)
            _, steps, tags = emissions.shape
            sized("transitions", transitions, tags, tags)
            sized("lengths", lengths, len(emissions))
            indices("lengths", lengths - 1, steps)
            alpha, alphas = emissions[:, 0], [emissions[:, 0]]
            for t in range(1, steps):
                step = (alpha[:, :, None] + transitions).logsumexp(1) + emissions[:, t]
                alpha = torch.where((t < lengths)[:, None], step, alpha)
                alphas.append(alpha)
            z = alpha.logsumexp(1)
            ctx.save_for_backward(emissions, transitions, lengths, torch.stack(alphas, 1), z)
            return z

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_z):
            emissions, transitions, lengths, alphas, z = ctx.saved_tensors
            steps = emissions.shape[1]
            grad_e, grad_t = torch.zeros_like(emissions), torch.zeros_like(transitions)
            beta = torch.zeros_like(emissions[:, 0])
            g = grad_z[:, None]
            for t in reversed(range(steps)):
                inside = (t < lengths)[:, None]
                p = torch.exp(alphas[:, t] + beta - z[:, None])
                grad_e[:, t] = g * (p if wrong else torch.where(inside, p, 0.0))
                if t == 0:
                    break
                ahead = emissions[:, t] + beta
                both = alphas[:, t - 1, :, None] + transitions + ahead[:, None]
                p = torch.exp(both - z[:, None, None])
                grad_t += (g[..., None] * torch.where(inside[..., None], p, 0.0)).sum(0)
                beta = torch.where(inside, (transitions + ahead[:, None]).logsumexp(2), beta)
            return grad_e, grad_t, None

    return lambda emissions, transitions, lengths: Chain.apply(emissions, transitions, lengths)


add(
    "chain_lengths",
    chain,
    lambda: (real(2, 4, 3), real(3, 3, seed=1), torch.tensor([4, 2])),
    bug="Steps behind a sequence's end get its last step's marginals as their gradient",
)


def softmin(parts, gamma):
    """Soft minimum of the last dimension and its weights."""
    z = -parts / gamma
    return -gamma * z.logsumexp(-1), torch.softmax(z, -1)


# Soft dynamic time warping: r_ij = d_ij + softmin(r_{i-1,j-1}, r_{i-1,j}, r_{i,j-1})
def soft_dtw(wrong):
    class Warp(Function):
        @staticmethod
        def forward(ctx, d, gamma):
            sized("d", d, None, None, None)
            check(gamma > 0, f"expected gamma > 0, got {gamma}")
            batch, n, m = d.shape
            r = d.new_full((batch, n + 1, m + 1), torch.inf)
            r[:, 0, 0] = 0
            weights = d.new_zeros(batch, n, m, 3)
            for i in range(n):
                for j in range(m):
                    parts = torch.stack([r[:, i, j], r[:, i, j + 1], r[:, i + 1, j]], -1)
                    best, weights[:, i, j] = softmin(parts, gamma)
                    r[:, i + 1, j + 1] = d[:, i, j] + best
            ctx.save_for_backward(weights)
            return r[:, n, m].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_r):
            (weights,) = ctx.saved_tensors
            batch, n, m, _ = weights.shape
            e = weights.new_zeros(batch, n + 1, m + 1)
            e[:, n, m] = 1
            for i in reversed(range(n)):
                for j in reversed(range(m)):
                    use = e[:, i + 1, j + 1, None] * weights[:, i, j]
                    e[:, i, j] += use[:, 0]
                    e[:, i, j + 1] += use[:, 1]
                    e[:, i + 1, j] += use[:, 2]
            e = e[:, 1:, 1:]
            return e * (grad_r.view(-1, 1) if wrong else grad_r[:, None, None]), None

    return lambda d, gamma=1.0: Warp.apply(d, gamma)


add(
    "soft_dtw_batch",
    soft_dtw,
    lambda: (real(1, 3, 3, positive=True),),
    bug="pytorch-softdtw (pull request 5): the losses' gradients are multiplied along the rows of"
    " the alignment, not along the batch",
    trigger="a batch of more than one",
)


# Soft alignment: v_ij = softmax of (v_{i-1,j-1} + s_ij, v_{i-1,j} + gap, v_{i,j-1} + gap)
def soft_alignment(wrong):
    class Alignment(Function):
        @staticmethod
        def forward(ctx, s, gap):
            sized("s", s, None, None)
            sized("gap", gap)
            n, m = s.shape
            v = s.new_zeros(n + 1, m + 1)
            v[:, 0] = gap * torch.arange(n + 1, device=s.device)
            v[0] = gap * torch.arange(m + 1, device=s.device)
            weights = s.new_zeros(n, m, 3)
            for i in range(n):
                for j in range(m):
                    parts = torch.stack([v[i, j] + s[i, j], v[i, j + 1] + gap, v[i + 1, j] + gap])
                    v[i + 1, j + 1] = parts.logsumexp(0)
                    weights[i, j] = torch.softmax(parts, 0)
            ctx.save_for_backward(weights)
            return v[n, m].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_v):
            (weights,) = ctx.saved_tensors
            n, m, _ = weights.shape
            e = weights.new_zeros(n + 1, m + 1)
            e[n, m] = grad_v
            grad_s, grad_gap = weights.new_zeros(n, m), weights.new_zeros(())
            for i in reversed(range(n)):
                for j in reversed(range(m)):
                    use = e[i + 1, j + 1] * weights[i, j]
                    grad_s[i, j] = use[0]
                    grad_gap += use[1] + use[2]
                    e[i, j] += use[0]
                    e[i, j + 1] += use[1]
                    e[i + 1, j] += use[2]
            if not wrong:  # v_i0 = i gap, v_0j = j gap
                grad_gap += (e[:, 0] * torch.arange(n + 1, device=e.device)).sum()
                grad_gap += (e[0] * torch.arange(m + 1, device=e.device)).sum()
            return grad_s, grad_gap

    return lambda s, gap: Alignment.apply(s, gap)


add(
    "alignment_first_gaps",
    soft_alignment,
    lambda: (real(3, 4), torch.tensor(-0.7, dtype=F64, requires_grad=True)),
    bug="The gap's gradient counts the gaps inside the table but not those of its first row and"
    " column",
)


# log of the sum over paths right and down of exp(the scores on them)
def lattice(wrong):
    class Lattice(Function):
        @staticmethod
        def forward(ctx, s):
            sized("s", s, None, None)
            alpha = corner_sums(s)
            beta = corner_sums(s.flip(0, 1)).flip(0, 1)
            z = alpha[-1, -1]
            p = torch.exp(alpha + beta - s - z)
            if wrong:
                ctx.p = p
            else:
                ctx.save_for_backward(p)
            return z.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_z):
            if wrong:
                return ctx.p.mul_(grad_z)
            return grad_z * ctx.saved_tensors[0]

    def corner_sums(s):
        a = s.new_full((s.shape[0] + 1, s.shape[1] + 1), -torch.inf)
        a[0, 1] = 0
        for i in range(s.shape[0]):
            for j in range(s.shape[1]):
                a[i + 1, j + 1] = torch.logaddexp(a[i, j + 1], a[i + 1, j]) + s[i, j]
        return a[1:, 1:]

    return lambda s: Lattice.apply(s)


add(
    "lattice_twice",
    lattice,
    lambda: (real(3, 4),),
    bug="k2 (pull request 1106): backward multiplies the gradient kept from forward in place",
    trigger="a second backward through the same graph",
)
