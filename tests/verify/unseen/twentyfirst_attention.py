"""Attention and its relatives: linear, sparse, merged, approximated, between pairs."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfirst import add, check, positive, same, sized


# y_t = sum_s (q_t k_s) v_s / sum_s q_t k_s over s <= t
def normalised_linear_attention(wrong):
    def running_sum(k):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not wrong):
            return k.cumsum(0)

    def attention(q, k, v):
        sized("q", q, None, None)
        same(q, k)
        sized("v", v, len(q), None)
        positive("q", q)
        positive("k", k)
        total = (q * running_sum(k)).sum(1, keepdim=True)
        return (q @ k.T).tril() @ v / total

    return attention


add(
    "normalised_linear_attention",
    normalised_linear_attention,
    lambda: (
        real(4, 2, positive=True),
        real(4, 2, seed=1, positive=True),
        real(4, 3, seed=2),
    ),
    bug="flash-linear-attention (pull request 875): the running sum of the keys, which normalises,"
    " comes from a helper that records nothing",
)


# Nystrom attention: the inverse of a = softmax(scores) by steps from a' / (largest row and column sums)
def iterated_inverse(wrong):
    def start(a):
        scale = a.sum(-1).amax(-1) * a.sum(-2).amax(-1)
        if wrong:
            scale = scale.detach()
        return a.mT / scale[..., None, None]

    def inverse(scores, steps=2):
        check(
            scores.ndim >= 2 and scores.shape[-1] == scores.shape[-2] >= 1,
            "expected square matrices",
        )
        a = scores.softmax(-1)
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        z = start(a)
        for _ in range(steps):
            az = a @ z
            z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
        return z

    return inverse


add(
    "iterated_inverse_scale",
    iterated_inverse,
    lambda: (real(3, 3),),
    bug="The scale of the starting matrix is taken for a constant, which it is for a finished"
    " iteration only",
)


# y = s memory + (1 - s) local, s = sigmoid(gate) for each head
def memory_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, memory, local, gate):
            sized("memory", memory, None, None, None, None)
            same(memory, local)
            sized("gate", gate, memory.shape[1])
            ctx.save_for_backward(memory, local, gate)
            s = gate.sigmoid()[:, None, None]
            return s * memory + (1 - s) * local

        @staticmethod
        def backward(ctx, grad_y):
            memory, local, gate = ctx.saved_tensors
            s = gate.sigmoid()
            grad_s = ((memory - local) * grad_y).sum((2, 3))
            grad_s = grad_s[0] if wrong else grad_s.sum(0)
            share = s[:, None, None]
            return share * grad_y, (1 - share) * grad_y, s * (1 - s) * grad_s

    return lambda memory, local, gate: Gate.apply(memory, local, gate)


add(
    "memory_gate_batch",
    memory_gate,
    lambda: (real(1, 2, 3, 2), real(1, 2, 3, 2, seed=1), real(2, seed=2)),
    bug="The rows of the batch past the first are lost for the gate, as in unsloth-zoo (pull request 776)",
    trigger="a batch of two",
)


# Attention in blocks of two positions, of which layout says which see which
def block_sparse_attention(wrong):
    def spread(layout):
        return layout.repeat_interleave(2, 0).repeat_interleave(2, 1)

    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v, layout):
            scores = (q @ k.T).masked_fill(~spread(layout), float("-inf"))
            total = scores.logsumexp(1, keepdim=True)
            ctx.save_for_backward(q, k, v, layout, total)
            return (scores - total).exp() @ v

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            q, k, v, layout, total = ctx.saved_tensors
            p = (q @ k.T).masked_fill(~spread(layout), float("-inf")).sub(total).exp()
            grad_p = grad_y @ v.T
            slope = grad_p - (p * grad_p).sum(1, keepdim=True)
            grad_q = (p * slope) @ k
            if wrong:
                seen = spread(layout.T)
                p = (q @ k.T).masked_fill(~seen, float("-inf")).sub(total).exp()
            grad_k = (p * slope).T @ q
            return grad_q, grad_k, p.T @ grad_y, None

    def attention(q, k, v, layout):
        sized("q", q, None, None)
        same(q, k)
        sized("v", v, len(q), None)
        check(len(q) % 2 == 0, "expected an even number of positions")
        sized("layout", layout, len(q) // 2, len(q) // 2)
        if layout.dtype != torch.bool:
            raise TypeError("layout: expected booleans")
        check(bool(layout.any(1).all()), "every block of queries needs a block of keys")
        return Attention.apply(q, k, v, layout)

    return attention


add(
    "block_sparse_layout",
    block_sparse_attention,
    lambda: (
        real(6, 2),
        real(6, 2, seed=1),
        real(6, 2, seed=2),
        torch.tensor([[True, True, False], [True, True, True], [False, True, True]]),
    ),
    bug="The loop over the blocks of keys reads the layout's rows for its columns",
    trigger="a layout that is not symmetric, as a causal one",
)


# The attention over two sets of keys from that over each, with the logarithms of their sums
def merge(wrong):
    class Merge(Function):
        @staticmethod
        def forward(ctx, y1, l1, y2, l2):
            sized("y1", y1, None, None)
            same(y1, y2)
            sized("l1", l1, len(y1))
            same(l1, l2)
            top = torch.maximum(l1, l2)
            check(bool(top.isfinite().all()), "expected one finite sum in every row")
            ctx.save_for_backward(y1, l1, y2, l2)
            w = (l1 - l2).sigmoid()[:, None]
            return w * y1 + (1 - w) * y2, torch.logaddexp(l1, l2)

        @staticmethod
        def backward(ctx, grad_y, grad_l):
            y1, l1, y2, l2 = ctx.saved_tensors
            w = (l1 - l2).sigmoid()
            if wrong:
                grad_l1 = w * (y1 * grad_y).sum(1)
                grad_l2 = (1 - w) * (y2 * grad_y).sum(1)
            else:
                grad_l1 = w * (1 - w) * ((y1 - y2) * grad_y).sum(1)
                grad_l2 = -grad_l1
            grads = w[:, None] * grad_y, (1 - w[:, None]) * grad_y
            return grads[0], grad_l1 + w * grad_l, grads[1], grad_l2 + (1 - w) * grad_l

    return lambda y1, l1, y2, l2: Merge.apply(y1, l1, y2, l2)


add(
    "merged_attention_total",
    merge,
    lambda: (real(3, 2), real(3, seed=1), real(3, 2, seed=2), real(3, seed=3)),
    bug="Each part's weight is differentiated as if their total did not change",
)


# Performer: the features exp(w x - |x|^2 / 2 - largest) + eps
def random_features(wrong):
    def features(x, w, dim, eps):
        e = x @ w.T - (x * x).sum(1, keepdim=True) / 2
        largest = e.amax(dim, keepdim=True)
        if wrong:
            largest = largest.detach()
        return (e - largest).exp() + eps

    def attention(q, k, v, w, eps=1e-2):
        sized("q", q, None, None)
        sized("k", k, None, q.shape[1])
        sized("v", v, len(k), None)
        sized("w", w, None, q.shape[1])
        check(eps > 0, "expected eps > 0")
        fq, fk = features(q, w, 1, eps), features(k, w, (0, 1), eps)
        return fq @ (fk.T @ v) / (fq @ fk.sum(0))[:, None]

    return attention


add(
    "random_features_largest",
    random_features,
    lambda: (real(3, 2), real(4, 2, seed=1), real(4, 2, seed=2), real(3, 2, seed=3)),
    bug="The largest exponent is taken for a constant, though eps, added after it, keeps it from cancelling",
)


# AlphaFold: y_ij = sum_k a_ik b_jk along outgoing edges, sum_k a_ki b_kj along incoming ones
def triangle(wrong):
    class Triangle(Function):
        @staticmethod
        def forward(ctx, a, b, incoming):
            sized("a", a, None, a.shape[0], None)
            same(a, b)
            ctx.save_for_backward(a, b)
            ctx.incoming = incoming
            return torch.einsum("kic,kjc->ijc" if incoming else "ikc,jkc->ijc", a, b)

        @staticmethod
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            if not ctx.incoming:
                grad_a = torch.einsum("ijc,jkc->ikc", grad_y, b)
                return grad_a, torch.einsum("ijc,ikc->jkc", grad_y, a), None
            grad_a = torch.einsum("ijc,kjc->kic", grad_y, b)
            path = "ijc,ikc->kjc" if wrong else "ijc,kic->kjc"
            return grad_a, torch.einsum(path, grad_y, a), None

    return lambda a, b, incoming=False: Triangle.apply(a, b, incoming)


add(
    "triangle_incoming",
    triangle,
    lambda: (real(3, 3, 2), real(3, 3, 2, seed=1)),
    bug="The second factor's gradient along incoming edges was copied from the outgoing ones",
    trigger="incoming=True",
)
