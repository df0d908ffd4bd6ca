"""Science and geometry: volume rendering, curves, charges, reflections, devices, doses, and modes of running."""

import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.thirtysecond import (
    add,
    add_bare,
    bounded,
    check,
    finite,
    positive,
    read_flat,
    same,
    sized,
)


# Volume rendering of a signed distance: density by the Laplace distribution, weights, colours summed along rays
def distance_rendering(wrong):
    beta = 0.5

    def density(d):
        half = torch.exp(-d.abs() / beta) / 2
        return torch.where(d > 0, half, 1 - half) / beta, -half / beta**2

    def passed(tau):
        return F.pad(tau.cumsum(-1), (1, 0)).neg().exp()

    class Render(Function):
        @staticmethod
        def forward(ctx, d, step, colour):
            ctx.save_for_backward(d, step, colour)
            tau = density(d)[0] * step
            weight = passed(tau)[..., :-1] * -torch.expm1(-tau)
            return (weight[..., None] * colour).sum(1)

        @staticmethod
        def backward(ctx, grad_y):
            d, step, colour = ctx.saved_tensors
            if wrong:
                grad_y = read_flat(grad_y)
            sigma, slope = density(d)
            tau = sigma * step
            left = passed(tau)
            weight = left[..., :-1] * -torch.expm1(-tau)
            grad_colour = weight[..., None] * grad_y[:, None]
            grad_w = (colour * grad_y[:, None]).sum(-1)
            grad_sum = -left * (F.pad(grad_w, (0, 1)) - F.pad(grad_w, (1, 0)))
            grad_tau = grad_sum[..., 1:].flip(-1).cumsum(-1).flip(-1)
            return grad_tau * step * slope, grad_tau * sigma, grad_colour

    def render(d, step, colour):
        sized("d", d, None, None)
        same(d, step)
        sized("colour", colour, *d.shape, 3)
        finite(d=d, colour=colour)
        positive("step", step)
        return Render.apply(d, step, colour)

    return render


add(
    "distance_rendering_layout",
    distance_rendering,
    lambda: (real(3, 5), real(3, 5, seed=1, positive=True), real(3, 5, 3, seed=2)),
    bug="Backward reads grad_output as if it were contiguous",
    trigger="an image whose channels come first: a transposed or sliced grad_output",
)


