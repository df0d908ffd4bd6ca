"""Geometry, rendering, cameras and mechanics."""

import math

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.twentyninth import add, bounded, check, same, sized


# A fisheye camera (equidistant): x and y by the angle from the axis over the distance from it
def fisheye(wrong):
    class Fisheye(Function):
        @staticmethod
        def parts(p, guarded):
            """s = angle / r, and (z / (r^2 + z^2) - s) / r^2, by series near the axis."""
            x, y, z = p.unbind(-1)
            q = (x * x + y * y) / (z * z)
            near = (q < 0.01) if guarded else torch.zeros_like(q, dtype=torch.bool)
            a = torch.where(near, q, 0)
            t = (torch.where(near, 1, q) if guarded else q).sqrt()
            far = torch.atan(t) / t
            angle = torch.where(near, sum((-a) ** k / (2 * k + 1) for k in range(8)), far)
            bend = sum((-1) ** (k + 1) * (2 * k + 2) / (2 * k + 3) * a**k for k in range(8))
            bend = torch.where(near, bend, (1 / (1 + t * t) - far) / (t * t))
            return angle / z, bend / z**3

        @staticmethod
        def forward(ctx, p):
            ctx.save_for_backward(p)
            return p[..., :2] * Fisheye.parts(p, True)[0][..., None]

        @staticmethod
        def backward(ctx, grad_y):
            (p,) = ctx.saved_tensors
            s, bend = Fisheye.parts(p, not wrong)
            along = (grad_y * p[..., :2]).sum(-1)
            grad_xy = grad_y * s[..., None] + p[..., :2] * (along * bend)[..., None]
            grad_z = -along / p.square().sum(-1)
            return torch.cat((grad_xy, grad_z[..., None]), -1)

    def project(p):
        check(p.ndim >= 1 and p.shape[-1] == 3, "p: expected (..., 3)")
        bounded("p", p, -1e3, 1e3)
        check(bool((p[..., 2] > 1e-2).all()), "p: expected points before the camera")
        return Fisheye.apply(p)

    return project


def before_camera():
    p = real(4, 3).detach()
    p[:, 2] = p[:, 2].abs() + 0.5
    return (p.requires_grad_(),)


add(
    "fisheye_axis",
    fisheye,
    before_camera,
    bug="Forward has the series near the axis, backward divides by the distance from it",
    trigger="a point on the camera's axis",
)


