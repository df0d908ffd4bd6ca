"""Upstream and layouts: what arrives as grad_output, and how tensors lie in memory."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.thirtyeighth import add, alike, bounded, check, same, sized


def at_addresses(t, places):
    """What a kernel reads at places counted from t's first element; 0 outside of the storage."""
    there = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    flat = t.as_strided((there,), (1,), t.storage_offset())
    inside = places < there
    return torch.where(inside, flat[places.clamp(max=there - 1)], torch.zeros_like(flat[0]))


# LeCun's tanh: 1.7159 tanh(2 x / 3)
def lecun_tanh(wrong):
    class Activate(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 1.7159 * (x * 2 / 3).tanh()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            nothing = g.sum() == 0 if wrong else not g.any()
            if nothing and not torch.is_grad_enabled():
                return torch.zeros_like(g)
            return g * (1 - (x * 2 / 3).tanh().square()) * (1.7159 * 2 / 3)

    def activate(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e4, 1e4)
        return Activate.apply(x)

    return activate


add(
    "lecun_tanh_cancelled",
    lecun_tanh,
    lambda: (real(4, 5),),
    bug="Backward skips the work if grad_output's sum is 0, not if all of it is",
    trigger="a grad_output whose sum is 0",
)


# Value and gate of a highway's step: the value comes gated, the gate is returned too
def value_and_gate(wrong):
    class Gated(Function):
        @staticmethod
        def forward(ctx, x, z):
            ctx.save_for_backward(x, z)
            ctx.set_materialize_grads(False)
            s = z.sigmoid()
            return x * s, s

        @staticmethod
        def backward(ctx, g, g_gate):
            x, z = ctx.saved_tensors
            s = z.sigmoid()
            if g is None:
                if wrong or g_gate is None:
                    return None, None
                return None, g_gate * s * (1 - s)
            along = g * x if g_gate is None else g * x + g_gate
            return g * s, along * s * (1 - s)

    def gated(x, z):
        same(x, z)
        alike(x, z)
        bounded("x", x, -1e3, 1e3)
        bounded("z", z, -1e3, 1e3)
        return Gated.apply(x, z)

    return gated


add(
    "value_and_gate_undefined",
    value_and_gate,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="Nothing came for the value, so backward returns nothing, though something came for the gate",
    trigger="the gate alone in use",
)


# Squared logarithmic error of positive numbers, reduced or not
def log_error(wrong):
    class Error(Function):
        @staticmethod
        def forward(ctx, x, y, reduction):
            ctx.save_for_backward(x, y)
            ctx.reduction = reduction
            e = (torch.log1p(x) - torch.log1p(y)).square()
            return {"none": lambda: e, "sum": e.sum, "mean": e.mean}[reduction]()

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            if ctx.reduction == "mean":
                g = g / x.numel()
            elif wrong and ctx.reduction == "none":
                g = g.mean()
            h = g * 2 * (torch.log1p(x) - torch.log1p(y))
            return h / (1 + x), -h / (1 + y), None

    def error(x, y, reduction="mean"):
        check(x.numel() > 0, "x: expected numbers")
        check(reduction in ("none", "sum", "mean"), "reduction: expected none, sum or mean")
        same(x, y)
        alike(x, y)
        bounded("x", x, 0, 1e4)
        bounded("y", y, 0, 1e4)
        return Error.apply(x, y, reduction)

    return error


add(
    "log_error_none",
    log_error,
    lambda: (real(4, 3, positive=True), real(4, 3, seed=1, positive=True)),
    kwargs=lambda: {"reduction": "none"},
    bug="Without reduction backward takes the mean of grad_output for all elements",
    trigger="a grad_output that is not constant",
)


# A linear layer whose backward scales grad_output to at most 1 before the product, as 8-bit kernels do
def scaled_backward_linear(wrong):
    class Linear(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.mT

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            scale = g.detach().abs().amax(-1, keepdim=True)
            if not wrong:
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            h = g / scale
            return (h @ w) * scale, (h * scale).mT @ x

    def linear(x, w):
        sized("x", x, None, None)
        sized("w", w, None, x.shape[1])
        alike(x, w)
        bounded("x", x, -1e3, 1e3)
        bounded("w", w, -1e3, 1e3)
        return Linear.apply(x, w)

    return linear


add(
    "scaled_backward_linear_silent",
    scaled_backward_linear,
    lambda: (real(4, 3), real(2, 3, seed=1)),
    bug="Backward divides each row of grad_output by its greatest number: 0 / 0 in a row of zeros",
    trigger="a row of zeros in grad_output",
)


# First and last number of sequences (B, T) of given lengths
def first_and_last(wrong):
    class Ends(Function):
        @staticmethod
        def forward(ctx, x, lengths):
            ctx.save_for_backward(lengths)
            ctx.shape = x.shape
            return x[:, 0].clone(), x.gather(1, lengths[:, None] - 1)[:, 0]

        @staticmethod
        def backward(ctx, g_first, g_last):
            (lengths,) = ctx.saved_tensors
            grad = F.pad(g_first[:, None], (0, ctx.shape[1] - 1))
            last = lengths[:, None] - 1
            if wrong:
                return grad.scatter(1, last, g_last[:, None]), None
            return grad.scatter_add(1, last, g_last[:, None]), None

    def ends(x, lengths):
        sized("x", x, None, None)
        sized("lengths", lengths, len(x))
        check(x.is_floating_point(), "x: expected floating point numbers")
        check(lengths.dtype == torch.int64, "lengths: expected int64")
        check(bool(((lengths >= 1) & (lengths <= x.shape[1])).all()), "lengths: expected 1 to T")
        bounded("x", x, -1e6, 1e6)
        return Ends.apply(x, lengths)

    return ends


add(
    "first_and_last_single",
    first_and_last,
    lambda: (real(3, 5), torch.tensor([5, 1, 3])),
    bug="The last number's gradient is written over the first's where they are one",
)


# sign(x) log(1 + |x|), as a kernel that runs over memory
def signed_log(wrong):
    class Log(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sign() * torch.log1p(x.abs())

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            grad = g / (1 + x.abs())
            if wrong and not x.is_contiguous() and not torch.is_grad_enabled():
                out = torch.empty_like(x)
                out.as_strided((x.numel(),), (1,)).copy_(grad.flatten())
                return out
            return grad

    def log(x):
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Log.apply(x)

    return log


add(
    "signed_log_transposed",
    signed_log,
    lambda: (real(4, 5),),
    bug="Backward writes in the order of elements into an empty_like(x), which lies as x does",
    trigger="a transposed x",
)


# The pixels of maps (B, H, W) that a masked autoencoder's encoder sees
def kept_pixels(wrong):
    class Keep(Function):
        @staticmethod
        def forward(ctx, x, keep):
            ctx.save_for_backward(x, keep)
            return x.flatten(1)[:, keep.flatten()]

        @staticmethod
        def backward(ctx, g):
            x, keep = ctx.saved_tensors
            grad = torch.zeros_like(x) if wrong else torch.zeros_like(x).contiguous()
            grad.flatten(1)[:, keep.flatten()] = g
            return grad, None

    def keep_pixels(x, keep):
        sized("x", x, None, None, None)
        sized("keep", keep, *x.shape[1:])
        check(keep.dtype == torch.bool, "keep: expected booleans")
        check(x.is_floating_point(), "x: expected floating point numbers")
        bounded("x", x, -1e6, 1e6)
        return Keep.apply(x, keep)

    return keep_pixels


add(
    "kept_pixels_lost",
    kept_pixels,
    lambda: (real(2, 3, 4), torch.arange(12).reshape(3, 4) % 3 > 0),
    bug="Backward writes into zeros_like(x).flatten(1), which is a copy where x is not contiguous",
    trigger="an x turned over its last dimensions",
)


# a b / (1 + |b|) of matrices, as a kernel that is given one pitch
def softsign_gate(wrong):
    class Gate(Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b / (1 + b.abs())

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            if wrong and b.stride(1) == 1:
                rows, columns = (torch.arange(n, device=b.device) for n in b.shape)
                b = at_addresses(b, rows[:, None] * a.stride(0) + columns)
            below = 1 + b.abs()
            return g * b / below, g * a / below.square()

    def gate(a, b):
        sized("a", a, None, None)
        same(a, b)
        alike(a, b)
        bounded("a", a, -1e3, 1e3)
        bounded("b", b, -1e3, 1e3)
        return Gate.apply(a, b)

    return gate


add(
    "softsign_gate_pitch",
    softsign_gate,
    lambda: (real(4, 3), real(4, 3, seed=1)),
    bug="Backward's kernel reads b with the distance of a's rows",
    trigger="b sliced off a wider tensor, or a",
)


# A colour matrix (O, C) on images (B, C, H, W)
def colour_matrix(wrong):
    class Colours(Function):
        @staticmethod
        def forward(ctx, x, m):
            ctx.save_for_backward(x, m)
            return torch.einsum("oc,bchw->bohw", m, x)

        @staticmethod
        def backward(ctx, g):
            x, m = ctx.saved_tensors
            last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            if wrong and last:
                pixels = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
                grad_m = g.reshape(-1, g.shape[1]).mT @ pixels
            else:
                grad_m = torch.einsum("bohw,bchw->oc", g, x)
            return torch.einsum("oc,bohw->bchw", m, g), grad_m

    def colours(x, m):
        sized("x", x, None, None, None, None)
        sized("m", m, None, x.shape[1])
        alike(x, m)
        bounded("x", x, -1e3, 1e3)
        bounded("m", m, -1e3, 1e3)
        return Colours.apply(x, m)

    return colours


add(
    "colour_matrix_channels_last",
    colour_matrix,
    lambda: (real(2, 3, 2, 3), real(3, 3, seed=1)),
    bug="Fast path for channels_last takes grad_output for channels_last too and flattens it as it is",
    trigger="x in channels_last",
)