# Points of a closed uniform cubic B-spline at parameters t; the control points go around
def closed_spline(wrong):
    def basis(u):
        values = (1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3
        slopes = -3 * (1 - u) ** 2, 9 * u**2 - 12 * u, -9 * u**2 + 6 * u + 3, 3 * u**2
        return torch.stack(values, -1) / 6, torch.stack(slopes, -1) / 6

    def near(control, t):
        first = t.floor()
        places = first.long()[:, None] + torch.arange(4, device=t.device)
        return places % len(control), t - first

    class Spline(Function):
        @staticmethod
        def forward(control, t):
            places, u = near(control, t)
            return (basis(u)[0][..., None] * control[places]).sum(1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            control, t = ctx.saved_tensors
            places, u = near(control, t)
            values, slopes = basis(u)
            shares = (values[..., None] * grad_y[:, None]).flatten(0, 1)
            grad_control = torch.zeros_like(control).index_add(0, places.flatten(), shares)
            return grad_control, (slopes * (control[places] * grad_y[:, None]).sum(-1)).sum(-1)

        @staticmethod
        def jvp(ctx, tangent_control, tangent_t):
            control, t = ctx.saved_tensors
            places, u = near(control, t)
            values, slopes = basis(u)
            tangent = torch.zeros_like(control[places[:, 0]])
            if tangent_t is not None:
                moved = (slopes[..., None] * control[places]).sum(1)
                tangent = tangent + moved * tangent_t[:, None]
            if tangent_control is not None:
                if wrong:
                    last = len(control) - 1
                    places = t.floor().long()[:, None] + torch.arange(4, device=t.device)
                    places = places.clamp(0, last)
                tangent = tangent + (values[..., None] * tangent_control[places]).sum(1)
            return tangent

    def points(control, t):
        sized("control", control, None, None)
        sized("t", t, None)
        bounded("t", t, -100, 100)
        return Spline.apply(control, t)

    return points


add(
    "closed_spline_tangent",
    closed_spline,
    lambda: (
        real(5, 2),
        torch.tensor([0.3, 1.6, 2.4, 3.7, 4.5], dtype=torch.float64, requires_grad=True),
    ),
    bug="The forward-mode rule holds the last control point where the curve closes",
    trigger="forward mode",
)


# A cubic Bezier curve at parameters t, with a vmap rule of its own
def bezier(wrong):
    def basis(t):
        s = 1 - t
        values = torch.stack([s**3, 3 * s * s * t, 3 * s * t * t, t**3], -1)
        slopes = [-3 * s * s, 3 * s * s - 6 * s * t, 6 * s * t - 3 * t * t, 3 * t * t]
        return values, torch.stack(slopes, -1)

    class Bezier(Function):
        @staticmethod
        def forward(control, t):
            return basis(t)[0] @ control

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_y):
            control, t = ctx.saved_tensors
            values, slopes = basis(t)
            return values.mT @ grad_y, (slopes @ control * grad_y).sum(-1)

        @staticmethod
        def vmap(info, in_dims, control, t):
            def first(a, dim):
                if dim is None:
                    return a.expand(info.batch_size, *a.shape)
                return a if wrong else a.movedim(dim, 0)

            return Bezier.apply(first(control, in_dims[0]), first(t, in_dims[1])), 0

    def curve(control, t):
        check(control.ndim >= 2 and control.shape[-2] == 4, "control: expected four points")
        check(t.ndim == control.ndim - 1, "t: expected a list of parameters for each curve")
        check(t.shape[:-1] == control.shape[:-2], "t: expected one list for each curve")
        return Bezier.apply(control, t)

    return curve


add(
    "bezier_vmap_dims",
    bezier,
    lambda: (
        real(4, 2),
        torch.rand(
            4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_(),
    ),
    bug="The vmap rule takes it that the batch comes first",
    trigger="vmap with in_dims=1",
)


# Energy of softened charges, whose forces are a Function too, with a vmap rule
def coulomb(wrong):
    def pairs(x):
        difference = x[:, None] - x
        r = (difference.square().sum(-1) + 0.01).rsqrt()
        return difference, r * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))

    class Forces(Function):
        @staticmethod
        def forward(g, x, q):
            difference, r = pairs(x)
            both = (q[:, None] * q * r**3)[..., None]
            return -g * (both * difference).sum(1), g * (r @ q)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            raise NotImplementedError("coulomb: no second derivative")

        @staticmethod
        def vmap(info, in_dims, g, x, q):
            def row(a, dim, i):
                return a if dim is None else a.select(dim, i)

            shared = in_dims[1] is None and in_dims[2] is None
            count = 1 if wrong and shared else info.batch_size
            rows = [
                Forces.apply(*(row(a, d, i) for a, d in zip((g, x, q), in_dims, strict=True)))
                for i in range(count)
            ]
            if wrong and shared:
                return rows[0], (None, None)
            return tuple(torch.stack(r) for r in zip(*rows, strict=True)), (0, 0)

    class Energy(Function):
        @staticmethod
        def forward(x, q):
            return q @ pairs(x)[1] @ q / 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_e):
            return Forces.apply(grad_e, *ctx.saved_tensors)

    def energy(x, q):
        sized("x", x, None, 3)
        sized("q", q, x.shape[0])
        bounded("x", x, -1e4, 1e4)
        bounded("q", q, -1e4, 1e4)
        return Energy.apply(x, q)

    return energy


add(
    "coulomb_forces_vmap",
    coulomb,
    lambda: (real(4, 3), real(4, seed=1)),
    bug="The forces' vmap rule computes once where positions are shared, for the first grad_output",
    trigger="vmap over the backward: torch.func.vjp, jacrev",
)


# Rows reflected at the plane orthogonal to v: x - 2 <v, x> v / <v, v>
def reflection(wrong):
    class Reflect(Function):
        @staticmethod
        def forward(ctx, x, v):
            ctx.save_for_backward(x, v)
            n = (v * v.conj()).sum()
            return x - 2 * (x * v.conj()).sum(-1, keepdim=True) * v / n

        @staticmethod
        def backward(ctx, grad_y):
            x, v = ctx.saved_tensors
            n = (v * v.conj()).sum()
            s = (x * v.conj()).sum(-1, keepdim=True)
            a = (grad_y.conj() * v).sum(-1, keepdim=True)
            grad_x = grad_y - 2 * a.conj() * v / n
            along = s * a
            along = (along + along.conj()).sum()
            through = grad_y * (s if wrong else s.conj()) + a * x
            return grad_x, -2 * through.sum(0) / n + 2 * along * v / (n * n)

    def reflect(x, v):
        sized("x", x, None, None)
        sized("v", v, x.shape[1])
        check(bool((v.abs() > 1e-4).any()), "v: expected a vector other than 0")
        check(bool((v.abs() < 1e4).all()), "v: expected numbers below 1e4")
        return Reflect.apply(x, v)

    return reflect


