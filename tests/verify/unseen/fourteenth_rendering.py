"""Images: how they are rendered, and compared."""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fourteenth import add, require


class Composite(Function):
    """Splats front to back along rays; one that is hardly visible is skipped."""

    least = 1 / 255

    @staticmethod
    def parts(alpha):
        """The opacities that count, and the light that comes to each of them."""
        alpha = alpha * (alpha >= Composite.least)
        passed = torch.cat((torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]), 1)
        return alpha, passed.cumprod(1)

    @staticmethod
    def forward(ctx, alpha, colour):
        ctx.save_for_backward(alpha, colour)
        alpha, light = Composite.parts(alpha)
        return ((alpha * light).unsqueeze(2) * colour).sum(1)

    @staticmethod
    def gradients(ctx, g, light_of):
        saved, colour = ctx.saved_tensors
        alpha, light = Composite.parts(saved)
        light = light_of(alpha, light)
        weight = alpha * light
        dot = torch.einsum("rc,rsc->rs", g, colour)
        share = weight * dot
        behind = share.flip(1).cumsum(1).flip(1) - share
        grad = light * dot - behind / (1 - alpha)
        return grad * (saved >= Composite.least), weight.unsqueeze(2) * g.unsqueeze(1)

    @staticmethod
    def backward(ctx, g):
        return Composite.gradients(ctx, g, lambda alpha, light: light)


class CompositeSkipped(Composite):
    """From the back, the last splat's light is the final one, any other's is divided by what it lets pass."""

    @staticmethod
    def light_of(alpha, light):
        places = torch.arange(alpha.shape[1], device=alpha.device)
        last = torch.where(alpha > 0, places, -1).amax(1, keepdim=True).clamp(min=0)
        skipped = last < alpha.shape[1] - 1
        return light / torch.where(skipped, 1 - alpha.gather(1, last), 1)

    @staticmethod
    def backward(ctx, g):
        return Composite.gradients(ctx, g, CompositeSkipped.light_of)


def _composite(function):
    def composite(alpha, colour):
        """Colours (R, C) of rays through splats, S > 0, with opacities alpha (R, S) in [0, 0.99].

        colour is (R, S, C). A splat with alpha < 1 / 255 is left out.
        """
        require(alpha.dim() == 2 and alpha.shape[1] > 0, "alpha must be (R, S), S > 0")
        require(colour.dim() == 3 and colour.shape[:2] == alpha.shape, "colour must be (R, S, C)")
        require(bool(((alpha >= 0) & (alpha <= 0.99)).all()), "alpha must be in [0, 0.99]")
        return function.apply(alpha, colour)

    return composite


add(
    "composite_skipped",
    _composite,
    CompositeSkipped,
    Composite,
    lambda: ((real(2, 4, grad=False).sigmoid() * 0.9).requires_grad_(), real(2, 4, 3, seed=1)),
    bug="the final light is expected at the last splat, which was skipped (joeyan/gaussian_splatting#35)",
    trigger="a ray whose last splat is transparent",
)


class Ssim(Function):
    """Structural similarity in windows of 3 by 3."""

    @staticmethod
    def local(x):
        return F.avg_pool2d(x, 3, 1)

    @staticmethod
    def spread(g):
        """The transpose of local."""
        kernel = g.new_full((g.shape[1], 1, 3, 3), 1 / 9)
        return F.conv_transpose2d(g, kernel, groups=g.shape[1])

    @staticmethod
    def parts(x, y):
        mx, my = Ssim.local(x), Ssim.local(y)
        a, c = 2 * mx * my + 1e-4, mx**2 + my**2 + 1e-4
        b = 2 * (Ssim.local(x * y) - mx * my) + 9e-4
        d = Ssim.local(x**2) - mx**2 + Ssim.local(y**2) - my**2 + 9e-4
        return mx, my, a, b, c, d

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        _, _, a, b, c, d = Ssim.parts(x, y)
        return (a * b / (c * d)).mean()

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        mx, my, a, b, c, d = Ssim.parts(x, y)
        similar = a * b / (c * d)
        g = g / similar.numel()
        da, db, dc, dd = g * b / (c * d), g * a / (c * d), -g * similar / c, -g * similar / d
        by_mean = 2 * (my * (da - db) + mx * (dc - dd))
        return Ssim.spread(by_mean) + 2 * x * Ssim.spread(dd) + 2 * y * Ssim.spread(db), None


