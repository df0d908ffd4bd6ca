"""Layers: norms, convolution, pooling, embeddings, gates."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real, whole
from tests.verify.unseen.twentyfifth import add, check, indices, sized


# Root-mean-square norm with the gain 1 + w: y = x r (1 + w), r = 1 / sqrt(mean(x^2) + eps)
def one_plus_gain(wrong):
    class Norm(Function):
        @staticmethod
        def forward(ctx, x, w, eps):
            ctx.save_for_backward(x, w)
            ctx.eps = eps
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + w)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            r = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
            n = x * r
            g = grad_y * (w if wrong else 1 + w)
            grad_x = r * (g - n * (g * n).mean(-1, keepdim=True))
            return grad_x, (grad_y * n).sum_to_size(w.shape), None

    def norm(x, w, eps=1e-6):
        check(x.ndim >= 1 and x.shape[-1] >= 1, "x: expected (..., D)")
        sized("w", w, x.shape[-1])
        check(eps > 0, "eps: expected a positive number")
        return Norm.apply(x, w, eps)

    return norm


add(
    "one_plus_gain_one",
    one_plus_gain,
    lambda: (real(3, 4), real(4, seed=1)),
    bug="Backward was taken from the norm whose gain is w, not 1 + w",
)


# A convolution with a stride that leaves places over at the end
def strided_convolution(wrong):
    class Convolution(Function):
        @staticmethod
        def forward(ctx, x, w, stride):
            ctx.save_for_backward(x, w)
            ctx.stride = stride
            return F.conv1d(x, w, stride=stride)

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            grad_x = F.conv_transpose1d(grad_y, w, stride=ctx.stride)
            rest = x.shape[2] - grad_x.shape[2]
            grad_x = F.pad(grad_x, (rest, 0) if wrong else (0, rest))
            windows = x.unfold(2, w.shape[2], ctx.stride).movedim(1, 2)
            grad_w = grad_y @ windows.reshape(*windows.shape[:2], -1)
            return grad_x, grad_w.sum(0).reshape(w.shape), None

    def convolution(x, w, stride=3):
        sized("x", x, None, None, None)
        sized("w", w, None, x.shape[1], None)
        check(stride >= 1, "stride: expected a number of at least 1")
        check(w.shape[2] <= x.shape[2], "w: expected a kernel no longer than x")
        return Convolution.apply(x, w, stride)

    return convolution


add(
    "strided_convolution_rest",
    strided_convolution,
    lambda: (real(2, 3, 8), real(4, 3, 2, seed=1)),
    bug="The places that no window reaches are put at the start",
    trigger="a length that leaves places over",
)


# The largest of each two neighbours, where places may be masked by -inf
def masked_pairs(wrong):
    class Largest(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return torch.maximum(x[..., 0::2], x[..., 1::2])

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            first, second = x[..., 0::2], x[..., 1::2]
            gap = (first - second) if wrong else torch.where(first >= second, 1, -1)
            grad_x = torch.where(gap >= 0, grad_y, 0), torch.where(gap < 0, grad_y, 0)
            return torch.stack(grad_x, -1).reshape(x.shape)

    def largest(x):
        check(x.ndim >= 1 and x.shape[-1] % 2 == 0, "x: expected an even last dimension")
        check(not bool(x.isnan().any()), "x: expected no NaN")
        return Largest.apply(x)

    return largest


add(
    "masked_pairs_lost",
    masked_pairs,
    lambda: (real(3, 4),),
    bug="Backward looks at a difference, which of two infinities is NaN: neither gets a gradient",
    trigger="two neighbours that are both inf or both masked by -inf",
    missed="equal infinities are not tried",
)


# Rows of a table, each scaled down to a largest norm
def bounded_rows(wrong):
    class Rows(Function):
        @staticmethod
        def forward(ctx, table, i, bound):
            ctx.save_for_backward(table, i)
            ctx.bound = bound
            rows = table[i]
            norm = rows.square().sum(1, keepdim=True).sqrt()
            rows = rows * (bound / norm.clamp(min=bound))
            if wrong:
                table.data[i] = rows
            return rows

        @staticmethod
        def backward(ctx, grad_y):
            table, i = ctx.saved_tensors
            rows = table[i]
            norm = rows.square().sum(1, keepdim=True)
            long = norm > ctx.bound**2
            norm = torch.where(long, norm, 1).sqrt()
            unit = rows / norm
            shrunk = ctx.bound / norm * (grad_y - unit * (grad_y * unit).sum(1, keepdim=True))
            grad = torch.where(long, shrunk, grad_y)
            return torch.zeros_like(table).index_add(0, i, grad), None, None

    def rows(table, i, bound=5.0):
        sized("table", table, None, None)
        check(i.ndim == 1, "i: expected one dimension")
        indices("i", i, len(table))
        check(bound > 0, "bound: expected a positive number")
        check(bool(table.square().sum(1).isfinite().all()), "table: expected finite norms")
        return Rows.apply(table, i.long(), bound)

    return rows


add(
    "bounded_rows_writes",
    bounded_rows,
    lambda: (real(5, 3), whole(5, 4)),
    bug="Forward writes the scaled rows into the caller's table",
    trigger="a row longer than the bound",
)


# A three-tap blur that repeats the border
def blur(wrong):
    class Blur(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            p = F.pad(x[:, None], (1, 1), mode="replicate")
            return F.conv1d(p, w[None, None])[:, 0]

        @staticmethod
        def backward(ctx, grad_y):
            x, w = ctx.saved_tensors
            p = F.pad(x[:, None], (1, 1), mode="replicate")[:, 0]
            full = F.conv_transpose1d(grad_y[:, None], w[None, None])[:, 0]
            grad_x = full[:, 1:-1]
            if not wrong:
                ends = torch.zeros_like(grad_x)
                ends = ends.index_add(1, ends.new_zeros(1, dtype=torch.long), full[:, :1])
                last = torch.full((1,), x.shape[1] - 1, device=x.device)
                grad_x = grad_x + ends.index_add(1, last, full[:, -1:])
            return grad_x, (grad_y[..., None] * p.unfold(1, 3, 1)).sum((0, 1))

    def filtered(x, w):
        sized("x", x, None, None)
        sized("w", w, 3)
        return Blur.apply(x, w)

    return filtered


add(
    "blur_border",
    blur,
    lambda: (real(2, 5), real(3, seed=1)),
    bug="Backward is that of a border of zeros: what the repeated ends return is cut off",
)


# Energies of bands of some width: y_b = sum of x^2 in band b
def band_energies(wrong):
    class Energies(Function):
        @staticmethod
        def forward(ctx, x, width):
            ctx.save_for_backward(x)
            ctx.width = width
            bands = x.square().split(width)
            y = torch.zeros(len(bands), device=x.device, dtype=None if wrong else x.dtype)
            for i, band in enumerate(bands):
                y[i] = band.sum()
            return y

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            band = torch.arange(len(x), device=x.device) // ctx.width
            return 2 * x * grad_y.to(x.dtype)[band], None

    def energies(x, width=3):
        sized("x", x, None)
        check(width >= 1, "width: expected a number of at least 1")
        return Energies.apply(x, width)

    return energies


add(
    "band_energies_dtype",
    band_energies,
    lambda: (real(8),),
    bug="The result is made in torch's default dtype, into which float64 numbers are written",
    trigger="float64 x",
)