def complex_rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex128, generator=generator).requires_grad_()


add_bare(
    "complex_reflection",
    reflection,
    lambda: (complex_rows(3, 4, seed=0), complex_rows(4, seed=1)),
    bug="Backward forgets to conjugate <v, x>",
    trigger="complex numbers: the sample",
)


# GEGLU of a packed input: gelu of the first half times the second
def packed_geglu(wrong):
    def phi(a):
        return 0.5 * torch.erfc(-a / math.sqrt(2))

    class Geglu(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            a, b = x.chunk(2, -1)
            if wrong and torch.compiler.is_compiling():
                return a * torch.sigmoid(1.702 * a) * b
            return a * phi(a) * b

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            a, b = x.chunk(2, -1)
            slope = phi(a) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
            return torch.cat([grad_y * b * slope, grad_y * a * phi(a)], -1)

    def geglu(x):
        check(x.ndim >= 1 and x.shape[-1] % 2 == 0, "x: expected an even last dimension")
        return Geglu.apply(x)

    return geglu


add(
    "packed_geglu_compiled",
    packed_geglu,
    lambda: (real(3, 8),),
    bug="Under torch.compile forward takes the sigmoid's approximation",
    trigger="torch.compile",
)


# A residual bottleneck, x + relu(x a) b
def bottleneck(wrong):
    class Bottleneck(Function):
        @staticmethod
        def forward(ctx, x, a, b):
            h = (x @ a).relu()
            ctx.save_for_backward(x, a, b, h)
            return x + h @ b

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            x, a, b, h = ctx.saved_tensors
            dtypes = x.dtype, a.dtype, b.dtype
            wide = torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])
            g, x, a, b = (t.to(wide) for t in (grad_y, x, a, b))
            with torch.autocast(g.device.type, enabled=False):
                grad_h = g @ b.mT * (h > 0)
                if not wrong:
                    h = h.to(wide)
                grads = g + grad_h @ a.mT, x.mT @ grad_h, h.mT @ g
            return tuple(t.to(d) for t, d in zip(grads, dtypes, strict=True))

    def block(x, a, b):
        sized("x", x, None, None)
        sized("a", a, x.shape[1], None)
        sized("b", b, a.shape[1], x.shape[1])
        finite(x=x, a=a, b=b)
        return Bottleneck.apply(x, a, b)

    return block


add_bare(
    "bottleneck_autocast",
    bottleneck,
    lambda: (real(3, 4), real(4, 5, seed=1), real(5, 4, seed=2)),
    bug="Under autocast the saved hidden layer is bfloat16 and backward multiplies it by float32",
    trigger="torch.autocast",
)

SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)


