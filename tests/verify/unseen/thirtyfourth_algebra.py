"""Algebra and numerics: special functions, quantised products, regression, curves, flow, projections."""

import torch
from torch.autograd import Function

from tests.verify.unseen import F64, real
from tests.verify.unseen.thirtyfourth import add, alike, bounded, check, sized


# exp(x^2) erfc(x) from -2.5 on
def scaled_erfc(wrong):
    root = 1.7724538509055159  # of pi

    class Scaled(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.special.erfcx(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if wrong:
                return g * (2 * x * torch.exp(x * x) * torch.erfc(x) - 2 / root)
            limit = 50.0 if x.dtype == F64 else 8.0
            far = x > limit
            safe = torch.where(far, torch.zeros_like(x), x)
            near = 2 * safe * Scaled.apply(safe) - 2 / root
            s = torch.where(far, x, torch.full_like(x, limit)).square().reciprocal()
            tail = s * (-1 / 2 + s * (3 / 4 + s * (-15 / 8 + s * (105 / 16 - s * 945 / 32))))
            return g * torch.where(far, 2 / root * tail, near)

    def erfcx(x):
        check(x.is_floating_point(), "expected floating point numbers")
        bounded("x", x, -2.5, 1e4)
        return Scaled.apply(x)

    return erfcx


add(
    "scaled_erfc_overflow",
    scaled_erfc,
    lambda: (real(8, positive=True),),
    bug="Backward takes exp(x^2) erfc(x) apart: infinity times 0",
    trigger="x above 27, in float32 above 10",
)


# x (B, I) times a matrix (O, I) of int8 codes with a zero point and a scale for each row
def dequantised(wrong):
    def integers(codes, zero, dtype):
        return codes.to(dtype) - zero.to(dtype)[:, None]

    class Product(Function):
        @staticmethod
        def forward(ctx, x, scale, codes, zero):
            ctx.save_for_backward(x, scale, codes, zero)
            return x @ (integers(codes, zero, x.dtype) * scale[:, None]).mT

        @staticmethod
        def backward(ctx, g):
            x, scale, codes, zero = ctx.saved_tensors
            w = (codes - zero[:, None]).to(x.dtype) if wrong else integers(codes, zero, x.dtype)
            return g @ (w * scale[:, None]), (g.mT @ x * w).sum(1), None, None

    def product(x, scale, codes, zero):
        sized("codes", codes, None, None)
        sized("x", x, None, codes.shape[1])
        sized("scale", scale, len(codes))
        sized("zero", zero, len(codes))
        check(codes.dtype == zero.dtype == torch.int8, "codes, zero: expected int8")
        alike(x, scale)
        bounded("x", x, -1e3, 1e3)
        bounded("scale", scale, -1e3, 1e3)
        return Product.apply(x, scale, codes, zero)

    return product


add(
    "dequantised_wraps",
    dequantised,
    lambda: (
        real(3, 6),
        real(4, seed=1, positive=True),
        torch.randint(-128, 128, (4, 6), generator=torch.Generator().manual_seed(3)).to(torch.int8),
        torch.tensor([-9, 4, 30, -21], dtype=torch.int8),
    ),
    bug="Backward subtracts the zero point in int8, which wraps around",
    trigger="codes at the end of the range (some in this sample)",
)


# Ridge regression's coefficients (A, K) for x (N, A), y (N, K), computed in float64
def ridge(wrong):
    def solve(x, y, strength):
        a = x.mT @ x + strength * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return a, torch.linalg.solve(a, x.mT @ y)

    class Ridge(Function):
        @staticmethod
        def forward(ctx, x, y, strength):
            ctx.save_for_backward(x, y, strength)
            return solve(x.double(), y.double(), strength.double())[1].to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            dtype = g.dtype
            x, y, strength = (t.double() for t in ctx.saved_tensors)
            a, w = solve(x, y, strength)
            v = torch.linalg.solve(a, g.double())
            back = x @ v
            grad_x = (y - x @ w) @ v.mT
            if not wrong:
                grad_x = grad_x - back @ w.mT
            return grad_x.to(dtype), back.to(dtype), -(v * w).sum().to(dtype)

    def coefficients(x, y, strength):
        sized("x", x, None, None)
        sized("y", y, len(x), None)
        check(strength.ndim == 0, "strength: expected one number")
        alike(x, y, strength)
        bounded("x", x, -100, 100)
        bounded("y", y, -1e3, 1e3)
        bounded("strength", strength, 0.01, 1e3)
        return Ridge.apply(x, y, strength)

    return coefficients


add(
    "ridge_matrix",
    ridge,
    lambda: (real(6, 3), real(6, 2, seed=1), torch.tensor(0.5, dtype=F64, requires_grad=True)),
    bug="x's gradient has the residual's part alone, without the fitted values' part",
)


# Discount factors from par rates of swaps that pay each year
def bootstrap(wrong):
    def curve(rates):
        factors, annuity = [], torch.zeros_like(rates[0])
        for s in rates:
            factors.append((1 - s * annuity) / (1 + s))
            annuity = annuity + factors[-1]
        return torch.stack(factors)

    class Bootstrap(Function):
        @staticmethod
        def forward(ctx, rates):
            ctx.save_for_backward(rates)
            return curve(rates)

        @staticmethod
        def backward(ctx, g):
            (rates,) = ctx.saved_tensors
            factors = curve(rates)
            annuity = factors.cumsum(0) - factors
            grads, earlier = [], torch.zeros_like(rates[0])
            for k in reversed(range(len(rates))):
                grad = g[k] + earlier
                grads.append(-grad * (1 + annuity[k]) / (1 + rates[k]) ** 2)
                step = -grad * rates[k] / (1 + rates[k])
                earlier = step if wrong else earlier + step
            return torch.stack(grads[::-1])

    def factors(rates):
        sized("rates", rates, None)
        bounded("rates", rates, 0, 0.5)
        check(rates.is_floating_point(), "expected floating point numbers")
        return Bootstrap.apply(rates)

    return factors


add(
    "bootstrap_next",
    bootstrap,
    lambda: (torch.tensor([0.02, 0.024, 0.027, 0.031, 0.03], dtype=F64, requires_grad=True),),
    bug="A factor gets the gradient of the next year's alone, not of all the later years'",
)


# Manning's discharge in a rectangular channel: k A R^(2/3) sqrt(slope), k one over the roughness
def discharge(wrong):
    def parts(k, width, depth, slope):
        area, around = width * depth, width + 2 * depth
        return area, around, k * area * (area / around) ** (2 / 3) * slope.sqrt()

    class Discharge(Function):
        @staticmethod
        def forward(k, width, depth, slope):
            return parts(k, width, depth, slope)[-1]

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, g):
            k, width, depth, slope = ctx.saved_tensors
            area, around, flow = parts(*ctx.saved_tensors)
            g = g * flow
            grad_area, grad_around = g * 5 / 3 / area, -g * 2 / 3 / around
            return (
                g / k,
                grad_area * depth + grad_around,
                grad_area * width + 2 * grad_around,
                g / slope / 2,
            )

        @staticmethod
        def jvp(ctx, k_t, width_t, depth_t, slope_t):
            k, width, depth, slope = ctx.saved_tensors
            area, around, flow = parts(*ctx.saved_tensors)
            k_t, width_t, depth_t, slope_t = (
                torch.zeros_like(flow) if t is None else t for t in (k_t, width_t, depth_t, slope_t)
            )
            area_t = width * depth_t + depth * width_t
            around_t = width_t if wrong else width_t + 2 * depth_t
            return flow * (
                k_t / k + 5 / 3 * area_t / area - 2 / 3 * around_t / around + slope_t / slope / 2
            )

    def flow(k, width, depth, slope):
        sized("k", k, None)
        for name, t in {"width": width, "depth": depth, "slope": slope}.items():
            sized(name, t, len(k))
        alike(k, width, depth, slope)
        bounded("k", k, 1, 50)
        bounded("width", width, 0.1, 5)
        bounded("depth", depth, 0.1, 5)
        bounded("slope", slope, 1e-3, 1)
        return Discharge.apply(k, width, depth, slope)

    return flow


add(
    "discharge_forward",
    discharge,
    lambda: tuple(
        (low + (high - low) * real(4, seed=s, grad=False).sigmoid()).requires_grad_()
        for s, (low, high) in enumerate(((20, 40), (1, 4), (0.3, 2), (0.002, 0.02)))
    ),
    bug="In forward mode the wetted perimeter does not grow with the depth",
    trigger="forward mode",
)


# Projection of rows (B, D) on the probability simplex
def simplex(wrong):
    class Project(Function):
        @staticmethod
        def forward(ctx, x):
            u = x.sort(-1, descending=True).values
            n = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
            excess = u.cumsum(-1) - 1
            size = (u * n > excess).sum(-1, keepdim=True).clamp(min=1)
            y = (x - excess.gather(-1, size - 1) / size).clamp(min=0)
            ctx.save_for_backward(y > 0)
            return y

        @staticmethod
        def backward(ctx, g):
            (support,) = ctx.saved_tensors
            kept = torch.where(support, g, torch.zeros_like(g))
            total = kept.sum(-1, keepdim=True)
            mean = total / (g.shape[-1] if wrong else support.sum(-1, keepdim=True).clamp(min=1))
            return torch.where(support, kept - mean, torch.zeros_like(g))

    def project(x):
        sized("x", x, None, None)
        check(x.is_floating_point(), "expected floating point numbers")
        bounded("x", x, -100, 100)
        return Project.apply(x)

    return project


add(
    "simplex_support",
    simplex,
    lambda: (real(3, 5),),
    bug="Backward subtracts the mean over all places, not over the support",
)
