"""Projection, colours and compositing."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.eighteenth import add, uniform


class ProjectPix(Function):
    @staticmethod
    def hom(points, projmat):
        return points @ projmat[:, :3].mT + projmat[:, 3]

    @staticmethod
    def forward(ctx, points, projmat, width, height):
        ctx.save_for_backward(points, projmat)
        ctx.size = width, height
        p = ProjectPix.hom(points, projmat)
        ndc = p[:, :2] / (p[:, 3:] + 1e-6)
        return 0.5 * ((ndc + 1) * points.new_tensor([width, height]) - 1)

    @staticmethod
    def gradients(ctx, g, of_w):
        points, projmat = ctx.saved_tensors
        p = ProjectPix.hom(points, projmat)
        rw = 1 / (p[:, 3:] + 1e-6)
        ndc = 0.5 * g * points.new_tensor(ctx.size)
        d = torch.cat((ndc * rw, torch.zeros_like(rw), -of_w(ndc, p) * rw * rw), 1)
        return d @ projmat[:, :3], None, None, None

    @staticmethod
    def backward(ctx, g):
        return ProjectPix.gradients(ctx, g, lambda ndc, p: (ndc * p[:, :2]).sum(1, keepdim=True))


class ProjectPixSum(ProjectPix):
    @staticmethod
    def backward(ctx, g):
        return ProjectPix.gradients(ctx, g, lambda ndc, p: ndc.sum(1, keepdim=True))


def _project_pix(function):
    def project_pix(points, projmat, width=8, height=6):
        """Pixels (N, 2) of points (N, 3), all before the camera, by the constant projmat (4, 4)."""
        return function.apply(points, projmat, width, height)

    return project_pix


def _scene():
    points = real(4, 3, grad=False) + torch.tensor([0.0, 0.0, 4.0], dtype=F64)
    rows = [[1.2, 0, 0, 0], [0, 1.4, 0, 0], [0, 0, 1.01, -0.1], [0, 0, 1, 0]]
    return points.requires_grad_(), torch.tensor(rows, dtype=F64)


add(
    "project_pix_depth",
    _project_pix,
    ProjectPixSum,
    ProjectPix,
    _scene,
    bug="the depth's gradient is without the projected coordinates (WebODM/OpenSplat#185)",
    trigger="the sample",
)


class Composite(Function):
    @staticmethod
    def weights(alpha):
        """What each splat sees of the light, and what the background sees."""
        left = (1 - alpha).cumprod(-1)
        return torch.cat((torch.ones_like(left[..., :1]), left[..., :-1]), -1), left[..., -1:]

    @staticmethod
    def forward(ctx, alpha, color, background):
        ctx.save_for_backward(alpha, color, background)
        t, last = Composite.weights(alpha)
        return ((t * alpha).unsqueeze(-1) * color).sum(-2) + last * background

    @staticmethod
    def gradients(ctx, g, twice):
        alpha, color, background = ctx.saved_tensors
        t, _ = Composite.weights(alpha)
        seen, through = [background.expand_as(g)], [torch.ones_like(alpha[..., 0])]  # behind each
        for k in range(alpha.shape[-1] - 1, 0, -1):
            a = alpha[..., k, None]
            seen.insert(0, a * color[..., k, :] + (1 - a) * seen[0])
            through.insert(0, through[0] * (1 - alpha[..., k]))
        d = t * ((color - torch.stack(seen, -2)) * g.unsqueeze(-2)).sum(-1)
        if twice:
            d = d - t * torch.stack(through, -1) * (background * g).sum(-1, keepdim=True)
        return d, (t * alpha).unsqueeze(-1) * g.unsqueeze(-2), None

    @staticmethod
    def backward(ctx, g):
        return Composite.gradients(ctx, g, False)


class CompositeTwice(Composite):
    @staticmethod
    def backward(ctx, g):
        return Composite.gradients(ctx, g, True)


def _composite(function):
    def composite(alpha, color, background):
        """Pixels (P, 3) of K > 0 splats from front to back, before a constant background (3,).

        alpha (P, K), 0 <= alpha < 1, and color (P, K, 3).
        """
        return function.apply(alpha, color, background)

    return composite


add(
    "composite_background",
    _composite,
    CompositeTwice,
    Composite,
    lambda: (uniform(2, 3, high=0.9), uniform(2, 3, 3, seed=1), uniform(3, seed=2, grad=False)),
    bug="the background counts twice in alpha's gradient (graphdeco-inria/diff-gaussian-rasterization#86)",
    trigger="the sample",
)


class Harmonics(Function):
    @staticmethod
    def basis(d):
        x, y, z = d.unbind(-1)
        first = 0.4886025119029199
        return torch.stack(
            (torch.full_like(x, 0.28209479177387814), -first * y, first * z, -first * x), -1
        )

    @staticmethod
    def slope(g):
        """The directions' gradient, from that of the basis."""
        return 0.4886025119029199 * torch.stack((-g[..., 3], -g[..., 1], g[..., 2]), -1)

    @staticmethod
    def forward(ctx, viewdirs, coeffs):
        ctx.save_for_backward(viewdirs, coeffs)
        return (Harmonics.basis(viewdirs).unsqueeze(-1) * coeffs).sum(-2)

    @staticmethod
    def backward(ctx, g):
        viewdirs, coeffs = ctx.saved_tensors
        grad = Harmonics.basis(viewdirs).unsqueeze(-1) * g.unsqueeze(-2)
        return Harmonics.slope((coeffs * g.unsqueeze(-2)).sum(-1)), grad


