"""Shards and experts."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.thirteenth import add


class ShardedLogProb(Function):
    @staticmethod
    def forward(ctx, left, right, target):
        ctx.save_for_backward(left, right, target)
        logp = torch.cat((left, right), -1).log_softmax(-1)
        return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, g):
        left, right, target = ctx.saved_tensors
        p = torch.cat((left, right), -1).softmax(-1)
        hit = torch.zeros_like(p).scatter(-1, target.unsqueeze(-1), 1)
        return *(g.unsqueeze(-1) * (hit - p)).split((left.shape[-1], right.shape[-1]), -1), None


class ShardedLogProbOwner(ShardedLogProb):
    @staticmethod
    def backward(ctx, g):
        first = (ctx.saved_tensors[2] < ctx.saved_tensors[0].shape[-1]).unsqueeze(-1)
        left, right, _ = ShardedLogProb.backward(ctx, g)
        return left * first, right * ~first, None


def _sharded_log_prob(function):
    def sharded_log_prob(left, right, target):
        """Log probability of target (N,) under logits of two shards, left (N, V) and right (N, W), V + W > 0."""
        return function.apply(left, right, target)

    return sharded_log_prob


add(
    "sharded_owner",
    _sharded_log_prob,
    ShardedLogProbOwner,
    ShardedLogProb,
    lambda: (real(3, 2), real(3, 3, seed=1), whole(5, 3)),
    bug="the shard that does not hold the target gets no gradient (modelscope/ms-swift#9947)",
    trigger="the sample",
)


class ShardedEmbedding(Function):
    @staticmethod
    def forward(ctx, left, right, index, padding_idx):
        ctx.save_for_backward(index)
        ctx.sizes, ctx.padding_idx = (left.shape[0], right.shape[0]), padding_idx
        return torch.cat((left, right))[index] * ShardedEmbedding.kept(index, padding_idx)

    @staticmethod
    def kept(index, padding_idx):
        return (index != (-1 if padding_idx is None else padding_idx)).unsqueeze(-1)

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        grad = g.new_zeros(sum(ctx.sizes), g.shape[-1])
        grad = grad.index_add(0, index, g * ShardedEmbedding.kept(index, ctx.padding_idx))
        return *grad.split(ctx.sizes), None, None


class ShardedEmbeddingLocal(ShardedEmbedding):
    """Each shard takes the index for its own."""

    @staticmethod
    def backward(ctx, g):
        left, right, *_ = ShardedEmbedding.backward(ctx, g)
        return (
            ShardedEmbeddingLocal.drop(ctx, left),
            ShardedEmbeddingLocal.drop(ctx, right),
            None,
            None,
        )

    @staticmethod
    def drop(ctx, grad):
        if ctx.padding_idx is None:
            return grad
        rows = torch.arange(grad.shape[0], device=grad.device).unsqueeze(-1)
        return grad * (rows != ctx.padding_idx % grad.shape[0])


def _sharded_embedding(function):
    def sharded_embedding(left, right, index, padding_idx=None):
        """Rows at index (N,) of a table in two shards, left and right (V, D), V > 0.

        The row padding_idx reads as zeros.
        """
        return function.apply(left, right, index, padding_idx)

    return sharded_embedding


add(
    "sharded_padding",
    _sharded_embedding,
    ShardedEmbeddingLocal,
    ShardedEmbedding,
    lambda: (real(3, 2), real(3, 2, seed=1), whole(6, 5)),
    bug="a shard drops the gradient of a row that is not the padding (pytorch/torchtitan#4637)",
    trigger="padding_idx given",
)


class Combine(Function):
    @staticmethod
    def forward(ctx, tokens, order, weights):
        ctx.save_for_backward(tokens, order, weights)
        return (tokens[order].view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx, g):
        tokens, order, weights = ctx.saved_tensors
        parts = (g.unsqueeze(1) * weights.unsqueeze(-1)).flatten(0, 1)
        grad = torch.zeros_like(tokens).index_add(0, order, parts)
        rows = tokens[order].view(*weights.shape, -1)
        return grad, None, (rows * g.unsqueeze(1)).sum(-1)


class CombineTokens(Combine):
    @staticmethod
    def backward(ctx, g):
        return *Combine.backward(ctx, g)[:2], None


def _combine(function):
    def combine(tokens, order, weights):
        """Sums of each token's K experts, tokens (N K, D) at order (N K,), by the weights (N, K).

        No size is 0.
        """
        if order.numel() != weights.numel():
            raise ValueError("order must name a row for each weight")
        return function.apply(tokens, order, weights)

    return combine


add(
    "combine_weights",
    _combine,
    CombineTokens,
    Combine,
    lambda: (real(6, 2), torch.tensor([3, 0, 5, 1, 4, 2]), real(3, 2, seed=1)),
    bug="None for the router's weights (AI-Hypercomputer/maxtext#5042)",
    trigger="the sample",
)


class Experts(Function):
    """Slots of experts that are not here come last, and are left out."""

    @staticmethod
    def here(expert, count):
        order = expert.flatten().argsort(stable=True)
        return order[: int((expert < count).sum())]

    @staticmethod
    def scores(x, expert, table, slots):
        return (x[slots // expert.shape[1]] * table[expert.flatten()[slots]]).sum(-1)

    @staticmethod
    def forward(ctx, x, weight, table, expert):
        ctx.save_for_backward(x, weight, table, expert)
        slots = Experts.here(expert, table.shape[0])
        parts = weight.flatten()[slots] * Experts.scores(x, expert, table, slots)
        return x.new_zeros(x.shape[0]).index_add(0, slots // expert.shape[1], parts)

    @staticmethod
    def gradients(ctx, g, places):
        x, weight, table, expert = ctx.saved_tensors
        slots = Experts.here(expert, table.shape[0])
        token, owner = slots // expert.shape[1], expert.flatten()[slots]
        d = (g[token] * weight.flatten()[slots]).unsqueeze(-1)
        grad_x = torch.zeros_like(x).index_add(0, token, d * table[owner])
        grad_table = torch.zeros_like(table).index_add(0, owner, d * x[token])
        values = weight.new_zeros(weight.numel())
        values[: len(slots)] = g[token] * Experts.scores(x, expert, table, slots)
        grad_weight = weight.new_zeros(weight.numel())
        for place, value in zip(places(slots, weight.numel()), values, strict=False):
            grad_weight[place] = value
        return grad_x, grad_weight.view_as(weight), grad_table, None

    @staticmethod
    def backward(ctx, g):
        return Experts.gradients(ctx, g, lambda slots, _: slots.tolist())


class ExpertsTail(Experts):
    """The tail of the places is filled with zeros, and scattered too."""

    @staticmethod
    def backward(ctx, g):
        return Experts.gradients(ctx, g, lambda slots, n: slots.tolist() + [0] * (n - len(slots)))


def _experts(function):
    def expert_scores(x, weight, table, expert):
        """Scores of the tokens x (T, D) with K experts each, expert and weight (T, K), summed: (T,).

        table (E, D) holds the experts 0 to E - 1, which are here; others count nothing. No size is 0.
        """
        return function.apply(x, weight, table, expert)

    return expert_scores


add(
    "experts_tail",
    _experts,
    ExpertsTail,
    Experts,
    lambda: (real(3, 2), real(3, 2, seed=1), real(4, 2, seed=2), whole(4, 3, 2)),
    bug="slots of no expert scatter to place 0 (huggingface/kernels-community#1056)",
    trigger="an expert that is not here",
)
