"""Splats, composition, colours, interpolation of points, image similarity."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real, whole
from tests.verify.unseen.nineteenth import uniform
from tests.verify.unseen.twentieth import add, check, indices, same, sized


# G = exp(-1/2 (a dx^2 + c dy^2) - b dx dy)
def gaussian(wrong):
    class Gaussian(Function):
        @staticmethod
        def forward(ctx, points, mean, conic):
            sized("points", points, None, 2)
            sized("mean", mean, 2)
            sized("conic", conic, 3)
            ctx.save_for_backward(points, mean, conic)
            return value(points, mean, conic)

        @staticmethod
        def backward(ctx, grad_y):
            points, mean, conic = ctx.saved_tensors
            a, b, c = conic
            dx, dy = (points - mean).unbind(1)
            g = grad_y * value(points, mean, conic)
            grad_d = -torch.stack([g * (a * dx + b * dy), g * (c * dy + b * dx)], 1)
            half = 0.5 if wrong else 1.0
            grad_conic = [-0.5 * g * dx * dx, -half * g * dx * dy, -0.5 * g * dy * dy]
            return grad_d, -grad_d.sum(0), torch.stack([t.sum() for t in grad_conic])

    def value(points, mean, conic):
        a, b, c = conic
        dx, dy = (points - mean).unbind(1)
        return torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)

    return lambda points, mean, conic: Gaussian.apply(points, mean, conic)


add(
    "gaussian_conic",
    gaussian,
    lambda: (real(4, 2), real(2, seed=1), uniform(3, low=0.3, high=0.8, seed=2)),
    bug="diff-gaussian-rasterization (issue 94): the conic's term off the diagonal gets half of its"
    " gradient",
)


# y = sum_i T_i alpha_i c_i over the alphas that are not below 1/255
def composition(wrong):
    least = 1 / 255

    class Composition(Function):
        @staticmethod
        def forward(ctx, alpha, color):
            sized("alpha", alpha, None)
            sized("color", color, len(alpha), None)
            used = torch.where(alpha >= least, alpha, 0.0)
            left = torch.cat([torch.ones_like(used[:1]), (1 - used).cumprod(0)[:-1]])
            ctx.save_for_backward(alpha, color, left)
            return ((left * used)[:, None] * color).sum(0)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            alpha, color, left = ctx.saved_tensors
            used = alpha if wrong else torch.where(alpha >= least, alpha, 0.0)
            behind, grad_alpha = torch.zeros_like(grad_y), torch.zeros_like(alpha)
            for i in reversed(range(len(alpha))):
                grad_alpha[i] = left[i] * ((color[i] - behind) * grad_y).sum()
                behind = used[i] * color[i] + (1 - used[i]) * behind
            if not wrong:
                grad_alpha = torch.where(alpha >= least, grad_alpha, 0.0)
            return grad_alpha, (left * used)[:, None] * grad_y

    return lambda alpha, color: Composition.apply(alpha, color)


add(
    "composition_skipped",
    composition,
    lambda: (uniform(4, low=0.2, high=0.8), real(4, 3, seed=1)),
    bug="gaussian_splatting (issue 35): backward walks over the splats that forward skipped as too"
    " faint",
    trigger="an opacity below 1/255",
)


# colour of degree 1: c_0 k_0 + k_1 (-y c_1 + z c_2 - x c_3), direction made a unit vector
def harmonics(wrong):
    k0, k1 = 0.28209479177387814, 0.4886025119029199

    class Harmonics(Function):
        @staticmethod
        def forward(ctx, direction, c):
            sized("direction", direction, None, 3)
            sized("c", c, len(direction), 4, None)
            check(bool(direction.any(1).all()), "direction: expected no zero vector")
            ctx.save_for_backward(direction, c)
            x, y, z = (unit(direction)[:, i, None] for i in range(3))
            return k0 * c[:, 0] + k1 * (z * c[:, 2] - y * c[:, 1] - x * c[:, 3])

        @staticmethod
        def backward(ctx, grad_y):
            direction, c = ctx.saved_tensors
            u = unit(direction)
            x, y, z = (u[:, i, None] for i in range(3))
            along = [-c[:, 3], -c[:, 1], c[:, 2]]
            g = k1 * torch.stack([(grad_y * t).sum(1) for t in along], 1)
            if not wrong:
                norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
                g = (g - u * (g * u).sum(1, keepdim=True)) / norm
            grads = [k0 * grad_y, -k1 * y * grad_y, k1 * z * grad_y, -k1 * x * grad_y]
            return g, torch.stack(grads, 1)

    def unit(direction):
        return direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)

    return lambda direction, c: Harmonics.apply(direction, c)


add(
    "harmonics_direction",
    harmonics,
    lambda: (real(2, 3), real(2, 4, 3, seed=1)),
    bug="The direction is made a unit vector in forward only",
)


# y_n = sum_k w_nk f[index_nk]
def three_nearest(wrong):
    class Nearest(Function):
        @staticmethod
        def forward(ctx, f, index, w):
            sized("f", f, None, None)
            sized("index", index, None, 3)
            sized("w", w, *index.shape)
            indices("index", index, len(f))
            ctx.save_for_backward(f, index, w)
            return (w[..., None] * f[index]).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            f, index, w = ctx.saved_tensors
            if wrong:
                grad_f = (w[..., None] * grad_y[index]).sum(1)
            else:
                sent = (w[..., None] * grad_y[:, None]).flatten(0, 1)
                grad_f = torch.zeros_like(f).index_add(0, index.flatten(), sent)
            return grad_f, None, (f[index] * grad_y[:, None]).sum(-1)

    return lambda f, index, w: Nearest.apply(f, index, w)


add(
    "three_nearest_kernel",
    three_nearest,
    lambda: (real(4, 2), whole(4, 4, 3, seed=1), uniform(4, 3, seed=2)),
    bug="votenet (issue 36): backward launches forward's kernel",
)


# similarity of two images a channel, from the channel's means and variances
def similarity(wrong):
    c1, c2 = 0.01**2, 0.03**2

    class Similarity(Function):
        @staticmethod
        def forward(ctx, a, b):
            sized("a", a, None, None, None)
            same(a, b)
            ctx.save_for_backward(a, b)
            return moments(a, b)[0]

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            a, b = ctx.saved_tensors
            if wrong:  # the kernel reads both as (C, H, W) side by side
                shape = a.shape
                side_by_side = (shape[1] * shape[2], shape[2], 1)
                a, b = (torch.as_strided(t, shape, side_by_side) for t in (a, b))
            _, ma, mb, top1, top2, low1, low2 = moments(a, b)
            pixels = a.shape[1] * a.shape[2]
            g = (grad_y / pixels)[:, None, None]
            y = top1 * top2 / (low1 * low2)
            da, db = a - ma, b - mb
            # y = top1 top2 / (low1 low2), each a function of means, variances, covariance
            grad_a = 2 * mb * top2 / (low1 * low2) - y * 2 * ma / low1
            grad_a = grad_a + 2 * db * top1 / (low1 * low2) - y * 2 * da / low2
            grad_b = 2 * ma * top2 / (low1 * low2) - y * 2 * mb / low1
            grad_b = grad_b + 2 * da * top1 / (low1 * low2) - y * 2 * db / low2
            return g * grad_a, g * grad_b

    def moments(a, b):
        ma, mb = (t.mean((1, 2), keepdim=True) for t in (a, b))
        va, vb = (t.var((1, 2), keepdim=True, correction=0) for t in (a, b))
        cov = ((a - ma) * (b - mb)).mean((1, 2), keepdim=True)
        top1, top2 = 2 * ma * mb + c1, 2 * cov + c2
        low1, low2 = ma * ma + mb * mb + c1, va + vb + c2
        y = (top1 * top2 / (low1 * low2)).flatten()
        return y, ma, mb, top1, top2, low1, low2

    return lambda a, b: Similarity.apply(a, b)


add(
    "image_similarity_strides",
    similarity,
    lambda: (uniform(2, 3, 4), uniform(2, 3, 4, seed=1)),
    bug="optimized-fused-ssim (issue 1): the kernel reads the images as if they were contiguous",
    trigger="a permuted image",
)