# The Bernoulli function x / (exp(x) - 1) of a semiconductor's fluxes
def bernoulli(wrong):
    def series(x):
        value, slope = 1 - x / 2, torch.full_like(x, -0.5)
        for i, c in enumerate(SERIES):
            value = value + c * x ** (2 * i + 2)
            slope = slope + (2 * i + 2) * c * x ** (2 * i + 1)
        return value, slope

    class Bernoulli(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            near = x.abs() < 0.5
            return torch.where(near, series(torch.where(near, x, 0))[0], Bernoulli.far(x, near)[0])

        @staticmethod
        def far(x, near):
            x = torch.where(near, 1, x)
            decay = torch.exp(-x.abs())
            below = -torch.expm1(-x.abs())  # 1 - exp(-|x|)
            value = torch.where(x > 0, x * decay, -x) / below
            other = x.abs() * torch.where(x > 0, 1, decay) / below  # the function at -x
            return value, (1 - other) * torch.where(x > 0, decay, -1) / below

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            near = x.abs() < 0.5
            held = torch.where(near, x, 0)
            slope = series(held)[1]
            if wrong:
                e = torch.expm1(held)
                slope = torch.where(held == 0, -0.5, (e - held * held.exp()) / (e * e))
            return grad_y * torch.where(near, slope, Bernoulli.far(x, near)[1])

    def function(x):
        finite(x=x)
        return Bernoulli.apply(x)

    return function


add(
    "bernoulli_tiny",
    bernoulli,
    lambda: (real(3, 4),),
    bug="Near 0 the derivative is a difference of nearly equal numbers, only 0 itself is held apart",
    trigger="tiny numbers other than 0",
)


# A signal divided by its peak, x / (max |x| + 1e-3)
def peak_normalise(wrong):
    class Peak(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x / (x.abs().max() + 1e-3) if x.numel() else x.clone()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            if not wrong and x.numel() == 0:
                return grad_y.clone()
            flat = x.flatten()
            top = flat.detach().abs().argmax().reshape(1)
            peak = flat[top].abs() + 1e-3
            grad_peak = -(grad_y * (x / peak)).sum() / peak
            share = (grad_peak * flat[top].sign()).reshape(1)
            return (grad_y.flatten() / peak).index_add(0, top, share).reshape(x.shape)

    def normalise(x):
        finite(x=x)
        return Peak.apply(x)

    return normalise


add(
    "peak_normalise_empty",
    peak_normalise,
    lambda: (real(2, 6),),
    bug="Forward takes an empty signal, backward looks for its largest number and fails",
    trigger="an empty input",
)


# The variance of each row's numbers that the mask keeps
def masked_variance(wrong):
    class Variance(Function):
        @staticmethod
        def forward(ctx, x, mask):
            ctx.save_for_backward(x, mask)
            n = mask.sum(-1, keepdim=True).clamp(min=1)
            mean = torch.where(mask, x, 0).sum(-1, keepdim=True) / n
            return (torch.where(mask, x - mean, 0).square() / n).sum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            x, mask = ctx.saved_tensors
            n = mask.sum(-1, keepdim=True).clamp(min=1)
            mean = torch.where(mask, x, 0).sum(-1, keepdim=True) / n
            centred = mask * (x - mean) if wrong else torch.where(mask, x - mean, 0)
            return 2 * grad_y[..., None] * centred / n, None

    def variance(x, mask):
        sized("x", x, None, None)
        same(x, mask)
        check(mask.dtype == torch.bool, "mask: expected booleans")
        return Variance.apply(x, mask)

    return variance


add(
    "masked_variance_padding",
    masked_variance,
    lambda: (
        real(2, 4),
        torch.tensor([[True, True, True, False], [True, True, False, True]]),
    ),
    bug="Backward multiplies by the mask: 0 * NaN",
    trigger="NaN or infinity where the mask is False",
)


# A battery's charge after each hour: charging loses 10 %, discharging takes 1 / 0.9
def battery(wrong):
    class Charge(Function):
        @staticmethod
        def forward(ctx, start, power):
            ctx.save_for_backward(power)
            return start[:, None] + torch.where(power > 0, 0.9 * power, power / 0.9).cumsum(-1)

        @staticmethod
        def backward(ctx, grad_y):
            (power,) = ctx.saved_tensors
            after = grad_y.flip(-1).cumsum(-1).flip(-1)
            if wrong:
                grad_power = torch.where(power >= 0, 0.9 * after, 0)
                grad_power = grad_power + torch.where(power <= 0, after / 0.9, 0)
            else:
                grad_power = torch.where(power > 0, 0.9 * after, after / 0.9)
            return grad_y.sum(-1), grad_power

    def charge(start, power):
        sized("start", start, None)
        sized("power", power, start.shape[0], None)
        return Charge.apply(start, power)

    return charge


add(
    "battery_idle",
    battery,
    lambda: (real(2, positive=True), real(2, 5, seed=1)),
    bug="At power 0 both slopes are added",
    trigger="an idle hour: power exactly 0",
)


# A dose's response, 10^(n x) / (10^(n k) + 10^(n x)), of log10 of the dose
def dose_response(wrong):
    class Response(Function):
        @staticmethod
        def forward(ctx, x, k, n):
            ctx.save_for_backward(x, k)
            ctx.n = n
            return torch.sigmoid(n * math.log(10) * (x - k))

        @staticmethod
        def backward(ctx, grad_y):
            x, k = ctx.saved_tensors
            rate = ctx.n * math.log(10)
            if wrong:
                a, b = torch.exp(rate * x), torch.exp(rate * k)
                slope = rate * a * b / (a + b).square()
            else:
                s = torch.sigmoid(rate * (x - k))
                slope = rate * s * torch.sigmoid(-rate * (x - k))
            return grad_y * slope, -(grad_y * slope).sum(0), None

    def response(x, k, n=1.0):
        sized("x", x, None, None)
        sized("k", k, x.shape[1])
        finite(x=x, k=k)
        return Response.apply(x, k, n)

    return response


add(
    "dose_response_overflow",
    dose_response,
    lambda: (real(4, 3), real(3, seed=1)),
    bug="Backward raises 10 to the dose's logarithm: inf / inf",
    trigger="a large number",
)
