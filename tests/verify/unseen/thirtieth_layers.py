"""Norms, attention, convolution's neighbours, experts and Modules."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import F64, outside_autocast, real, whole
from tests.verify.unseen.thirtieth import add, add_bare, bounded, check, indices, sized


# Rows divided by their p-norm, as torch's normalize; a row of zeros stays, with slope 0
def lp_rows(wrong):
    class Rows(Function):
        @staticmethod
        def forward(ctx, x, p):
            ctx.save_for_backward(x)
            ctx.p = p
            return x / length(x, p)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            norm = length(x, ctx.p)
            y = x / norm
            slope = y if wrong else y * y.abs().pow(ctx.p - 2)
            grad = (grad_y - slope * (grad_y * y).sum(-1, keepdim=True)) / norm
            return torch.where((x != 0).any(-1, keepdim=True), grad, 0), None

    def length(x, p):
        top = x.detach().abs().amax(-1, keepdim=True)
        top = torch.where(top > 0, top, 1)
        total = (x / top).abs().pow(p).sum(-1, keepdim=True)
        return top * torch.where(total > 0, total, 1).pow(1 / p)

    def rows(x, p=2):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected one number in a row at least")
        check(p in (2, 3, 4), "p: expected 2, 3 or 4")
        bounded("x", x, -1e6, 1e6)
        small = (x.abs() < 1e-6) & (x != 0)
        check(not bool(small.any()), "x: expected numbers of 1e-6 or more, or 0")
        return Rows.apply(x, p)

    return rows


add(
    "lp_normalize_power",
    lp_rows,
    lambda: (real(3, 4),),
    bug="Backward is that of the Euclidean norm",
    trigger="p=3; the default is 2",
)


# x_t less the mean of x_1 .. x_t, over the last dimension: the centring of causal norms
def causal_centre(wrong):
    class Centre(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x - x.cumsum(-1) / counts(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad_y):
            share = grad_y / counts(grad_y)
            back = share.cumsum(-1) if wrong else share.flip(-1).cumsum(-1).flip(-1)
            return grad_y - back

    def counts(x):
        return torch.arange(1, x.shape[-1] + 1, device=x.device).to(x.dtype)

    def centre(x):
        check(x.ndim >= 1, "x: expected one dimension at least")
        bounded("x", x, -1e4, 1e4)
        return Centre.apply(x)

    return centre


add(
    "causal_centre_reversed",
    causal_centre,
    lambda: (real(2, 5),),
    bug="The running sum's adjoint is taken to run forwards too",
)


# Attention of one head by blocks of 32 queries
def blocked_attention(wrong):
    class Attention(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return torch.cat([scores(a, k).softmax(1) @ v for a in q.split(32)])

        @staticmethod
        def backward(ctx, grad_y):
            q, k, v = ctx.saved_tensors
            grads, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
            for a, g in zip(q.split(32), grad_y.split(32), strict=True):
                p = scores(a, k).softmax(1)
                grad_v = grad_v + p.mT @ g
                grad_p = g @ v.mT
                grad_s = p * (grad_p - (p * grad_p).sum(1, keepdim=True)) * k.shape[1] ** -0.5
                grads.append(grad_s @ k)
                grad_k = grad_s.mT @ a if wrong else grad_k + grad_s.mT @ a
            return torch.cat(grads), grad_k, grad_v

    def scores(q, k):
        return q @ k.mT * k.shape[1] ** -0.5

    def attention(q, k, v):
        sized("q", q, None, None)
        sized("k", k, None, q.shape[1])
        sized("v", v, len(k), None)
        bounded("q", q, -1e3, 1e3)
        bounded("k", k, -1e3, 1e3)
        bounded("v", v, -1e6, 1e6)
        return Attention.apply(q, k, v)

    return attention


add(
    "query_blocks_keys",
    blocked_attention,
    lambda: (real(4, 3), real(5, 3, seed=1), real(5, 2, seed=2)),
    bug="The keys' gradient is written by each block of queries, the values' is added up",
    trigger="more than 32 queries",
)


# Rotation-free xPos: queries times r^i, keys times r^-i, i their place, and their products
def decayed_scores(wrong):
    class Scores(Function):
        @staticmethod
        def forward(ctx, q, k, r):
            ctx.save_for_backward(q, k)
            ctx.r = r
            return (q * powers(q, r)) @ (k / powers(k, r)).mT

        @staticmethod
        def backward(ctx, grad_y):
            q, k = ctx.saved_tensors
            of_q, of_k = powers(q, ctx.r), powers(k, ctx.r)
            grad_q = grad_y @ (k / of_k) * of_q
            grad_k = grad_y.mT @ (q * of_q)
            return grad_q, grad_k * of_k if wrong else grad_k / of_k, None

    def powers(t, r):
        return r ** torch.arange(len(t), device=t.device).to(t.dtype)[:, None]

    def scores(q, k, r=0.99):
        sized("q", q, None, None)
        sized("k", k, None, q.shape[1])
        check(0.9 <= r < 1, "r: expected a number from 0.9, below 1")
        check(len(k) <= 200, "k: expected 200 places at most")
        return Scores.apply(q, k, float(r))

    return scores


add(
    "xpos_key_scale",
    decayed_scores,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="The keys' gradient is multiplied by the scale that they were divided by",
)


# Softmax with one more class of score 0, which is left out: exp x / (1 + Σ exp x)
def softmax_one(wrong):
    class One(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return shares(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            p = x.exp() / (1 + x.exp().sum(-1, keepdim=True)) if wrong else shares(x)
            return p * (grad_y - (grad_y * p).sum(-1, keepdim=True))

    def shares(x):
        return F.pad(x, (0, 1)).softmax(-1)[..., :-1]

    def softmax(x):
        check(x.ndim >= 1 and x.shape[-1] > 0, "x: expected one class at least")
        bounded("x", x, -1e6, 1e6)
        return One.apply(x)

    return softmax


add(
    "softmax_one_overflow",
    softmax_one,
    lambda: (real(3, 4),),
    bug="Backward takes the exponentials without subtracting the maximum",
    trigger="large scores, above 88 in float32 and 709 in float64",
)


# ShuffleNet's shuffle of channels: groups by channels in a group, transposed
def channel_shuffle(wrong):
    class Shuffle(Function):
        @staticmethod
        def forward(ctx, x, groups):
            ctx.groups = groups
            return shuffle(x, groups)

        @staticmethod
        def backward(ctx, grad_y):
            groups = ctx.groups if wrong else grad_y.shape[1] // ctx.groups
            return shuffle(grad_y, groups), None

    def shuffle(x, groups):
        n, c = x.shape[:2]
        parts = x.reshape(n, groups, c // groups, *x.shape[2:])
        return parts.transpose(1, 2).reshape(x.shape)

    def layer(x, groups=2):
        check(x.ndim >= 2 and x.numel() > 0, "x: expected a batch, channels and places")
        check(isinstance(groups, int) and groups >= 1, "groups: expected a positive integer")
        check(x.shape[1] % groups == 0, "x: expected channels in equal groups")
        return Shuffle.apply(x, groups)

    return layer


add(
    "channel_shuffle_square",
    channel_shuffle,
    lambda: (real(2, 4, 3, 3),),
    bug="Backward shuffles with the same number of groups, which undoes it only for groups² channels",
    trigger="six channels in two groups",
)


# The weights of DeepSeek's router: sigmoids of the chosen experts' scores, to sum to a factor
def sigmoid_router(wrong):
    class Router(Function):
        @staticmethod
        def forward(ctx, x, chosen, factor):
            ctx.save_for_backward(x, chosen)
            ctx.factor = factor
            s = x.gather(1, chosen).sigmoid()
            return factor * s / s.sum(1, keepdim=True)

        @staticmethod
        def backward(ctx, grad_y):
            x, chosen = ctx.saved_tensors
            s = x.gather(1, chosen).sigmoid()
            total = s.sum(1, keepdim=True)
            inner = (grad_y * s).sum(1, keepdim=True) / total
            grad = (grad_y - inner) / total * s * (1 - s)
            if not wrong:
                grad = grad * ctx.factor
            return torch.zeros_like(x).scatter_add(1, chosen, grad), None, None

    def router(x, chosen, factor=1.0):
        sized("x", x, None, None)
        sized("chosen", chosen, len(x), None)
        indices("chosen", chosen, x.shape[1])
        check(chosen.shape[1] <= x.shape[1], "chosen: more than there are experts")
        check(bool((chosen.sort(1)[0].diff(dim=1) > 0).all()), "chosen: an expert stands twice")
        check(0 < factor <= 100, "factor: expected a positive number up to 100")
        bounded("x", x, -10, 10)
        return Router.apply(x, chosen.long(), float(factor))

    return router


add(
    "sigmoid_router_factor",
    sigmoid_router,
    lambda: (real(3, 4), torch.tensor([[0, 2], [3, 1], [1, 2]])),
    bug="Backward forgets the routed scaling factor",
    trigger="a factor that is not 1, the default",
)


class TiedFunction(Function):
    """Scores of the next token: each token's row of the table, squashed, times the table."""

    @staticmethod
    def forward(ctx, token, table, wrong):
        ctx.save_for_backward(token, table)
        ctx.wrong = wrong
        return table[token].tanh() @ table.mT

    @staticmethod
    def backward(ctx, grad_y):
        token, table = ctx.saved_tensors
        h = table[token].tanh()
        grad_h = (grad_y @ table) * (1 - h * h)
        grad_out = grad_y.flatten(0, -2).mT @ h.flatten(0, -2)
        grad_in = torch.zeros_like(table)
        if ctx.wrong:
            return None, grad_out, None
        grad_in = grad_in.index_add(0, token.flatten(), grad_h.flatten(0, -2))
        return None, grad_in + grad_out, None


