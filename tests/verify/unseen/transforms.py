"""Random numbers, blocks, buffers, structures, vmap."""

import torch
from torch import nn
from torch.autograd import Function

from tests.verify.unseen import pair, real
from tests.verify.unseen.protocol import X


class Dropout(Function):
    """Dropout whose mask is drawn again in backward from the seed that forward drew."""

    @staticmethod
    def mask(x, seed):
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(x.shape, generator=generator, dtype=torch.float64) > 0.4).to(x) / 0.6

    @staticmethod
    def forward(ctx, x):
        ctx.seed = int(torch.randint(2**31, ()))
        return x * Dropout.mask(x, ctx.seed)

    @staticmethod
    def backward(ctx, g):
        return g * Dropout.mask(g, ctx.seed)


class DropoutScale(Dropout):
    @staticmethod
    def backward(ctx, g):
        return g * (Dropout.mask(g, ctx.seed) > 0)


class DropoutReseeds(Dropout):
    @staticmethod
    def mask(x, seed):
        torch.manual_seed(seed)
        return (torch.rand(x.shape, dtype=torch.float64) > 0.4).to(x) / 0.6

    @staticmethod
    def forward(ctx, x):
        ctx.seed = int(torch.randint(2**31, ()))
        state = torch.get_rng_state()
        y = x * DropoutReseeds.mask(x, ctx.seed)
        torch.set_rng_state(state)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * DropoutReseeds.mask(g, ctx.seed)


pair("dropout_scale", DropoutScale.apply, Dropout.apply, X, "1 / (1 - p) is missing in backward")
pair(
    "dropout_reseeds", DropoutReseeds.apply, Dropout.apply, X, "backward seeds the global generator"
)


class Blocks(Function):
    """Mean of each row; backward fills blocks of 64, the last of which starts early so as to be whole."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean(-1)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g[..., None] * x / x.shape[-1]


class BlocksOverlap(Blocks):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        n = x.shape[-1]
        grad = torch.zeros_like(x)
        for begin in range(0, n, 64):
            at = min(begin, max(n - 64, 0))
            grad[..., at : at + 64] += 2 * g[..., None] * x[..., at : at + 64] / n
        return grad


pair(
    "block_overlap",
    BlocksOverlap.apply,
    Blocks.apply,
    X,
    "the last block of 64 is added over the one before",
)


class Centre(nn.Module):
    """Subtracts a running mean of the batches."""

    def __init__(self, always):
        super().__init__()
        self.always = always
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        y = (x - self.mean).tanh()
        if self.training or self.always:
            with torch.no_grad():
                self.mean.lerp_(x.detach().mean(0).to(self.mean), 0.1)
        return y


pair(
    "buffer_in_eval",
    Centre(True),
    Centre(False),
    lambda: (torch.randn(5, 3, requires_grad=True),),
    "the running mean moves in eval mode too",
)


class SumAndDifference(Function):
    """(x + y, x - y) as a dictionary's values."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y, x - y

    @staticmethod
    def backward(ctx, a, b):
        return a + b, a - b


class SumTwice(SumAndDifference):
    @staticmethod
    def backward(ctx, a, b):
        return a + b, a + b


def structured(function):
    def sums(batch, *, other):
        both = function.apply(batch["x"], other)
        return {"sum": both[0], "parts": [both[1]]}

    return sums


pair(
    "structured_keyword",
    structured(SumTwice),
    structured(SumAndDifference),
    lambda: ({"x": real(2, 3), "unused": "text"},),
    "the gradient of a keyword argument",
    kwargs=lambda: {"other": real(2, 3, seed=1)},
)


class Vmapped(Function):
    """x w for a row x and a matrix w, with a rule for vmap."""

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        return (g[..., None, :] @ w.mT)[..., 0, :], x[..., :, None] * g[..., None, :]

    @staticmethod
    def vmap(info, in_dims, x, w):
        x = (
            x.movedim(in_dims[0], 0)
            if in_dims[0] is not None
            else x.expand(info.batch_size, *x.shape)
        )
        w = (
            w.movedim(in_dims[1], 0)
            if in_dims[1] is not None
            else w.expand(info.batch_size, *w.shape)
        )
        return BatchedProduct.apply(x, w), 0


class BatchedProduct(Vmapped):
    @staticmethod
    def forward(x, w):
        return (x[..., None, :] @ w)[..., 0, :]


class VmappedShared(Vmapped):
    @staticmethod
    def vmap(info, in_dims, x, w):
        x = (
            x.movedim(in_dims[0], 0)
            if in_dims[0] is not None
            else x.expand(info.batch_size, *x.shape)
        )
        w = (
            w.movedim(in_dims[1], 0)[:1].expand(
                info.batch_size, *w.movedim(in_dims[1], 0).shape[1:]
            )
            if in_dims[1] is not None
            else w.expand(info.batch_size, *w.shape)
        )
        return BatchedProduct.apply(x, w), 0


pair(
    "vmap_weight_shared",
    VmappedShared.apply,
    Vmapped.apply,
    lambda: (real(3), real(3, 4, seed=1)),
    "under vmap all samples get the first one's weight",
)
