"""Images and signals: resampling and convolution."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add
from tests.verify.unseen.sixteenth import expect


class BlurPool(Function):
    @staticmethod
    def matrix(like, size):
        """The filter 1 2 1, every second place, of an axis with its mirror image beyond the borders."""
        eye = F.pad(torch.eye(size, dtype=like.dtype, device=like.device), (1, 1), "reflect")
        return ((eye[:, :-2] + 2 * eye[:, 1:-1] + eye[:, 2:]) / 4)[:, ::2]

    @staticmethod
    def forward(ctx, x):
        ctx.size = x.shape[2:]
        a, b = (BlurPool.matrix(x, size) for size in ctx.size)
        return a.mT @ x @ b

    @staticmethod
    def backward(ctx, g):
        a, b = (BlurPool.matrix(g, size) for size in ctx.size)
        return a @ g @ b.mT


class BlurPoolPacked(BlurPool):
    @staticmethod
    def backward(ctx, g):
        _, c, h, w = g.shape
        return BlurPool.backward(ctx, g.as_strided(g.shape, (c * h * w, h * w, w, 1)))


def _blur_pool(function):
    def blur_pool(x):
        """Every second pixel of x (N, C, H, W), blurred by 1 2 1 along both axes, reflected at borders; H, W > 1."""
        expect(x.dim() == 4 and min(x.shape[2:]) > 1, "x (N, C, H, W), H, W > 1", tuple(x.shape))
        return function.apply(x)

    return blur_pool


add(
    "blur_pool_packed",
    _blur_pool,
    BlurPoolPacked,
    BlurPool,
    lambda: (real(2, 3, 4, 5),),
    bug="backward's kernel reads grad_output's memory in order, whatever its strides are",
    shows="a transposed or expanded grad_output",
)


class Carafe(Function):
    @staticmethod
    def cells(x, size, scale):
        """Every pixel's neighbours (N, C, K, H, W) at each of its scale x scale new pixels."""
        n, c, h, w = x.shape
        x = F.unfold(x, size, padding=size // 2).view(n, c, size * size, h, w)
        return x.repeat_interleave(scale, 3).repeat_interleave(scale, 4)

    @staticmethod
    def forward(ctx, x, w, scale):
        ctx.save_for_backward(x, w)
        ctx.size, ctx.scale = int(w.shape[1] ** 0.5), scale
        return (Carafe.cells(x, ctx.size, scale) * w[:, None]).sum(2)

    @staticmethod
    def gradients(ctx, g, flat):
        x, w = ctx.saved_tensors
        n, _, height, width = x.shape
        cells = Carafe.cells(x, ctx.size, ctx.scale)
        g = flat(g).unflatten(2, w.shape[2:])[:, :, None]
        d = (g * w[:, None]).reshape(n, -1, height, ctx.scale, width, ctx.scale).sum((3, 5))
        grad = F.fold(d.flatten(2), (height, width), ctx.size, padding=ctx.size // 2)
        return grad, (g * cells).sum(1), None

    @staticmethod
    def backward(ctx, g):
        return Carafe.gradients(ctx, g, lambda g: g.flatten(2))


class CarafeView(Carafe):
    @staticmethod
    def backward(ctx, g):
        return Carafe.gradients(ctx, g, lambda g: g.view(*g.shape[:2], -1))


def _carafe(function):
    def carafe(x, w, scale=2):
        """x (N, C, H, W), not empty, in (N, C, scale H, scale W): each new pixel sums its old one's k x k neighbours.

        By w (N, k², scale H, scale W), k odd; zeros are beyond the borders; scale from 1 to 4.
        """
        expect(x.dim() == 4 and x.numel(), "x (N, C, H, W), not empty", tuple(x.shape))
        expect(scale in (1, 2, 3, 4), "scale from 1 to 4", scale)
        n, _, height, width = x.shape
        expect(
            w.dim() == 4
            and (w.shape[0], *w.shape[2:]) == (n, scale * height, scale * width)
            and w.shape[1] in [k * k for k in (1, 3, 5, 7)],
            "w (N, k², scale H, scale W), k odd, to 7",
            tuple(w.shape),
        )
        return function.apply(x, w, scale)

    return carafe


add(
    "carafe_view",
    _carafe,
    CarafeView,
    Carafe,
    lambda: (real(1, 2, 2, 3), real(1, 9, 4, 6, seed=1)),
    bug="view of a grad_output that is not contiguous",
    shows="a transposed grad_output",
)


class Resample(Function):
    """Zeros between the samples, zeros around, the filter, every down-th sample."""

    @staticmethod
    def forward(ctx, x, f, up, down, pad, flip):
        ctx.save_for_backward(x, f)
        ctx.options = up, down, pad, flip
        f = f if flip else f.flip(0)
        n = x.shape[0] * x.shape[1]
        return F.conv1d(Resample.raised(x, up, pad), f[None, None], stride=down).view(
            *x.shape[:2], -1 if n else 0
        )

    @staticmethod
    def raised(x, up, pad):
        return F.pad(F.pad(x.flatten(0, 1)[..., None], (0, up - 1)).flatten(1), pad)[:, None]

    @staticmethod
    def gradients(ctx, g, flip):
        x, f = ctx.saved_tensors
        up, down, pad, flipped = ctx.options
        taps = f if flip else f.flip(0)
        raised = Resample.raised(x, up, pad)
        g = g.flatten(0, 1)
        d = F.conv_transpose1d(g[:, None], taps[None, None], stride=down)[:, 0]
        d = F.pad(d, (0, raised.shape[-1] - d.shape[-1]))
        d = d[:, pad[0] : pad[0] + up * x.shape[2] : up]
        windows = raised[:, 0].unfold(1, len(f), down)
        of_f = (g[..., None] * windows).sum((0, 1))
        return d.view(x.shape), of_f if flipped else of_f.flip(0), None, None, None, None

    @staticmethod
    def backward(ctx, g):
        return Resample.gradients(ctx, g, ctx.options[3])


class ResampleFlip(Resample):
    @staticmethod
    def backward(ctx, g):
        return Resample.gradients(ctx, g, False)


def _resample(function):
    def resample(x, f, up=2, down=1, padding=(1, 1), flip_filter=False):
        """Every down-th of x (N, C, L) with up - 1 zeros after each sample, padding zeros around, convolved by f (K,).

        flip_filter: correlated with f. Not empty. up, down from 1 to 4; padding >= 0; K at most up L and the padding.
        """
        expect(x.dim() == 3 and x.numel(), "x (N, C, L), not empty", tuple(x.shape))
        expect(f.dim() == 1 and len(f), "f (K,)", tuple(f.shape))
        expect(up in (1, 2, 3, 4) and down in (1, 2, 3, 4), "up, down from 1 to 4", (up, down))
        expect(min(padding) >= 0, "padding >= 0", padding)
        expect(len(f) <= up * x.shape[2] + sum(padding), "K at most the length", len(f))
        return function.apply(x, f, up, down, padding, flip_filter)

    return resample


add(
    "resample_flip",
    _resample,
    ResampleFlip,
    Resample,
    lambda: (real(2, 2, 5), real(3, seed=1)),
    bug="backward does not know of flip_filter",
    shows="flip_filter=True",
)


class Conv1d(Function):
    """By windows: those of one group are multiplied by its filters."""

    @staticmethod
    def index(x, size, length, stride, dilation):
        steps, taps = (torch.arange(n, device=x.device) for n in (length, size))
        return steps[:, None] * stride + taps * dilation

    @staticmethod
    def forward(ctx, x, w, stride, padding, dilation, groups):
        ctx.save_for_backward(x, w)
        length = (x.shape[2] + 2 * padding - dilation * (w.shape[2] - 1) - 1) // stride + 1
        ctx.options = length, stride, padding, dilation, groups
        windows = F.pad(x, (padding, padding))[
            ..., Conv1d.index(x, w.shape[2], length, stride, dilation)
        ]
        return torch.einsum(
            "ngclk,gock->ngol", windows.unflatten(1, (groups, -1)), w.unflatten(0, (groups, -1))
        ).flatten(1, 2)

    @staticmethod
    def gradients(ctx, g, of_filters):
        x, w = ctx.saved_tensors
        length, stride, padding, dilation, groups = ctx.options
        size = w.shape[2]
        padded = F.pad(x, (padding, padding))
        g = g.unflatten(1, (groups, -1))
        index = Conv1d.index(x, size, length, stride, of_filters(dilation))
        grad_w = torch.einsum("ngclk,ngol->gock", padded[..., index].unflatten(1, (groups, -1)), g)
        d = torch.einsum("ngol,gock->ngclk", g, w.unflatten(0, (groups, -1))).flatten(1, 2)
        index = Conv1d.index(x, size, length, stride, dilation).flatten()
        grad = torch.zeros_like(padded).index_add(2, index, d.flatten(2))
        grad = grad[..., padding : padding + x.shape[2]]
        return grad, grad_w.flatten(0, 1), None, None, None, None

    @staticmethod
    def backward(ctx, g):
        return Conv1d.gradients(ctx, g, lambda dilation: dilation)


class Conv1dDilation(Conv1d):
    @staticmethod
    def backward(ctx, g):
        return Conv1d.gradients(ctx, g, lambda dilation: 1)


def _conv(function):
    def conv1d(x, w, stride=1, padding=0, dilation=1, groups=1):
        """torch's conv1d without bias of x (N, C, L) with w (O, C / groups, K), O a multiple of groups; none empty.

        The window, dilation (K - 1) + 1, is at most L + 2 padding.
        """
        expect(
            x.dim() == w.dim() == 3 and x.numel() and w.numel(),
            "x (N, C, L), w (O, C / groups, K)",
            tuple(w.shape),
        )
        expect(stride > 0 and padding >= 0 and dilation > 0 and groups > 0, "options", stride)
        expect(
            x.shape[1] == groups * w.shape[1] and w.shape[0] % groups == 0, "groups", tuple(w.shape)
        )
        expect(dilation * (w.shape[2] - 1) < x.shape[2] + 2 * padding, "a window in x", dilation)
        return function.apply(x, w, stride, padding, dilation, groups)

    return conv1d


add(
    "conv1d_dilation",
    _conv,
    Conv1dDilation,
    Conv1d,
    lambda: (real(2, 2, 6), real(4, 1, 3, seed=1)),
    bug="the filters' gradient takes windows without dilation",
    shows="dilation other than 1",
    kwargs=lambda: {"groups": 2},
)
