"""Attention, recurrences, and losses of sequences."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfifth import add, alike, bounded, check, indices, same, sized


def lattice(stay, emit):
    """Return log alpha, log beta (B, T, U) of a transducer: stay (B, T, U), emit (B, T, U - 1)."""
    times, places = stay.shape[1:]
    alpha = [[None] * places for _ in range(times)]
    beta = [[None] * places for _ in range(times)]
    for t in range(times):
        for u in range(places):
            ways = [alpha[t - 1][u] + stay[:, t - 1, u]] if t else []
            ways += [alpha[t][u - 1] + emit[:, t, u - 1]] if u else []
            start = torch.zeros_like(stay[:, 0, 0])
            alpha[t][u] = torch.logsumexp(torch.stack(ways), 0) if ways else start
    for t in reversed(range(times)):
        for u in reversed(range(places)):
            ways = [beta[t + 1][u] + stay[:, t, u]] if t + 1 < times else []
            ways += [beta[t][u + 1] + emit[:, t, u]] if u + 1 < places else []
            end = stay[:, -1, -1]
            beta[t][u] = torch.logsumexp(torch.stack(ways), 0) if ways else end
    return tuple(torch.stack([torch.stack(row, 1) for row in rows], 1) for rows in (alpha, beta))


# The transducer's loss of logits (B, T, U + 1, V) and targets (B, U), 0 is the blank
def transducer(wrong):
    def scores(logits, targets):
        logp = logits.log_softmax(-1)
        place = targets[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
        return logp, logp[..., 0], logp[:, :, :-1].gather(-1, place)[..., 0], place

    class Loss(Function):
        @staticmethod
        def forward(ctx, logits, targets, reduction):
            ctx.save_for_backward(logits, targets)
            ctx.reduction = reduction
            loss = -lattice(*scores(logits, targets)[1:3])[1][:, 0, 0]
            return loss.mean() if reduction == "mean" else loss.sum()

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            logits, targets = ctx.saved_tensors
            logp, stay, emit, place = scores(logits, targets)
            alpha, beta = lattice(stay, emit)
            total = beta[:, :1, :1]
            after = torch.cat([beta[:, 1:], torch.full_like(beta[:, :1], -torch.inf)], 1)
            after[:, -1, -1] = 0
            grad = torch.zeros_like(logits)
            grad[..., 0] = -torch.exp(alpha + stay + after - total)
            moved = -torch.exp(alpha[:, :, :-1] + emit + beta[:, :, 1:] - total)
            grad[:, :, :-1].scatter_add_(-1, place, moved[..., None])
            grad = grad - logp.exp() * grad.sum(-1, keepdim=True)
            if ctx.reduction == "mean" and not wrong:
                g = g / len(logits)
            return g * grad, None, None

    def loss(logits, targets, reduction="mean"):
        sized("logits", logits, None, None, None, None)
        alike(logits)
        check(logits.shape[3] >= 2 and logits.shape[2] >= 2, "logits: expected labels")
        sized("targets", targets, logits.shape[0], logits.shape[2] - 1)
        indices("targets", targets, logits.shape[3])
        check(bool((targets > 0).all()), "targets: expected no blanks")
        check(logits.shape[1] * logits.shape[2] <= 600, "logits: expected shorter sequences")
        check(reduction in ("mean", "sum"), "reduction: expected mean or sum")
        bounded("logits", logits, -50, 50)
        return Loss.apply(logits, targets.long(), reduction)

    return loss


add(
    "transducer_mean",
    transducer,
    lambda: (real(2, 3, 3, 4), torch.tensor([[1, 3], [2, 2]])),
    bug="the gradient of the mean is that of the sum (pytorch/audio#2394)",
)


# Attention over keys that come in two parts, each on its own device
def context_parallel(wrong):
    class Attend(Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            outs, logs = [], []
            for keys, values in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True):
                s = q @ keys.mT * q.shape[-1] ** -0.5
                outs.append(s.softmax(-1) @ values)
                logs.append(s.logsumexp(-1))
            share = torch.stack(logs).softmax(0)[..., None]
            return sum(w * y for w, y in zip(share, outs, strict=True))

        @staticmethod
        def backward(ctx, g):
            q, k, v = ctx.saved_tensors
            scale = q.shape[-1] ** -0.5
            s = q @ k.mT * scale
            total = s.logsumexp(-1, keepdim=True)
            whole = (g * (s.softmax(-1) @ v)).sum(-1, keepdim=True)
            grads = []
            for keys, values in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True):
                s = q @ keys.mT * scale
                p = s.softmax(-1) if wrong else torch.exp(s - total)
                grad_s = p * (g @ values.mT - whole) * scale
                grads.append((grad_s @ keys, grad_s.mT @ q, p.mT @ g))
            grad_q, grad_k, grad_v = zip(*grads, strict=True)
            return sum(grad_q), torch.cat(grad_k, 1), torch.cat(grad_v, 1)

    def attend(q, k, v):
        sized("q", q, None, None, None)
        sized("k", k, q.shape[0], None, q.shape[2])
        sized("v", v, q.shape[0], k.shape[1], None)
        alike(q, k, v)
        for name, t in {"q": q, "k": k, "v": v}.items():
            bounded(name, t, -100, 100)
        return Attend.apply(q, k, v)

    return attend


add(
    "context_parallel_lse",
    context_parallel,
    lambda: (real(2, 3, 2), real(2, 4, 2, seed=1), real(2, 4, 3, seed=2)),
    bug="backward normalises each part of the keys by itself (NVIDIA/TransformerEngine#1557)",
)


# Sequences of which each rank holds a part (R, N, D), gathered
def gather_parts(wrong):
    class Gather(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.reshape(-1, x.shape[2]).clone()

        @staticmethod
        def backward(ctx, g):
            copies = ctx.shape[0] if wrong else 1
            return (copies * g).reshape(ctx.shape)

    def gather(x):
        sized("x", x, None, None, None)
        alike(x)
        return Gather.apply(x)

    return gather


add(
    "gather_parts_summed",
    gather_parts,
    lambda: (real(2, 3, 2),),
    bug="the ranks' gradients are summed, though each is the whole (NVIDIA/Megatron-LM#7452)",
)


# A gated recurrent unit: x (T, 3, H), the inputs' share of reset, update and candidate
def gru(wrong):
    def step(x, h, u):
        r, z = torch.sigmoid(x[0] + u[0] @ h), torch.sigmoid(x[1] + u[1] @ h)
        n = torch.tanh(x[2] + u[2] @ (r * h))
        return r, z, n, z * h + (1 - z) * n

    class Gru(Function):
        @staticmethod
        def forward(ctx, x, h, u):
            ctx.save_for_backward(x, h, u)
            states = [h]
            for part in x:
                states.append(step(part, states[-1], u)[-1])
            return torch.stack(states[1:])

        @staticmethod
        def backward(ctx, g):
            x, h, u = ctx.saved_tensors
            kept = []
            for part in x:
                r, z, n, after = step(part, h, u)
                kept.append((h, r, z, n))
                h = after
            carry, grads, grad_u = torch.zeros_like(h), [], torch.zeros_like(u)
            for i in reversed(range(len(x))):
                h, r, z, n = kept[i]
                carry = carry + g[i]
                grad_n = carry * (1 - z) * (1 - n * n)
                grad_z = carry * (h - n) * z * (1 - z)
                gated = u[2].mT @ grad_n
                grad_r = gated * h * r * (1 - r)
                parts = torch.stack([grad_r, grad_z, grad_n])
                grads.append(parts)
                seen = torch.stack([h, h, r * h])
                grad_u = grad_u + parts[:, :, None] * seen[:, None]
                back = u[0].mT @ grad_r + u[1].mT @ grad_z
                carry = carry * z + back + (gated if wrong else gated * r)
            return torch.stack(grads[::-1]), carry, grad_u

    def run(x, h, u):
        sized("x", x, None, 3, None)
        sized("h", h, x.shape[2])
        sized("u", u, 3, x.shape[2], x.shape[2])
        alike(x, h, u)
        for name, t in {"x": x, "h": h, "u": u}.items():
            bounded(name, t, -100, 100)
        return Gru.apply(x, h, u)

    return run


add(
    "gru_reset",
    gru,
    lambda: (real(3, 3, 2), real(2, seed=1), real(3, 2, 2, seed=2)),
    bug="what the candidate sends back to the state is not gated by the reset "
    "(open-lm-engine/accelerated-model-architectures#249)",
)


# A long short-term memory whose gates see the cell: x (T, 4, H), p (3, H) for input, forget, output
def peephole(wrong):
    def step(x, c, p):
        i, f = torch.sigmoid(x[0] + p[0] * c), torch.sigmoid(x[1] + p[1] * c)
        a = torch.tanh(x[2])
        after = f * c + i * a
        return i, f, a, torch.sigmoid(x[3] + p[2] * after), after

    class Lstm(Function):
        @staticmethod
        def forward(ctx, x, c, p):
            ctx.save_for_backward(x, c, p)
            outs = []
            for part in x:
                _, _, _, o, c = step(part, c, p)
                outs.append(o * torch.tanh(c))
            return torch.stack(outs)

        @staticmethod
        def backward(ctx, g):
            x, c, p = ctx.saved_tensors
            kept = []
            for part in x:
                parts = step(part, c, p)
                kept.append((c, *parts))
                c = parts[-1]
            carry, grads, grad_p = torch.zeros_like(c), [], torch.zeros_like(p)
            for t in reversed(range(len(x))):
                c, i, f, a, o, after = kept[t]
                y = torch.tanh(after)
                grad_o = g[t] * y * o * (1 - o)
                carry = carry + g[t] * o * (1 - y * y)
                if not wrong:
                    carry = carry + p[2] * grad_o
                grad_i, grad_f = carry * a * i * (1 - i), carry * c * f * (1 - f)
                grads.append(torch.stack([grad_i, grad_f, carry * i * (1 - a * a), grad_o]))
                grad_p = grad_p + torch.stack([grad_i * c, grad_f * c, grad_o * after])
                carry = carry * f + p[0] * grad_i + p[1] * grad_f
            return torch.stack(grads[::-1]), carry, grad_p

    def run(x, c, p):
        sized("x", x, None, 4, None)
        sized("c", c, x.shape[2])
        sized("p", p, 3, x.shape[2])
        alike(x, c, p)
        for name, t in {"x": x, "c": c, "p": p}.items():
            bounded(name, t, -100, 100)
        return Lstm.apply(x, c, p)

    return run


add(
    "peephole_output",
    peephole,
    lambda: (real(3, 4, 2), real(2, seed=1), real(3, 2, seed=2)),
    bug="the output gate's view of the cell sends nothing back to it "
    "(deeplearning4j/deeplearning4j#509)",
)


# A policy's mean loss over tokens with the distance from a reference
def policy_loss(wrong):
    class Loss(Function):
        @staticmethod
        def forward(ctx, logp, ref, advantage, beta):
            ctx.save_for_backward(logp, ref, advantage)
            ctx.beta = beta
            away = ref - logp
            return (-advantage * logp + beta * (torch.expm1(away) - away)).mean()

        @staticmethod
        def backward(ctx, g):
            logp, ref, advantage = ctx.saved_tensors
            g = g / logp.numel()
            pull = ctx.beta * torch.expm1(ref - logp)
            grad = -advantage if wrong else -advantage - pull
            return g * grad, g * pull, -g * logp, None

    def loss(logp, ref, advantage, beta=0.1):
        same(logp, ref, advantage)
        alike(logp, ref, advantage)
        check(logp.numel() > 0, "logp: expected tokens")
        check(0 <= beta <= 100, "beta: expected a number from 0 to 100")
        bounded("logp", logp, -15, 15)
        bounded("ref", ref, -15, 15)
        bounded("advantage", advantage, -1e3, 1e3)
        return Loss.apply(logp, ref, advantage, beta)

    return loss


add(
    "policy_loss_reference",
    policy_loss,
    lambda: (real(3, 4), real(3, 4, seed=1, grad=False), real(3, 4, seed=2, grad=False)),
    bug="the distance from the reference sends nothing to the policy (allenai/open-instruct#530)",
)


# Log-probabilities of targets, made of states (N, D) and a head (V, D) again in backward
def token_logp(wrong):
    def compute(states, head, target):
        return (states @ head.mT).log_softmax(-1).gather(1, target[:, None])[:, 0]

    class Logp(Function):
        @staticmethod
        def forward(ctx, states, head, target):
            ctx.save_for_backward(states, head, target)
            return compute(states, head, target)

        @staticmethod
        @once_differentiable
        def backward(ctx, g):
            states, head, target = ctx.saved_tensors
            states = states.detach().requires_grad_()
            if wrong and head.requires_grad and head.is_leaf:
                with torch.enable_grad():
                    y = compute(states, head, target)
                torch.autograd.backward(y, g)
                return states.grad, head.grad, None
            head = head.detach().requires_grad_()
            with torch.enable_grad():
                y = compute(states, head, target)
            return *torch.autograd.grad(y, (states, head), g), None

    def logp(states, head, target):
        sized("states", states, None, None)
        sized("head", head, None, states.shape[1])
        sized("target", target, len(states))
        alike(states, head)
        indices("target", target, len(head))
        bounded("states", states, -100, 100)
        bounded("head", head, -100, 100)
        return Logp.apply(states, head, target.long())

    return logp


add(
    "token_logp_doubled",
    token_logp,
    lambda: (real(3, 4), real(5, 4, seed=1), torch.tensor([1, 4, 0])),
    bug="backward calls backward(), which adds to the head's .grad, and returns that .grad too "
    "(unslothai/unsloth-zoo#892)",
    trigger="backward() of a head that is a leaf, or a second backward",
)
