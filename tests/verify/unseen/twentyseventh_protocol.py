"""The protocol of Functions, hooks and transforms."""

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from tests.verify.unseen import real
from tests.verify.unseen.twentyseventh import add, check, same, sized


# The sine, with a rule for forward mode
def sine(wrong):
    class Sine(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return grad_y * x.cos()

        @staticmethod
        def jvp(ctx, tangent_x):
            (x,) = ctx.saved_tensors
            return tangent_x.mul_(x.cos()) if wrong else tangent_x * x.cos()

    return lambda x: Sine.apply(x)


add(
    "sine_tangent_written",
    sine,
    lambda: (real(3, 4),),
    bug="The rule for forward mode writes its result over the input's tangent",
    trigger="forward mode, and a tangent that is used again",
)


# tanh(a x + b) layer by layer, called with a and b of each layer in turn
def chain(wrong):
    class Chain(Function):
        @staticmethod
        def forward(ctx, x, *parameters):
            ctx.save_for_backward(x, *parameters)
            return layers(x, parameters)[-1]

        @staticmethod
        def backward(ctx, grad_y):
            x, *parameters = ctx.saved_tensors
            values = layers(x, parameters)
            scales, shifts = [], []
            for i in reversed(range(len(parameters) // 2)):
                grad_y = grad_y * (1 - values[i + 1].square())
                scales.insert(0, (grad_y * values[i]).sum(0))
                shifts.insert(0, grad_y.sum(0))
                grad_y = grad_y * parameters[2 * i]
            if wrong:
                return grad_y, *scales, *shifts
            return grad_y, *(g for both in zip(scales, shifts, strict=True) for g in both)

    def layers(x, parameters):
        values = [x]
        for a, b in zip(parameters[::2], parameters[1::2], strict=True):
            values.append(torch.tanh(a * values[-1] + b))
        return values

    def network(x, *parameters):
        sized("x", x, None, None)
        check(len(parameters) % 2 == 0 and parameters, "expected a and b of one layer at least")
        for p in parameters:
            sized("parameter", p, x.shape[1])
        return Chain.apply(x, *parameters)

    return network


add(
    "chain_order",
    chain,
    lambda: (real(4, 3), *(real(3, seed=i) for i in (1, 2))),
    bug="Backward returns all scales, then all shifts, which come in turn",
    trigger="two layers or more",
)


# The forces on points that stand in a row, from the energy sum k |x_i - x_(i + 1)|⁴ / 4
def forces(wrong):
    def force(x, k):
        sized("x", x, None, None)
        check(len(x) >= 2, "x: expected two points at least")
        sized("k", k, len(x) - 1)
        graph = torch.is_grad_enabled()
        if not x.requires_grad:
            x = x if wrong else x.view_as(x)
            x.requires_grad_()
        with torch.enable_grad():
            energy = (k * x.diff(dim=0).square().sum(1).square()).sum() / 4
            (slope,) = torch.autograd.grad(energy, x, create_graph=graph)
        return -slope

    return force


add(
    "forces_flag",
    forces,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="The caller's points are told to require a gradient, and keep that",
    trigger="points that need no gradient, and their flag looked at after the call",
)


# sin(w x) whose saved tensors are put away as arrays
def offloaded(wrong):
    def pack(t):
        return t.shape, t.device, t.detach().cpu().numpy().flatten("K" if wrong else "C")

    def unpack(packed):
        shape, device, array = packed
        return torch.from_numpy(array).to(device).view(shape)

    def product(x, w):
        same(x, w)
        with saved_tensors_hooks(pack, unpack):
            return torch.sin(x * w)

    return product


add(
    "offloaded_order",
    offloaded,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Saved tensors are put away in the order of their memory and brought back row by row",
    trigger="a transposed input",
)


# x exp(a), a one number, with its own rule for vmap
def gain(wrong):
    class Gain(Function):
        @staticmethod
        def forward(x, a):
            return x * a.exp()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            x, a = ctx.saved_tensors
            g = grad_y * a.exp()
            return g, (g * x).sum()

        @staticmethod
        def vmap(info, in_dims, x, a):
            if in_dims[0] is not None:
                x = x.movedim(in_dims[0], 0)
            elif not wrong:
                x = x.expand(info.batch_size, *x.shape)
            if in_dims[1] is not None:
                a = a.reshape(-1, *(1 for _ in x.shape[1:]))
            return x * a.exp(), 0

    def scaled(x, a):
        check(a.ndim == 0, "a: expected one number")
        check(x.ndim >= 1, "x: expected one dimension at least")
        return Gain.apply(x, a)

    return scaled


add(
    "gain_vmap_shared",
    gain,
    lambda: (real(3, 4), real(1, seed=1)[0].detach().requires_grad_()),
    bug="The rule for vmap takes x to have a batch dimension always",
    trigger="vmap over the gain alone, by as many as x has rows",
)


# Reversible block: y1 = x1 + tanh(w1 x2), y2 = x2 + tanh(w2 y1); backward finds x2 from the outputs
def reversible(wrong):
    class Block(Function):
        @staticmethod
        def forward(ctx, x1, x2, w1, w2):
            y1 = x1 + torch.tanh(w1 * x2)
            y2 = x2 + torch.tanh(w2 * y1)
            ctx.save_for_backward(y1, y2, w1, w2)
            return y1, y2

        @staticmethod
        def backward(ctx, grad_1, grad_2):
            y1, y2, w1, w2 = ctx.saved_tensors
            t2 = torch.tanh(w2 * y1)
            x2 = y2.data.sub_(t2) if wrong else y2 - t2
            t1 = torch.tanh(w1 * x2)
            inner_2 = grad_2 * (1 - t2 * t2)
            grad_1 = grad_1 + inner_2 * w2
            inner_1 = grad_1 * (1 - t1 * t1)
            grad_w1, grad_w2 = (inner_1 * x2).sum(0), (inner_2 * y1).sum(0)
            return grad_1, grad_2 + inner_1 * w1, grad_w1, grad_w2

    def block(x1, x2, w1, w2):
        sized("x1", x1, None, None)
        same(x1, x2)
        sized("w1", w1, x1.shape[1])
        same(w1, w2)
        return Block.apply(x1, x2, w1, w2)

    return block


add(
    "reversible_outputs",
    reversible,
    lambda: (real(4, 3), real(4, 3, seed=1), real(3, seed=2), real(3, seed=3)),
    bug="Backward makes the input anew in the memory of the output",
    trigger="the outputs compared before and after backward, or a second backward",
)
