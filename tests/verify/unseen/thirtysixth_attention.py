"""Attention, gates and recurrent cells."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtysixth import add, alike, bounded, check, same, sized


# Heads (B, H, T, D) attend to a latent (B, S, R) that the weights (H, D, R) turn into keys; it is the values, too
def latent_attention(wrong):
    class Attend(Function):
        @staticmethod
        def forward(ctx, q, latent, up):
            ctx.save_for_backward(q, latent, up)
            key = torch.einsum("bsr,hdr->bhsd", latent, up)
            p = (q @ key.mT * q.shape[-1] ** -0.5).softmax(-1)
            return p @ latent[:, None]

        @staticmethod
        def backward(ctx, g):
            q, latent, up = ctx.saved_tensors
            scale = q.shape[-1] ** -0.5
            key = torch.einsum("bsr,hdr->bhsd", latent, up)
            p = (q @ key.mT * scale).softmax(-1)
            grad_p = g @ latent[:, None].mT
            grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
            grad_s = grad_s * (latent.shape[-1] ** -0.5 if wrong else scale)
            grad_key = grad_s.mT @ q
            grad_latent = (p.mT @ g).sum(1) + torch.einsum("bhsd,hdr->bsr", grad_key, up)
            return grad_s @ key, grad_latent, torch.einsum("bhsd,bsr->hdr", grad_key, latent)

    def attend(q, latent, up):
        sized("q", q, None, None, None, None)
        sized("latent", latent, q.shape[0], None, None)
        sized("up", up, q.shape[1], q.shape[3], latent.shape[2])
        alike(q, latent, up)
        for name, t in {"q": q, "latent": latent, "up": up}.items():
            bounded(name, t, -30, 30)
        return Attend.apply(q, latent, up)

    return attend


add(
    "latent_attention_rank",
    latent_attention,
    lambda: (real(2, 2, 3, 4), real(2, 3, 4, seed=1), real(2, 4, 4, seed=2)),
    bug="Backward scales by the latent's rank where forward scales by the head's size",
    trigger="a rank that is not the head's size",
)


# Attention with the feature map elu + 1: (B, T, D), (B, S, D), (B, S, E); only keys that count
def kernel_attention(wrong):
    def feature(x):
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    def slope(x):
        return torch.where(x > 0, torch.ones_like(x), x.clamp(max=0).exp())

    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v, keep):
            ctx.save_for_backward(q, k, v, keep)
            a, b = feature(q), feature(k) * keep[..., None]
            total = a @ b.sum(1)[..., None] + 1e-3
            return a @ (b.mT @ v) / total

        @staticmethod
        def backward(ctx, g):
            q, k, v, keep = ctx.saved_tensors
            a, b = feature(q), feature(k) * keep[..., None]
            total = a @ b.sum(1)[..., None] + 1e-3
            y = a @ (b.mT @ v) / total
            g = g / total
            lost = (g * y).sum(-1, keepdim=True)
            grad_a = g @ (b.mT @ v).mT - lost * b.sum(1)[:, None]
            grad_b = v @ (g.mT @ a) - (a * lost).sum(1)[:, None]
            if not wrong:
                grad_b = grad_b * keep[..., None]
            return grad_a * slope(q), grad_b * slope(k), b @ (a.mT @ g), None

    def attend(q, k, v, keep):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, *k.shape[:2], None)
        sized("keep", keep, *k.shape[:2])
        alike(q, k, v)
        check(keep.dtype == torch.bool, "keep: expected booleans")
        for name, t in {"q": q, "k": k, "v": v}.items():
            bounded(name, t, -30, 30)
        return Attend.apply(q, k, v, keep)

    return attend


add(
    "kernel_attention_mask",
    kernel_attention,
    lambda: (
        real(2, 3, 4),
        real(2, 5, 4, seed=1),
        real(2, 5, 2, seed=2),
        torch.ones(2, 5, dtype=torch.bool),
    ),
    bug="Keys that are masked out get a gradient: backward applies the mask to the features alone",
    trigger="a mask with a False",
)


# One learned query (D,) reads a sequence (B, T, D)
def query_pool(wrong):
    class Pool(Function):
        @staticmethod
        def forward(ctx, x, query):
            p = (x @ query * len(query) ** -0.5).softmax(-1)
            ctx.save_for_backward(x, query, p)
            return (p[..., None] * x).sum(1)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            x, query, p = ctx.saved_tensors
            grad_x = p[..., None] * g[:, None]
            grad_p = (x * g[:, None]).sum(-1)
            grad_p = grad_p - (p * grad_p).sum(-1, keepdim=True)
            grad_s = p.data.mul_(grad_p) if wrong else p * grad_p
            grad_s = grad_s * len(query) ** -0.5
            return grad_x + grad_s[..., None] * query, (grad_s[..., None] * x).sum((0, 1))

    def pool(x, query):
        sized("x", x, None, None, None)
        sized("query", query, x.shape[2])
        alike(x, query)
        bounded("x", x, -100, 100)
        bounded("query", query, -100, 100)
        return Pool.apply(x, query)

    return pool


add(
    "query_pool_weights_written",
    query_pool,
    lambda: (real(2, 4, 3), real(3, seed=1)),
    bug="Backward writes the scores' gradient over the weights that it saved",
    trigger="a second backward through one graph",
)


# Two partial results of attention (N, D), each with its logarithm of the sum (N,), become one
def merge_partials(wrong):
    class Merge(Function):
        @staticmethod
        def forward(ctx, a, la, b, lb):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(a, la, b, lb)
            share = (la - lb).sigmoid()[:, None]
            return share * a + (1 - share) * b, torch.logaddexp(la, lb)

        @staticmethod
        def backward(ctx, g, grad_log):
            a, la, b, lb = ctx.saved_tensors
            if g is None and (wrong or grad_log is None):
                return None, None, None, None
            share = (la - lb).sigmoid()
            rest = (lb - la).sigmoid()
            grads = [None, torch.zeros_like(la), None, torch.zeros_like(lb)]
            if g is not None:
                moved = (g * (a - b)).sum(-1) * share * rest
                grads = [g * share[:, None], moved, g * rest[:, None], -moved]
            if grad_log is not None:
                grads[1] = grads[1] + grad_log * share
                grads[3] = grads[3] + grad_log * rest
            return tuple(grads)

    def merge(a, la, b, lb):
        sized("a", a, None, None)
        same(a, b)
        sized("la", la, len(a))
        sized("lb", lb, len(a))
        alike(a, la, b, lb)
        for name, t in {"a": a, "la": la, "b": b, "lb": lb}.items():
            bounded(name, t, -1e3, 1e3)
        return Merge.apply(a, la, b, lb)

    return merge


add(
    "merge_partials_log_alone",
    merge_partials,
    lambda: (real(4, 3), real(4, seed=1), real(4, 3, seed=2), real(4, seed=3)),
    bug="Where the outputs' gradient is None backward returns at once and drops the logarithm's",
    trigger="a loss of the logarithms alone",
)


# Causal attention (B, H, T, D), (B, H, S, D), whose scores fall with the distance by a slope that each head learns
def slopes_attention(wrong):
    def distance(q, k):
        t, s = q.shape[2], k.shape[2]
        row = torch.arange(s - t, s, device=q.device)[:, None]
        return row - torch.arange(s, device=q.device)

    def weights(q, k, slope):
        d = distance(q, k)
        s = q @ k.mT * q.shape[-1] ** -0.5 - slope[:, None, None] * d
        return s.masked_fill(d < 0, -torch.inf).softmax(-1)

    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v, slope):
            ctx.save_for_backward(q, k, v, slope)
            return weights(q, k, slope) @ v

        @staticmethod
        def backward(ctx, g):
            q, k, v, slope = ctx.saved_tensors
            p = weights(q, k, slope)
            grad_p = g @ v.mT
            grad_s = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
            d = distance(q, k)
            if wrong:
                d = (d - (k.shape[2] - q.shape[2])).clamp(min=0)
            grad_slope = -(grad_s * d).sum((0, 2, 3))
            grad_s = grad_s * q.shape[-1] ** -0.5
            return grad_s @ k, grad_s.mT @ q, p.mT @ g, grad_slope

    def attend(q, k, v, slope):
        sized("q", q, None, None, None, None)
        sized("k", k, *q.shape[:2], None, q.shape[3])
        sized("v", v, *k.shape[:3], None)
        sized("slope", slope, q.shape[1])
        alike(q, k, v, slope)
        check(k.shape[2] >= q.shape[2], "k: expected as many keys as queries at least")
        for name, t in {"q": q, "k": k, "v": v, "slope": slope}.items():
            bounded(name, t, -30, 30)
        return Attend.apply(q, k, v, slope)

    return attend


add(
    "slopes_attention_cached",
    slopes_attention,
    lambda: (
        real(2, 2, 3, 3),
        real(2, 2, 3, 3, seed=1),
        real(2, 2, 3, 2, seed=2),
        real(2, seed=3, positive=True),
    ),
    bug="The slopes' gradient counts distances as if queries started at the first key",
    trigger="more keys than queries, as with a cache",
)


# A GRU's step whose reset gate acts after the product with the state: x's part (B, 3 H), state (B, H), u (3 H, H)
def reset_after(wrong):
    def gates(x, h, u, bias):
        inner = (h @ u.mT + bias).chunk(3, -1)
        outer = x.chunk(3, -1)
        r, z = (outer[0] + inner[0]).sigmoid(), (outer[1] + inner[1]).sigmoid()
        return r, z, (outer[2] + r * inner[2]).tanh(), inner[2]

    class Step(Function):
        @staticmethod
        def forward(ctx, x, h, u, bias):
            ctx.save_for_backward(x, h, u, bias)
            _, z, n, _ = gates(x, h, u, bias)
            return (1 - z) * n + z * h

        @staticmethod
        def backward(ctx, g):
            x, h, u, bias = ctx.saved_tensors
            r, z, n, inner = gates(x, h, u, bias)
            grad_n = g * (1 - z) * (1 - n * n)
            grad_z = g * (h - n) * z * (1 - z)
            grad_r = grad_n * inner * r * (1 - r)
            grad_x = torch.cat([grad_r, grad_z, grad_n], -1)
            grad_inner = torch.cat([grad_r, grad_z, grad_n * r], -1)
            grad_bias = (grad_x if wrong else grad_inner).sum(0)
            return grad_x, g * z + grad_inner @ u, grad_inner.mT @ h, grad_bias

    def step(x, h, u, bias):
        sized("h", h, None, None)
        n = h.shape[1]
        sized("x", x, h.shape[0], 3 * n)
        sized("u", u, 3 * n, n)
        sized("bias", bias, 3 * n)
        alike(x, h, u, bias)
        for name, t in {"x": x, "h": h, "u": u, "bias": bias}.items():
            bounded(name, t, -1e3, 1e3)
        return Step.apply(x, h, u, bias)

    return step


add(
    "reset_after_bias",
    reset_after,
    lambda: (real(3, 6), real(3, 2, seed=1), real(6, 2, seed=2), real(6, seed=3)),
    bug="The inner bias takes the outer bias's gradient, without the reset gate's factor",
)


# A simple recurrent unit over (B, T, H) from the state c (B, H): the outputs and the last state
def simple_unit(wrong):
    def states(u, f, c):
        found = [c]
        for t in range(u.shape[1]):
            found.append(f[:, t] * found[-1] + (1 - f[:, t]) * u[:, t])
        return found

    class Unit(Function):
        @staticmethod
        def forward(ctx, u, forget, reset, x, c):
            ctx.save_for_backward(u, forget, reset, x, c)
            found = states(u, forget.sigmoid(), c)
            r = reset.sigmoid()
            return r * torch.stack(found[1:], 1).tanh() + (1 - r) * x, found[-1].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, g, grad_last):
            u, forget, reset, x, c = ctx.saved_tensors
            f, r = forget.sigmoid(), reset.sigmoid()
            found = states(u, f, c)
            y = torch.stack(found[1:], 1).tanh()
            grad_reset, grad_x = g * (y - x) * r * (1 - r), g * (1 - r)
            grad_y = g * r * (1 - y * y)
            grad_u, grad_f = torch.zeros_like(u), torch.zeros_like(u)
            grad_c = grad_last if wrong else grad_last.clone()
            for t in reversed(range(u.shape[1])):
                grad_c += grad_y[:, t]
                grad_u[:, t] = grad_c * (1 - f[:, t])
                grad_f[:, t] = grad_c * (found[t] - u[:, t])
                grad_c *= f[:, t]
            return grad_u, grad_f * f * (1 - f), grad_reset, grad_x, grad_c

    def run(u, forget, reset, x, c):
        sized("u", u, None, None, None)
        same(u, forget, reset, x)
        sized("c", c, u.shape[0], u.shape[2])
        alike(u, forget, reset, x, c)
        for name, t in {"u": u, "forget": forget, "reset": reset, "x": x, "c": c}.items():
            bounded(name, t, -1e3, 1e3)
        return Unit.apply(u, forget, reset, x, c)

    return run


add(
    "simple_unit_last_written",
    simple_unit,
    lambda: (*(real(2, 3, 2, seed=i) for i in range(4)), real(2, 2, seed=4)),
    bug="Backward runs its recurrence in the gradient that it was given for the last state",
    trigger="a grad_output that the caller uses again, or that is expanded",
)


# Softmax of scores (E,) over the edges of each of `count` nodes
def segment_shares(wrong):
    def total(t, ids, count):
        return torch.zeros(count, dtype=t.dtype, device=t.device).index_add(0, ids, t)

    class Shares(Function):
        @staticmethod
        def forward(ctx, s, ids, count):
            top = torch.full((count,), -torch.inf, dtype=s.dtype, device=s.device)
            e = (s - top.scatter_reduce(0, ids, s, "amax")[ids]).exp()
            y = e / total(e, ids, count)[ids]
            ctx.save_for_backward(y, ids)
            ctx.count = count
            return y

        @staticmethod
        def backward(ctx, g):
            y, ids = ctx.saved_tensors
            mean = total(y * g, ids, ctx.count)
            counts = ids.bincount(minlength=ctx.count)
            back = mean.repeat_interleave(counts) if wrong else mean[ids]
            return y * (g - back), None, None

    def shares(s, ids, count=4):
        sized("s", s, None)
        same(s, ids)
        check(s.is_floating_point(), "s: expected floating point numbers")
        check(ids.dtype == torch.int64, "ids: expected int64")
        check(isinstance(count, int), "count: expected an integer")
        check(bool(((ids >= 0) & (ids < count)).all()), "ids: expected nodes below count")
        bounded("s", s, -1e4, 1e4)
        return Shares.apply(s, ids, count)

    return shares


add(
    "segment_shares_sorted",
    segment_shares,
    lambda: (real(7), torch.tensor([0, 0, 1, 1, 1, 3, 3])),
    bug="Backward spreads the nodes' means by their numbers of edges, as if edges were sorted",
    trigger="edges that are not sorted by node",
)


# Relaxed choice of k of N: k softmaxes, each of which lowers the logits of what is chosen already
def relaxed_subset(wrong):
    def rounds(s, k, t):
        found = []
        for _ in range(k):
            p = (s / t).softmax(-1)
            found.append(p)
            s = s + torch.log1p(-p.clamp(max=0.999))
        return found

    class Subset(Function):
        @staticmethod
        def forward(ctx, s, noise, k, t):
            ctx.save_for_backward(s, noise)
            ctx.k, ctx.t = k, t
            return sum(rounds(s + noise, k, t))

        @staticmethod
        def backward(ctx, g):
            s, noise = ctx.saved_tensors
            grad_s = torch.zeros_like(s)
            for p in reversed(rounds(s + noise, ctx.k, ctx.t)):
                down = g
                if not wrong:
                    below = (p < 0.999).to(p.dtype)
                    down = g - grad_s * below / (1 - p.clamp(max=0.999))
                grad_s = grad_s + p * (down - (p * down).sum(-1, keepdim=True)) / ctx.t
            return grad_s, grad_s, None, None

    def choose(s, noise, k=2, t=0.7):
        sized("s", s, None, None)
        same(s, noise)
        alike(s, noise)
        check(isinstance(k, int) and k >= 1, "k: expected a positive integer")
        check(0.1 <= t <= 100, "t: expected a temperature from 0.1 to 100")
        bounded("s", s, -100, 100)
        bounded("noise", noise, -100, 100)
        return Subset.apply(s, noise, k, t)

    return choose


add(
    "relaxed_subset_rounds",
    relaxed_subset,
    lambda: (real(2, 5), real(2, 5, seed=1)),
    bug="Backward takes what earlier rounds lower the logits by for constant",
    trigger="the sample, with a grad_output other than a constant",
)


# Gaussian actions under tanh, (B, A): the action and its log-probability, from mean, log of deviation and noise
def squashed_policy(wrong):
    def parts(mean, log_std, noise):
        std = log_std.exp()
        return std, mean + std * noise

    class Policy(Function):
        @staticmethod
        def forward(ctx, mean, log_std, noise):
            ctx.save_for_backward(mean, log_std, noise)
            _, u = parts(mean, log_std, noise)
            log_slope = 2 * (0.6931471805599453 - u - torch.nn.functional.softplus(-2 * u))
            density = -noise * noise / 2 - log_std - 0.9189385332046727
            return u.tanh(), (density - log_slope).sum(-1)

        @staticmethod
        def backward(ctx, g, grad_log):
            mean, log_std, noise = ctx.saved_tensors
            std, u = parts(mean, log_std, noise)
            a = u.tanh()
            along = g * (1 - a * a)
            grad_log = grad_log[:, None]
            grad_u = along + 2 * a * grad_log
            grad_std = (along if wrong else grad_u) * std * noise - grad_log
            return grad_u, grad_std, grad_u * std - noise * grad_log

    def act(mean, log_std, noise):
        sized("mean", mean, None, None)
        same(mean, log_std, noise)
        alike(mean, log_std, noise)
        bounded("mean", mean, -100, 100)
        bounded("log_std", log_std, -10, 3)
        bounded("noise", noise, -8, 8)
        return Policy.apply(mean, log_std, noise)

    return act


add(
    "squashed_policy_spread",
    squashed_policy,
    lambda: (real(3, 2), real(3, 2, seed=1), real(3, 2, seed=2, grad=False)),
    bug="The deviation's gradient lacks its way through the correction for tanh",
)
