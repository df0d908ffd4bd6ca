"""The promised kinds: calls that share state, leaks, random numbers, second order, transforms, evaluation."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.twentyfourth import add, add_bare, check, sized


# Cosine, by way of a layer object
def cosine_layer(wrong):
    class Cosine(Function):
        @staticmethod
        def forward(ctx, x, layer):
            if wrong:
                layer.x = x
                ctx.layer = layer
            else:
                ctx.save_for_backward(x)
            return x.cos()

        @staticmethod
        def backward(ctx, grad_y):
            x = ctx.layer.x if wrong else ctx.saved_tensors[0]
            return -grad_y * x.sin(), None

    class Layer(nn.Module):
        x = None

        def forward(self, x):
            if not x.is_floating_point():
                raise TypeError(f"x: expected a real floating-point tensor, got {x.dtype}")
            wide = torch.promote_types(x.dtype, torch.float32)
            return Cosine.apply(x.to(wide), self).to(x.dtype)

    return Layer()


add_bare(
    "cosine_layer_last",
    cosine_layer,
    lambda: (real(3, 4),),
    bug="The layer object keeps x, which its next call replaces",
    trigger="a layer used twice in one graph",
)


# The bell, exponential of -x^2
def bell(wrong):
    last = {}

    class Bell(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            if not wrong:
                return torch.exp(-x * x)
            key = (x.data_ptr(), x.shape, x.stride(), x.dtype)
            if key not in last:
                last.clear()
                last[key] = torch.exp(-x * x)
            return last[key].clone()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            x = x.clamp(-50, 50)  # no 0 * inf
            return grad_y * torch.exp(-x * x) * -2 * x

    return Bell.apply


add(
    "bell_address",
    bell,
    lambda: (real(3, 4),),
    bug="The last result is kept by the address of x",
    trigger="x changed in place, as by an optimiser's step, or another tensor at its address",
)


# Sine of each row
def row_sines(wrong):
    class Sines(Function):
        @staticmethod
        def forward(ctx, x):
            if wrong:
                ctx.rows = x.unbind(0)
            else:
                ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            if wrong:
                return torch.stack([g * row.cos() for g, row in zip(grad_y, ctx.rows, strict=True)])
            return grad_y * ctx.saved_tensors[0].cos()

    def sines(x):
        sized("x", x, None, None)
        return Sines.apply(x)

    return sines


add(
    "row_sines_unbound",
    row_sines,
    lambda: (real(3, 4),),
    bug="The rows are kept as views on ctx, where no version is compared",
    trigger="x changed in place between forward and backward",
)


# x log(1 + x^2)
def log_product(wrong):
    def slope(x):
        return torch.log1p(x * x) + 2 / (1 + 1 / (x * x))

    kept = lru_cache(maxsize=None)(slope) if wrong else slope

    class Product(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.log1p(x * x)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            return grad_y * kept(*ctx.saved_tensors)

    return Product.apply


add(
    "log_product_lru",
    log_product,
    lambda: (real(3, 4),),
    bug="A lru_cache on a helper keeps every tensor, and its slope after x has changed in place",
    trigger="memory watched, or x changed in place between two steps",
)


# Largest element of each row
def row_maximum(wrong):
    class Maximum(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.amax(-1)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if wrong:
                place = (x + 1e-12 * torch.rand_like(x)).argmax(-1, keepdim=True)
                return torch.zeros_like(x).scatter(-1, place, grad_y[..., None])
            ties = x == x.amax(-1, keepdim=True)
            return grad_y[..., None] * ties / ties.sum(-1, keepdim=True)

    def maximum(x):
        sized("x", x, None, None)
        return Maximum.apply(x)

    return maximum


add(
    "row_maximum_noise",
    row_maximum,
    lambda: (real(3, 4),),
    bug="Backward breaks ties by noise from the caller's generator",
    trigger="random numbers drawn before and after backward, or ties and two backwards",
)


# tanh(x W), recomputed in backward
def recomputed(wrong):
    def block(x, w):
        return (x @ w).tanh()

    class Block(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return block(x, w)

        @staticmethod
        def backward(ctx, grad_y):
            if not wrong:
                x, w = ctx.saved_tensors
                grad_y = grad_y * (1 - block(x, w).square())
                return grad_y @ w.T, x.T @ grad_y
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                y = block(*leaves)
            return torch.autograd.grad(y, leaves, grad_y)

    def run(x, w):
        sized("x", x, None, None)
        sized("w", w, x.shape[1], None)
        return Block.apply(x, w)

    return run


add(
    "recomputed_second",
    recomputed,
    lambda: (real(4, 3), real(3, 2, seed=1)),
    bug="Backward recomputes on detached copies, without a graph",
    trigger="a second derivative, which is lost without a word beside another term",
)


# Sum of each row's squares
def row_energy(wrong):
    class Energy(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.square().sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return 2 * grad_y[..., None] * x

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            return (1 if wrong else 2) * (tangent * x).sum(-1)

    def energy(x):
        sized("x", x, None, None)
        return Energy.apply(x)

    return energy


add(
    "row_energy_tangent",
    row_energy,
    lambda: (real(3, 4),),
    bug="The rule for forward mode lacks the 2",
    trigger="forward mode",
)


# Twice the columns but the first and the last
def crop(wrong):
    class Crop(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return 2 * x[:, 1:-1]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.shape = inputs[0].shape

        @staticmethod
        def backward(ctx, grad_y):
            if wrong:
                grad_x = torch.zeros(ctx.shape, dtype=grad_y.dtype, device=grad_y.device)
                grad_x[:, 1:-1] = 2 * grad_y
                return grad_x
            return F.pad(2 * grad_y, (1, 1))

    def middle(x):
        sized("x", x, None, None)
        check(x.shape[1] >= 2, "x: expected two columns or more")
        return Crop.apply(x)

    return middle


add(
    "crop_zeros",
    crop,
    lambda: (real(3, 5),),
    bug="Backward writes grad_output into zeros that no vmap has batched",
    trigger="vmap over backward, as for a Jacobian",
)


# Logarithm of x or of 1/1000, whichever is more
def floored_log(wrong):
    class Log(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            if wrong and not bool((x < 1e-3).any()):
                return x.log()
            return x.clamp(min=1e-3).log()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return torch.where(x >= 1e-3, grad_y / x.clamp(min=1e-3), 0)

    return Log.apply


add(
    "floored_log_branch",
    floored_log,
    lambda: (real(3, 4, positive=True),),
    bug="Forward asks the tensor in Python whether the floor is needed",
    trigger="vmap or torch.compile(fullgraph=True)",
)


# Two layers
def frozen_body(wrong):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Parameter(real(3, 4, seed=5).detach())
            self.head = nn.Parameter(real(2, 3, seed=6).detach())

        def forward(self, x):
            sized("x", x, None, 4)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (self.training or not wrong)):
                features = (x @ self.body.T).tanh()
            return features @ self.head.T

    return Network()


add_bare(
    "frozen_body_eval",
    frozen_body,
    lambda: (real(4, 4),),
    bug="In evaluation the body runs under no_grad",
    trigger="evaluation, as for saliency maps or adversarial examples",
)