class Tied(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.table = nn.Parameter(real(6, 3, seed=5, grad=False))

    @outside_autocast
    def forward(self, token):
        check(token.ndim >= 1 and token.numel() > 0, "token: expected one token at least")
        indices("token", token, len(self.table))
        return TiedFunction.apply(token.long(), self.table, self.wrong)


add_bare(
    "tied_weights_once",
    Tied,
    lambda: (whole(6, 2, 3),),
    bug="A table that is used twice gets the gradient of its second use only",
)


class Folded(nn.Module):
    """A linear layer and a norm with fixed statistics; in eval mode the norm's scale is folded into the weight."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong
        self.weight = nn.Parameter(real(3, 4, seed=5, grad=False))
        self.scale = nn.Parameter(real(3, seed=6, grad=False, positive=True))
        self.register_buffer("mean", torch.linspace(-1, 1, 3, dtype=F64))
        self.folded = None

    def train(self, mode=True):
        self.folded = None
        return super().train(mode)

    def forward(self, x):
        check(x.ndim >= 1 and x.shape[-1] == 4, "x: expected 4 features")
        if self.training:
            return (F.linear(x, self.weight) - self.mean) * self.scale
        folded = self.folded
        if folded is None or not self.wrong:
            folded = self.weight * self.scale[:, None]
        if self.wrong:
            self.folded = folded
        return F.linear(x, folded, -self.mean * self.scale)


add_bare(
    "folded_norm_cached",
    Folded,
    lambda: (real(2, 4),),
    bug="The folded weight is kept with its graph, which the first backward frees",
    trigger="eval mode, and a second call after a backward or after the weight has changed",
)