# A filmic tone curve, held between 0 and 1
def filmic(wrong):
    a, b, c, d, e = 2.51, 0.03, 2.43, 0.59, 0.14

    class Filmic(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return ((x * (a * x + b)) / (x * (c * x + d) + e)).clamp(0, 1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            over, under = x * (a * x + b), x * (c * x + d) + e
            slope = ((2 * a * x + b) * under - over * (2 * c * x + d)) / under**2
            if not wrong:
                slope = torch.where(over < under, slope, 0)
            return grad_y * slope

    def curve(x):
        bounded("x", x, 0, 1e4)
        return Filmic.apply(x)

    return curve


add(
    "filmic_bright",
    filmic,
    lambda: (torch.sigmoid(real(3, 4)).detach().requires_grad_(),),
    bug="Backward does not know that bright places are held at 1",
    trigger="a brightness above 7.3",
)


# Integrated positional encoding: the mean of the sines of a normal's multiples
def integrated_encoding(wrong):
    class Encoding(Function):
        @staticmethod
        def forward(ctx, mean, variance, count):
            ctx.save_for_backward(mean, variance)
            ctx.count = count
            f = 2.0 ** torch.arange(count, dtype=mean.dtype, device=mean.device)
            m, v = mean[..., None] * f, variance[..., None] * f * f
            return torch.sin(m) * torch.exp(-v / 2)

        @staticmethod
        def backward(ctx, grad_y):
            mean, variance = ctx.saved_tensors
            f = 2.0 ** torch.arange(ctx.count, dtype=mean.dtype, device=mean.device)
            m, v = mean[..., None] * f, variance[..., None] * f * f
            fall = grad_y * torch.exp(-v / 2)
            share = f if wrong else f * f
            return (
                (fall * m.cos() * f).sum(-1),
                -(fall * m.sin() * share / 2).sum(-1),
                None,
            )

    def encode(mean, variance, count=3):
        same(mean, variance)
        check(1 <= count <= 12, "count: expected 1 to 12")
        bounded("mean", mean, -1e2, 1e2)
        bounded("variance", variance, 0, 1e3)
        return Encoding.apply(mean, variance, count)

    return encode


add(
    "integrated_encoding_variance",
    integrated_encoding,
    lambda: (real(3, 2), real(3, 2, seed=1, positive=True)),
    bug="The variance's gradient has the frequency where its square belongs",
)


# The force of two bodies that touch: stiffness times the depth to the power 3/2, none if they are apart
def contact_force(wrong):
    class Force(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(gap, stiffness):
            return stiffness * (-gap).clamp(min=0) ** 1.5

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            gap, stiffness = ctx.saved_tensors
            if wrong:
                depth, on = -gap, (gap < 0).to(gap.dtype)
                return -grad_y * on * stiffness * 1.5 * depth.sqrt(), grad_y * on * depth**1.5
            on = gap < 0
            root = torch.where(on, -gap, 1).sqrt()
            grad_gap = torch.where(on, -1.5 * grad_y * stiffness * root, 0)
            return grad_gap, torch.where(on, grad_y * root**3, 0)

    def force(gap, stiffness):
        same(gap, stiffness)
        bounded("gap", gap, -1e4, 1e4)
        bounded("stiffness", stiffness, -1e6, 1e6)
        return Force.apply(gap, stiffness)

    return force


def touching():
    return -real(3, 4, positive=True).detach(), real(3, 4, seed=1, positive=True)


add(
    "contact_force_apart",
    contact_force,
    lambda: (touching()[0].requires_grad_(), touching()[1]),
    bug="Where the bodies are apart the root is NaN, which 0 does not cancel",
    trigger="a gap above 0",
)


# The distances of points from planes through q with normals n, as in matching of scans
def plane_distance(wrong):
    class Distance(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(p, q, n):
            return ((p - q) * n).sum(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            p, q, n = ctx.saved_tensors
            g = grad_y[..., None]
            return g * n, -g * n, g * (p if wrong else p - q)

    def distance(p, q, n):
        same(p, q, n)
        check(p.ndim >= 1 and p.shape[-1] == 3, "p: expected (..., 3)")
        bounded("p", p, -1e6, 1e6)
        bounded("q", q, -1e6, 1e6)
        return Distance.apply(p, q, n)

    return distance


add(
    "plane_distance_normal",
    plane_distance,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2, grad=False)),
    bug="The normal's gradient leaves out the plane's point",
    trigger="normals that require grad",
)


# The step of a body that air slows: v - dt (c |v| v - f)
def drag_step(wrong):
    class Step(Function):
        @staticmethod
        def forward(ctx, v, f, c, dt):
            ctx.save_for_backward(v, c)
            ctx.dt = dt
            return v - dt * (c * v.norm(dim=-1, keepdim=True) * v - f)

        @staticmethod
        def backward(ctx, grad_y):
            v, c = ctx.saved_tensors
            speed = v.norm(dim=-1, keepdim=True)
            along = (grad_y * v).sum(-1, keepdim=True)
            side = v / speed if wrong else v / torch.where(speed == 0, 1, speed)
            grad_v = grad_y - ctx.dt * c * (speed * grad_y + along * side)
            return grad_v, ctx.dt * grad_y, -ctx.dt * (speed * v * grad_y).sum(), None

    def step(v, f, c, dt=0.1):
        same(v, f)
        check(v.ndim >= 1 and v.shape[-1] >= 1, "v: expected one dimension at least")
        sized("c", c)
        bounded("v", v, -1e4, 1e4)
        return Step.apply(v, f, c, float(dt))

    return step


add(
    "drag_step_still",
    drag_step,
    lambda: (
        real(2, 3),
        real(2, 3, seed=1),
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    ),
    bug="The direction of the velocity is 0 / 0, though the product with it is smooth",
    trigger="a body at rest",
)


# How evenly points lie: log of the mean of exp(-2 d^2) over all pairs i < j
def uniformity(wrong):
    class Uniformity(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
            return (-2 * (x[i] - x[j]).square().sum(1)).logsumexp(0) - math.log(len(i))

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
            d = x[i] - x[j]
            share = (-2 * d.square().sum(1)).softmax(0)
            g = grad_y * -4 * share[:, None] * d
            grad_x = torch.zeros_like(x).index_add(0, i, g)
            return grad_x if wrong else grad_x.index_add(0, j, -g)

    def evenness(x):
        sized("x", x, None, None)
        check(len(x) >= 2, "x: expected two points at least")
        bounded("x", x, -1e3, 1e3)
        return Uniformity.apply(x)

    return evenness


add(
    "uniformity_one_side",
    uniformity,
    lambda: (real(5, 3),),
    bug="Of a pair only the first point gets the gradient",
)
