"""Layouts: grad_output and saved inputs, indexed as a kernel indexes them."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.fortysecond import add, alike, bounded, check, read_flat, same, sized


# Bateman's amounts of a drug that is absorbed and excreted: ka / (ka - ke) (exp(-ke t) - exp(-ka t))
def bateman(wrong):
    class Bateman(Function):
        @staticmethod
        def forward(ctx, time, ka, ke):
            ctx.save_for_backward(time, ka, ke)
            gap = ka - ke
            return ka / gap * (-ke * time).exp() * -(-gap * time).expm1()

        @staticmethod
        def backward(ctx, g):
            time, ka, ke = ctx.saved_tensors
            g = read_flat(g) if wrong else g
            out, taken = (-ke * time).exp(), (-ka * time).exp()
            gap = ka - ke
            share, rest = ka / gap, -out * (-gap * time).expm1()
            by_time = g * share * (ka * taken - ke * out)
            by_ka = g * (share * time * taken - ke / gap.square() * rest)
            by_ke = g * (ka / gap.square() * rest - share * time * out)
            return by_time, by_ka, by_ke

    def amounts(time, ka, ke):
        same(time, ka, ke)
        alike(time, ka, ke)
        bounded("time", time, 0, 100)
        bounded("ka", ka, 0.01, 10)
        bounded("ke", ke, 0.001, 10)
        bounded("ka / ke", ka / ke, 1.2, 1e4)
        return Bateman.apply(time, ka, ke)

    return amounts


add(
    "bateman_flat",
    bateman,
    lambda: (
        real(3, 4, positive=True),
        (1 + real(3, 4, seed=1, grad=False).abs()).requires_grad_(),
        (0.2 + real(3, 4, seed=2, grad=False).sigmoid() / 2).requires_grad_(),
    ),
    bug="Backward indexes grad_output as if it were contiguous",
    trigger="a transposed, cut or expanded grad_output",
)


# Moebius' map of the disc's points z (..., 2): (z + a) / (1 + conj(a) z) with one learned point a of the disc
def moebius(wrong):
    def times(u, v):
        return torch.stack(
            [
                u[..., 0] * v[..., 0] - u[..., 1] * v[..., 1],
                u[..., 0] * v[..., 1] + u[..., 1] * v[..., 0],
            ],
            -1,
        )

    def conj(u):
        return torch.stack([u[..., 0], -u[..., 1]], -1)

    def ratio(u, v):
        return times(u, conj(v)) / v.square().sum(-1, keepdim=True)

    def below(z, a):
        under = times(conj(a), z)
        return torch.stack([1 + under[..., 0], under[..., 1]], -1)

    class Map(Function):
        @staticmethod
        def forward(ctx, z, a):
            ctx.save_for_backward(z, a)
            return ratio(z + a, below(z, a))

        @staticmethod
        def backward(ctx, g):
            z, a = ctx.saved_tensors
            if wrong and 0 in g.stride():
                g = read_flat(g)
            under = below(z, a)
            y = ratio(z + a, under)
            part = ratio(g, conj(under))
            by_under = -times(part, conj(y))
            by_z = part + times(by_under, a)
            by_a = part + times(conj(by_under), z)
            return by_z, by_a.reshape(-1, 2).sum(0)

    def moved(z, a):
        check(z.ndim >= 1 and z.shape[-1] == 2, "z: expected points (..., 2)")
        sized("a", a, 2)
        alike(z, a)
        bounded("|z|", z.detach().norm(dim=-1), 0, 0.95)
        bounded("|a|", a.detach().norm(), 0, 0.95)
        return Map.apply(z, a)

    return moved


add(
    "moebius_expanded",
    moebius,
    lambda: (
        (real(5, 2, grad=False).tanh() / 2).requires_grad_(),
        (real(2, seed=1, grad=False).tanh() / 2).requires_grad_(),
    ),
    bug="Backward reads past the only element of an expanded grad_output",
    trigger="the backward of a sum",
)


# Snell's refraction of unit-free ray directions (B, 3) at planes z = const: sines along the plane shrink by 1 / n
def snell(wrong):
    class Refraction(Function):
        @staticmethod
        def forward(ctx, ray, index):
            ctx.save_for_backward(ray, index)
            length = ray.norm(dim=1, keepdim=True)
            flat = ray[:, :2] / length / index[:, None]
            return torch.cat([flat, (1 - flat.square().sum(1, keepdim=True)).sqrt()], 1)

        @staticmethod
        def backward(ctx, g):
            ray, index = ctx.saved_tensors
            if wrong:
                g = read_flat(g if g.stride(1) == 1 else g.contiguous())
            n, length = index[:, None], ray.norm(dim=1, keepdim=True)
            unit = ray / length
            flat = unit[:, :2] / n
            height = (1 - flat.square().sum(1, keepdim=True)).sqrt()
            by_flat = g[:, :2] - g[:, 2:] * flat / height
            by_unit = torch.cat([by_flat / n, torch.zeros_like(height)], 1)
            by_ray = (by_unit - unit * (by_unit * unit).sum(1, keepdim=True)) / length
            return by_ray, -(by_flat * flat / n).sum(1)

    def refracted(ray, index):
        sized("ray", ray, None, 3)
        sized("index", index, len(ray))
        alike(ray, index)
        bounded("ray", ray, -100, 100)
        bounded("length", ray.detach().norm(dim=1), 0.05, 1e3)
        bounded("index", index, 1.05, 5)
        return Refraction.apply(ray, index)

    return refracted


add(
    "snell_last_stride",
    snell,
    lambda: (real(4, 3), (1.2 + real(4, seed=1, grad=False).sigmoid()).requires_grad_()),
    bug="Backward looks at grad_output's last stride only and takes the rows for dense",
    trigger="a grad_output cut out of wider rows, as by the backward of cat",
)


# Langmuir's isotherm of gases that compete for places: shares K p / (1 + sum of K p) of each row of pressures
def langmuir(wrong):
    class Langmuir(Function):
        @staticmethod
        def forward(ctx, pressure, affinity):
            ctx.save_for_backward(pressure, affinity)
            bound = pressure * affinity
            return bound / (1 + bound.sum(1, keepdim=True))

        @staticmethod
        def backward(ctx, g):
            pressure, affinity = ctx.saved_tensors
            if wrong:
                pressure = read_flat(pressure)
            bound = pressure * affinity
            total = 1 + bound.sum(1, keepdim=True)
            part = (g - (g * bound).sum(1, keepdim=True) / total) / total
            return part * affinity, (part * pressure).sum(0)

    def shares(pressure, affinity):
        sized("pressure", pressure, None, None)
        sized("affinity", affinity, pressure.shape[1])
        alike(pressure, affinity)
        bounded("pressure", pressure, 0, 1e3)
        bounded("affinity", affinity, 0, 1e3)
        return Langmuir.apply(pressure, affinity)

    return shares


add(
    "langmuir_flat_input",
    langmuir,
    lambda: (real(4, 3, positive=True), real(3, seed=1, positive=True)),
    bug="Backward indexes the saved pressures as if they were contiguous",
    trigger="transposed or cut pressures",
)


# Clark's squared divergence of positive tensors: ((p - q) / (p + q))^2 of each element
def clark(wrong):
    def memory(t):
        """Return a dense tensor's elements in the order of its memory."""
        return t.as_strided((t.numel(),), (1,), t.storage_offset())

    def dense(t):
        order = sorted(range(t.ndim), key=lambda k: -t.stride(k))
        return t.permute(order).is_contiguous()

    class Clark(Function):
        @staticmethod
        def forward(ctx, p, q):
            ctx.save_for_backward(p, q)
            return ((p - q) / (p + q)).square()

        @staticmethod
        def backward(ctx, g):
            p, q = ctx.saved_tensors
            if wrong and dense(p) and dense(q):
                q = memory(q).as_strided(p.shape, p.stride())
            part = g * 4 * (p - q) / (p + q) ** 3
            return part * q, -part * p

    def divergence(p, q):
        same(p, q)
        alike(p, q)
        bounded("p", p, 1e-2, 1e3)
        bounded("q", q, 1e-2, 1e3)
        return Clark.apply(p, q)

    return divergence


add(
    "clark_mixed_orders",
    clark,
    lambda: (real(3, 4, positive=True), real(3, 4, seed=1, positive=True)),
    bug="Backward walks through two dense tensors in the order of memory, also where their strides differ",
    trigger="one transposed input",
)
