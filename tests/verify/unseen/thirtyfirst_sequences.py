"""Recurrent layers, scans, filters, alignments."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtyfirst import add, add_bare, bounded, check, finite, indices, sized


# An LSTM's layer over sequences of several lengths: states stand still where a sequence has ended
def lstm_layer(wrong):
    class Layer(Function):
        @staticmethod
        def forward(ctx, x, lengths, w_in, w_hidden, bias):
            n, steps, _ = x.shape
            h = c = x.new_zeros(n, w_hidden.shape[1])
            kept, outputs = [], []
            for t in range(steps):
                on = (t < lengths)[:, None]
                pre = x[:, t] @ w_in.mT + h @ w_hidden.mT + bias
                i, f, o, u = pre.chunk(4, -1)
                i, f, o, u = i.sigmoid(), f.sigmoid(), o.sigmoid(), u.tanh()
                cell = f * c + i * u
                kept.append((h, c, i, f, o, u, cell.tanh()))
                c = torch.where(on, cell, c)
                h = torch.where(on, o * cell.tanh(), h)
                outputs.append(torch.where(on, h, 0))
            ctx.save_for_backward(x, lengths, w_in, w_hidden)
            ctx.kept = kept
            return torch.stack(outputs, 1), h.clone(), c.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y, grad_h, grad_c):
            x, lengths, w_in, w_hidden = ctx.saved_tensors
            grad_x = torch.zeros_like(x)
            grad_in, grad_hidden = torch.zeros_like(w_in), torch.zeros_like(w_hidden)
            grad_bias = x.new_zeros(len(w_in))
            for t in reversed(range(x.shape[1])):
                h, c, i, f, o, u, squashed = ctx.kept[t]
                on = (t < lengths)[:, None]
                gh = torch.where(on, grad_h + grad_y[:, t], 0)
                gc = torch.where(on, grad_c + gh * o * (1 - squashed**2), 0)
                grad_pre = torch.cat(
                    (
                        gc * u * i * (1 - i),
                        gc * c * f * (1 - f),
                        gh * squashed * o * (1 - o),
                        gc * i * (1 - u**2),
                    ),
                    -1,
                )
                grad_x[:, t] = grad_pre @ w_in
                grad_in += grad_pre.mT @ x[:, t]
                grad_hidden += grad_pre.mT @ h
                grad_bias += grad_pre.sum(0)
                before = grad_pre @ w_hidden
                grad_h = before if wrong else torch.where(on, before, grad_h)
                grad_c = torch.where(on, gc * f, grad_c)
            return grad_x, None, grad_in, grad_hidden, grad_bias

    def layer(x, lengths, w_in, w_hidden, bias):
        sized("x", x, None, None, None)
        sized("w_hidden", w_hidden, 4 * w_hidden.shape[1], None)
        sized("w_in", w_in, len(w_hidden), x.shape[2])
        sized("bias", bias, len(w_hidden))
        sized("lengths", lengths, len(x))
        indices("lengths", lengths, x.shape[1] + 1)
        for name, t in {"x": x, "w_in": w_in, "w_hidden": w_hidden, "bias": bias}.items():
            bounded(name, t, -1e4, 1e4)
        return Layer.apply(x, lengths, w_in, w_hidden, bias)

    return layer


add(
    "lstm_layer_padding",
    lstm_layer,
    lambda: (
        real(3, 5, 2),
        torch.tensor([5, 3, 4]),
        real(12, 2, seed=1),
        real(12, 3, seed=2),
        real(12, seed=3),
    ),
    bug="The last hidden state's gradient does not go through the steps behind a sequence's end",
    trigger="a sequence shorter than the longest, and its last hidden state used",
)


# A GRU's layer with a learned first state: one row for all sequences, or one each
def gru_layer(wrong):
    class Layer(Function):
        @staticmethod
        def forward(ctx, x, start, w_in, w_hidden, b_in, b_hidden):
            h = start.expand(len(x), -1)
            kept, outputs = [], []
            for t in range(x.shape[1]):
                ar, az, an = (x[:, t] @ w_in.mT + b_in).chunk(3, -1)
                hr, hz, hn = (h @ w_hidden.mT + b_hidden).chunk(3, -1)
                r, z = (ar + hr).sigmoid(), (az + hz).sigmoid()
                n = (an + r * hn).tanh()
                kept.append((h, r, z, n, hn))
                h = (1 - z) * n + z * h
                outputs.append(h)
            ctx.save_for_backward(x, start, w_in, w_hidden)
            ctx.kept = kept
            return torch.stack(outputs, 1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, start, w_in, w_hidden = ctx.saved_tensors
            grad_x = torch.empty_like(x)
            grad_in, grad_hidden = torch.zeros_like(w_in), torch.zeros_like(w_hidden)
            grad_b_in, grad_b_hidden = (x.new_zeros(len(w_in)) for _ in range(2))
            grad_h = torch.zeros_like(grad_y[:, 0])
            for t in reversed(range(x.shape[1])):
                h, r, z, n, hn = ctx.kept[t]
                grad_h = grad_h + grad_y[:, t]
                gn = grad_h * (1 - z) * (1 - n**2)
                gz = grad_h * (h - n) * z * (1 - z)
                gr = gn * hn * r * (1 - r)
                from_input = torch.cat((gr, gz, gn), -1)
                from_hidden = torch.cat((gr, gz, gn * r), -1)
                grad_x[:, t] = from_input @ w_in
                grad_in += from_input.mT @ x[:, t]
                grad_hidden += from_hidden.mT @ h
                grad_b_in += from_input.sum(0)
                grad_b_hidden += from_hidden.sum(0)
                grad_h = grad_h * z + from_hidden @ w_hidden
            if len(start) == 1 and not wrong:
                grad_h = grad_h.sum(0, keepdim=True)
            return grad_x, grad_h, grad_in, grad_hidden, grad_b_in, grad_b_hidden

    def layer(x, start, w_in, w_hidden, b_in, b_hidden):
        sized("x", x, None, None, None)
        sized("start", start, None, None)
        check(len(start) in {1, len(x)}, "start: expected one row, or one for each sequence")
        sized("w_in", w_in, 3 * start.shape[1], x.shape[2])
        sized("w_hidden", w_hidden, 3 * start.shape[1], start.shape[1])
        sized("b_in", b_in, len(w_in))
        sized("b_hidden", b_hidden, len(w_in))
        for t in (x, start, w_in, w_hidden, b_in, b_hidden):
            bounded("arguments", t, -1e4, 1e4)
        return Layer.apply(x, start, w_in, w_hidden, b_in, b_hidden)

    return layer


add(
    "gru_layer_start_shape",
    gru_layer,
    lambda: (
        real(3, 4, 2),
        real(1, 3, seed=1),
        real(9, 2, seed=2),
        real(9, 3, seed=3),
        real(9, seed=4),
        real(9, seed=5),
    ),
    bug="backward returns one row for each sequence for a first state of one row; the engine sums it",
    trigger="the raw gradient's shape",
)


# Diagonal state space of complex modes driven by a real signal: y = 2 Re(c . h)
def modal_scan(wrong):
    class Scan(Function):
        @staticmethod
        def forward(ctx, u, a, b, c):
            h = b.new_zeros(len(u), len(a))
            states = []
            for t in range(u.shape[1]):
                h = a * h + b * u[:, t, None]
                states.append(h)
            states = torch.stack(states, 1)
            ctx.save_for_backward(u, a, b, c, states)
            return 2 * (states @ c).real

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            u, a, b, c, states = ctx.saved_tensors
            grad_h = torch.zeros_like(states[:, 0])
            grad_u = torch.empty_like(u)
            grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
            for t in reversed(range(u.shape[1])):
                grad_h = 2 * grad_y[:, t, None] * c.conj() + a.conj() * grad_h
                grad_u[:, t] = (grad_h * b.conj()).sum(-1).real
                grad_b += (grad_h * u[:, t, None]).sum(0)
                if t:
                    before = states[:, t - 1]
                    grad_a += (grad_h * (before if wrong else before.conj())).sum(0)
            grad_c = 2 * (grad_y[..., None] * states.conj()).sum((0, 1))
            return grad_u, grad_a, grad_b, grad_c

    def scan(u, a, b, c):
        sized("u", u, None, None)
        sized("a", a, None)
        sized("b", b, len(a))
        sized("c", c, len(a))
        check(not u.is_complex(), "u: expected real numbers")
        check(a.is_complex() and a.dtype == b.dtype == c.dtype, "expected complex modes")
        check(a.real.dtype == u.dtype, "u: expected the modes' precision")
        check(bool((a.abs() <= 1).all()), "a: expected modes that do not grow")
        finite(u=u, b=b, c=c)
        return Scan.apply(u, a, b, c)

    return scan


add_bare(
    "modal_scan_conjugate",
    modal_scan,
    lambda: (
        real(2, 5),
        torch.polar(
            torch.full((3,), 0.9, dtype=torch.float64),
            torch.tensor([0.4, 1.1, 2.0], dtype=torch.float64),
        ).requires_grad_(),
        torch.complex(real(3, seed=1, grad=False), real(3, seed=2, grad=False)).requires_grad_(),
        torch.complex(real(3, seed=3, grad=False), real(3, seed=4, grad=False)).requires_grad_(),
    ),
    bug="The poles' gradient multiplies by the states, not by their conjugates",
)


# h_t = a_t h_(t-1) + x_t by doubling, as a parallel scan computes it
def doubling_scan(wrong):
    def later(x, n):
        return F.pad(x[:, :-n], (n, 0))

    def doubled(a, x, rounds):
        for i in range(rounds):
            n = min(2**i, x.shape[1])
            x = x + a * later(x, n)
            a = a * later(a, n)
        return x

    class Scan(Function):
        @staticmethod
        def forward(ctx, a, x):
            ctx.save_for_backward(a, x)
            return doubled(a, x, (x.shape[1] - 1).bit_length())

        @staticmethod
        def backward(ctx, grad_y):
            a, x = ctx.saved_tensors
            n = x.shape[1]
            rounds = n.bit_length() - 1 if wrong else (n - 1).bit_length()
            following = later(a.flip(1), 1)
            grad_x = doubled(following, grad_y.flip(1), rounds).flip(1)
            before = later(doubled(a, x, (n - 1).bit_length()), 1)
            return grad_x * before, grad_x

    def scan(a, x):
        sized("x", x, None, None)
        sized("a", a, *x.shape)
        bounded("a", a, 0, 1)
        finite(x=x)
        return Scan.apply(a, x)

    return scan


add(
    "doubling_scan_rounds",
    doubling_scan,
    lambda: (real(2, 4, grad=False).sigmoid().requires_grad_(), real(2, 4, seed=1)),
    bug="Backward's number of rounds is the base-2 logarithm rounded down",
    trigger="a length that is no power of 2",
)


# Sum of what is still to come, each step discounted, along the last dimension
def rewards_to_go(wrong):
    def summed(x, discount, dim):
        rows = list(x.unbind(dim))
        for i in range(1, len(rows)):
            rows[i] = rows[i] + discount * rows[i - 1]
        return torch.stack(rows, dim)

    class ToGo(Function):
        @staticmethod
        def forward(ctx, rewards, discount):
            ctx.discount = discount
            return summed(rewards.flip(-1), discount, -1).flip(-1)

        @staticmethod
        def backward(ctx, grad_y):
            return summed(grad_y, ctx.discount, 1 if wrong else -1), None

    def to_go(rewards, discount=0.9):
        check(rewards.ndim >= 2, "rewards: expected (..., steps)")
        check(rewards.shape[-1] > 0, "rewards: expected a step")
        check(0 <= discount <= 1, "discount: expected a number from 0 to 1")
        check(0 not in rewards.shape, "rewards: expected numbers")
        finite(rewards=rewards)
        return ToGo.apply(rewards, float(discount))

    return to_go


add(
    "rewards_to_go_dimension",
    rewards_to_go,
    lambda: (real(3, 5),),
    bug="Backward sums along dimension 1 instead of the last",
    trigger="another batch dimension in front",
)


# A Kalman filter's update: the mean and the covariance after a measurement
def kalman_update(wrong):
    def gain(cov, h, noise):
        s = h @ cov @ h.mT + noise
        return cov @ h.mT @ s.inverse(), s

    class Update(Function):
        @staticmethod
        def forward(ctx, mean, cov, z, h, noise):
            ctx.save_for_backward(mean, cov, z, h, noise)
            k, _ = gain(cov, h, noise)
            return mean + k @ (z - h @ mean), cov - k @ h @ cov

        @staticmethod
        def backward(ctx, grad_mean, grad_cov):
            mean, cov, z, h, noise = ctx.saved_tensors
            k, s = gain(cov, h, noise)
            rest = z - h @ mean
            # through mean + k rest and cov - k h cov
            grad_k = torch.outer(grad_mean, rest) - grad_cov @ (h @ cov).mT
            grad_rest = k.mT @ grad_mean
            grad_h = -k.mT @ grad_cov @ cov.mT - torch.outer(grad_rest, mean)
            grad_prior = grad_cov - (k @ h).mT @ grad_cov
            # through k = cov h' s^-1
            grad_b = grad_k @ s.inverse().mT
            grad_s = -k.mT @ grad_b
            grad_prior = grad_prior + grad_b @ h + h.mT @ grad_s @ h
            both = 2 * grad_s @ h @ cov if wrong else grad_s @ h @ cov.mT + grad_s.mT @ h @ cov
            grad_h = grad_h + grad_b.mT @ cov + both
            return grad_mean - h.mT @ grad_rest, grad_prior, grad_rest, grad_h, grad_s

    def update(mean, cov, z, h, noise):
        sized("mean", mean, None)
        sized("z", z, None)
        sized("cov", cov, len(mean), len(mean))
        sized("h", h, len(z), len(mean))
        sized("noise", noise, len(z), len(z))
        finite(mean=mean, cov=cov, z=z, h=h, noise=noise)
        s = h @ cov @ h.mT + noise
        check(bool(torch.linalg.cond(s.detach()) < 1e4), "noise: expected a regular innovation")
        return Update.apply(mean, cov, z, h, noise)

    return update


def covariance(n, seed):
    root = real(n, n, seed=seed, grad=False)
    return (root @ root.mT + torch.eye(n, dtype=torch.float64)).requires_grad_()


add(
    "kalman_update_symmetric",
    kalman_update,
    lambda: (real(3), covariance(3, 1), real(2, seed=2), real(2, 3, seed=3), covariance(2, 4)),
    bug="The innovation's gradient is taken for symmetric",
)


# Connectionist alignment of as many labels as given: -log of the summed paths; 0 is the blank
def alignment_loss(wrong):
    def step(x, jumps):
        one = F.pad(x[:, :-1], (1, 0), value=-math.inf)
        two = F.pad(x[:, :-2], (2, 0), value=-math.inf).masked_fill(~jumps, -math.inf)
        return torch.stack((x, one, two)).logsumexp(0)

    class Loss(Function):
        @staticmethod
        def forward(ctx, scores, labels):
            steps = len(scores)
            states = F.pad(labels[:, :, None], (1, 0)).flatten(1)
            states = F.pad(states, (0, 1))
            jumps = F.pad(states[:, 2:] != states[:, :-2], (2, 0)) & (states != 0)
            emitted = scores.gather(2, states.expand(steps, -1, -1))
            alpha = [emitted[0].clone()]
            alpha[0][:, 2:] = -math.inf
            for t in range(1, steps):
                alpha.append(step(alpha[-1], jumps) + emitted[t])
            total = alpha[-1][:, -2:].logsumexp(1)
            ctx.save_for_backward(scores, states, jumps, emitted, torch.stack(alpha), total)
            return -total

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            scores, states, jumps, emitted, alpha, total = ctx.saved_tensors
            steps = len(scores)
            # backwards in time is forwards over the states in reverse order
            allowed = (states != 0) if wrong else jumps
            arrives = F.pad(allowed[:, 2:], (0, 2)).flip(1)
            beta = torch.full_like(total[:, None].expand_as(states), -math.inf).clone()
            beta[:, -2:] = 0
            grad = torch.zeros_like(scores)
            for t in reversed(range(steps)):
                posterior = (alpha[t] + beta - total[:, None]).exp()
                grad[t].scatter_add_(1, states, -posterior * grad_y[:, None])
                beta = step((beta + emitted[t]).flip(1), arrives).flip(1)
            return grad, None

    def loss(scores, labels):
        sized("scores", scores, None, None, None)
        sized("labels", labels, scores.shape[1], None)
        indices("labels", labels, scores.shape[2])
        check(bool((labels > 0).all()), "labels: 0 is the blank")
        needed = labels.shape[1] + (labels[:, 1:] == labels[:, :-1]).sum(1)
        check(bool((needed <= len(scores)).all()), "scores: expected steps for all labels")
        bounded("scores", scores, -100, 100)
        return Loss.apply(scores, labels)

    return loss


add(
    "alignment_loss_repeats",
    alignment_loss,
    lambda: (
        real(7, 2, 4, grad=False).log_softmax(-1).requires_grad_(),
        torch.tensor([[1, 2, 2], [3, 1, 2]]),
    ),
    bug="Backward's pass lets paths jump over the blank between two equal labels",
    trigger="a label that is repeated",
)


# Selective state space: step sizes, drives and read-outs of each time
def selective_scan(wrong):
    class Scan(Function):
        @staticmethod
        def forward(ctx, x, dt, a, b, c, skip):
            n, steps, width = x.shape
            h = x.new_zeros(n, width, a.shape[1])
            states, outputs = [h], []
            for t in range(steps):
                decay = (dt[:, t, :, None] * a).exp()
                h = decay * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
                states.append(h)
                outputs.append((h * c[:, t, None]).sum(-1) + skip * x[:, t])
            ctx.save_for_backward(x, dt, a, b, c, skip, torch.stack(states))
            return torch.stack(outputs, 1)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, dt, a, b, c, skip, states = ctx.saved_tensors
            grad_x, grad_dt = torch.empty_like(x), torch.empty_like(dt)
            grad_a, grad_b, grad_c = (torch.zeros_like(s) for s in (a, b, c))
            grad_h = torch.zeros_like(states[0])
            for t in reversed(range(x.shape[1])):
                decay = (dt[:, t, :, None] * a).exp()
                grad_h = grad_h + grad_y[:, t, :, None] * c[:, t, None]
                grad_c[:, t] = (grad_y[:, t, :, None] * states[t + 1]).sum(1)
                drive = (grad_h * b[:, t, None]).sum(-1)
                grad_b[:, t] = (grad_h * (dt[:, t] * x[:, t])[..., None]).sum(1)
                grad_x[:, t] = drive * dt[:, t] + grad_y[:, t] * skip
                grad_power = grad_h * states[t] * decay
                grad_a += (grad_power * dt[:, t, :, None]).sum(0)
                grad_dt[:, t] = (grad_power * a).sum(-1)
                if not wrong:
                    grad_dt[:, t] += drive * x[:, t]
                grad_h = grad_h * decay
            return grad_x, grad_dt, grad_a, grad_b, grad_c, (grad_y * x).sum((0, 1))

    def scan(x, dt, a, b, c, skip):
        sized("x", x, None, None, None)
        sized("dt", dt, *x.shape)
        sized("a", a, x.shape[2], None)
        sized("b", b, *x.shape[:2], a.shape[1])
        sized("c", c, *b.shape)
        sized("skip", skip, x.shape[2])
        bounded("dt", dt, 0, 1e3)
        bounded("a", a, -1e3, 0)
        finite(x=x, b=b, c=c, skip=skip)
        return Scan.apply(x, dt, a, b, c, skip)

    return scan


add(
    "selective_scan_step",
    selective_scan,
    lambda: (
        real(2, 4, 3),
        real(2, 4, 3, seed=1, positive=True),
        (-real(3, 2, seed=2, positive=True, grad=False)).requires_grad_(),
        real(2, 4, 2, seed=3),
        real(2, 4, 2, seed=4),
        real(3, seed=5),
    ),
    bug="The step size's gradient is without its part in the drive",
)