class HarmonicsDetached(Harmonics):
    @staticmethod
    def backward(ctx, g):
        return None, Harmonics.backward(ctx, g)[1]


def _harmonics(function):
    def spherical_harmonics(viewdirs, coeffs):
        """Colours (N, 3) seen from viewdirs (N, 3), of harmonics of degrees 0 and 1 with coeffs (N, 4, 3)."""
        return function.apply(viewdirs, coeffs)

    return spherical_harmonics


add(
    "spherical_harmonics_view",
    _harmonics,
    HarmonicsDetached,
    Harmonics,
    lambda: (
        torch.nn.functional.normalize(real(4, 3, grad=False), dim=-1).requires_grad_(),
        real(4, 4, 3, seed=1),
    ),
    bug="the view directions get no gradient (nerfstudio-project/gsplat#183)",
    trigger="the sample",
)


class Points(Function):
    @staticmethod
    def forward(ctx, position, coeffs):
        ctx.save_for_backward(position, coeffs)
        view = position / position.norm(dim=-1, keepdim=True)
        color = (Harmonics.basis(view).unsqueeze(-1) * coeffs).sum(-2)
        return position[:, :2] / position[:, 2:], color

    @staticmethod
    def gradients(ctx, g_uv, g_color, seen):
        position, coeffs = ctx.saved_tensors
        z, length = position[:, 2:], position.norm(dim=-1, keepdim=True)
        grad = torch.cat(
            (g_uv / z, -(g_uv * position[:, :2]).sum(-1, keepdim=True) / z.square()), -1
        )
        view = position / length
        if seen:
            d = Harmonics.slope((coeffs * g_color.unsqueeze(-2)).sum(-1))
            grad = grad + (d - view * (view * d).sum(-1, keepdim=True)) / length
        return grad, Harmonics.basis(view).unsqueeze(-1) * g_color.unsqueeze(-2)

    @staticmethod
    def backward(ctx, g_uv, g_color):
        return Points.gradients(ctx, g_uv, g_color, True)


class PointsUnseen(Points):
    @staticmethod
    def backward(ctx, g_uv, g_color):
        return Points.gradients(ctx, g_uv, g_color, False)


def _points(function):
    def project_points(position, coeffs):
        """Image coordinates (N, 2) and colours (N, 3) of positions (N, 3) in the camera's frame, none at depth 0.

        The colours are harmonics of the direction, with coeffs (N, 4, 3).
        """
        return function.apply(position, coeffs)

    return project_points


add(
    "points_color",
    _points,
    PointsUnseen,
    Points,
    lambda: (_scene()[0], real(4, 4, 3, seed=1)),
    bug="the positions' gradient is without that of the colours (wanmeihuali/taichi_3d_gaussian_splatting#169)",
    trigger="the sample",
)