class SsimLayout(Ssim):
    """The kernel writes row by row into memory laid out as the image's."""

    @staticmethod
    def backward(ctx, g):
        grad, _ = Ssim.backward(ctx, g)
        out = torch.empty_like(ctx.saved_tensors[0])
        out.as_strided((out.numel(),), (1,)).copy_(grad.reshape(-1))
        return out, None


def _ssim(function):
    def ssim(x, y):
        """Mean structural similarity () of images x, y (N, C, H, W), H and W of 3 or more, N and C not 0.

        Values about [0, 1]. Gradient for x alone.
        """
        require(x.dim() == 4 and x.shape == y.shape, "x and y must be (N, C, H, W)")
        require(x.numel() > 0 and min(x.shape[2:]) >= 3, "H and W must be 3 or more, N and C not 0")
        require(not y.requires_grad, "y has no gradient; detach it")
        return function.apply(x, y)

    return ssim


add(
    "ssim_layout",
    _ssim,
    SsimLayout,
    Ssim,
    lambda: (
        real(1, 2, 5, 4, grad=False).sigmoid().requires_grad_(),
        real(1, 2, 5, 4, seed=1, grad=False).sigmoid(),
    ),
    bug="the gradient is written as if the image were dense (MrNeRF/optimized-fused-ssim#1)",
    trigger="a permuted image",
)


class Radiograph(Function):
    """What passes along each ray, scaled to [0, 1] over the image, dark where much passes."""

    @staticmethod
    def raw(density, step):
        return (-step * density.sum(-1)).exp()

    @staticmethod
    def forward(ctx, density, step):
        ctx.save_for_backward(density)
        ctx.step = step
        raw = Radiograph.raw(density, step)
        low, high = raw.aminmax()
        return 1 - (raw - low) / (high - low)

    @staticmethod
    def gradients(ctx, g, finish):
        (density,) = ctx.saved_tensors
        raw = Radiograph.raw(density, ctx.step)
        d = -ctx.step * finish(g, raw) * raw
        return d.unsqueeze(-1).expand_as(density), None

    @staticmethod
    def finish(g, raw):
        low, high = raw.aminmax()
        size = high - low
        scaled = (raw - low) / size
        to_low, to_high = (g * (1 - scaled)).sum() / size, (g * scaled).sum() / size
        at_low, at_high = (raw == low).to(raw.dtype), (raw == high).to(raw.dtype)
        return -g / size + to_low * at_low / at_low.sum() + to_high * at_high / at_high.sum()

    @staticmethod
    def backward(ctx, g):
        return Radiograph.gradients(ctx, g, Radiograph.finish)


class RadiographRaw(Radiograph):
    @staticmethod
    def backward(ctx, g):
        return Radiograph.gradients(ctx, g, lambda g, raw: g)


def _radiograph(function):
    def radiograph(density, step=0.5):
        """An inverted, normalised radiograph (P,) of densities (P, S) along P rays, in steps of a length > 0.

        No two rays let the same least or most light pass.
        """
        require(density.dim() == 2 and step > 0, "density must be (P, S), step positive")
        light = Radiograph.raw(density.detach(), step).sort()[0]
        good = len(light) > 1 and bool(light[0] < light[1]) and bool(light[-2] < light[-1])
        require(good, "one ray must be the lightest, one the darkest")
        return function.apply(density, step)

    return radiograph


add(
    "radiograph_finish",
    _radiograph,
    RadiographRaw,
    Radiograph,
    lambda: (real(5, 4, positive=True),),
    bug="backward knows the raw image, not its normalisation and inversion "
    "(isaac-for-healthcare/i4h-sensor-simulation#68)",
    trigger="the sample",
)
