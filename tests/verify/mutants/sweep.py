"""Does a changed op differ from the right one at all? Both are run on all samples, in many ways, and compared."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchbp.ops._function import formula_only
from torchbp.ops._samples import EDGES, Make, over_tensors

__all__ = ["difference"]

F64 = torch.float64
# What two orders of the same arithmetic may differ by.
ROUNDING = {F64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4}
ROUNDING |= {torch.bfloat16: 2**-5, torch.float16: 2**-7}
SIZES = (
    20_000,
    300_000,
)  # beyond what an op takes at once, and what it takes whole in half precision


def difference(right, wrong):
    """Return where two records of an op differ in their gradients, and where the wrong one raises; "" if nowhere."""
    raises = ""
    for where, make, change, few in _variants(right):
        for sample, twin in _samples(right, make, change):
            name = f"{where} {sample.name or 'sample'}".strip()
            for way in FEW if few else WAYS:
                expected = _tried(WAYS[way], right.function, sample)
                got = _tried(WAYS[way], wrong.function, twin)
                found = _differ(got, expected, sample, way)
                if found and isinstance(got, type):
                    raises = raises or f"{name}, {way}: {found}"
                elif found:
                    return f"{name}, {way}: {found}", raises
    return "", raises


def _variants(op):
    """Yield (name, what makes the samples, what to do to their tensors, whether FEW will do)."""
    for seed in range(2):
        yield "", lambda seed=seed: op.samples(Make(seed=seed)), None, False
    for name, change in CHANGES.items():
        if name != "infinite":
            yield name, lambda: op.samples(Make()), change, True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield str(dtype), lambda dtype=dtype: op.samples(Make(dtype)), None, False
    for name in ("edges", "0.01", "30", "turned"):
        for dtype in (torch.bfloat16, torch.float16):
            label = f"{name} {dtype}"
            yield label, lambda dtype=dtype: op.samples(Make(dtype)), CHANGES[name], True
    for n in SIZES:
        for dtype in (F64, torch.float32, torch.bfloat16):
            label = f"{n} elements {dtype}"
            yield label, lambda n=n, dtype=dtype: [op.benchmark(Make(dtype), n)], None, True
    yield "infinite", lambda: op.samples(Make()), CHANGES["infinite"], True


def _samples(op, make, change):
    """Yield pairs of equal samples that share nothing."""
    for first, second in zip(make(), make(), strict=True):
        if not any(t.requires_grad for t in first.tensors()):
            continue
        yield tuple(s.over_tensors(change) if change else s for s in (first, second))


def _as_leaf(change):
    def call(t):
        if not (t.is_floating_point() or t.is_complex()) or not t.requires_grad:
            return t
        return change(t.detach()).detach().requires_grad_()

    return call


def _edges(t):
    values = torch.tensor(EDGES[:-3], dtype=F64)  # all that is finite
    some = values[torch.arange(t.numel()) * 5 % len(values)].clamp(-3e38, 3e38)
    some = some.clamp(-6e4, 6e4) if t.dtype == torch.float16 else some
    return (
        torch.where(torch.arange(t.numel()) % 3 == 0, t.flatten().to(F64), some)
        .view(t.shape)
        .to(t.dtype)
    )


def _turned(t):
    return t.mT.contiguous().mT if t.dim() > 1 else torch.stack((t, t), -1)[..., 0]


CHANGES = {
    "turned": _as_leaf(_turned),
    "edges": _as_leaf(_edges),
    "infinite": _as_leaf(
        lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 0, torch.inf, t)
    ),
    "0.01": _as_leaf(lambda t: t * 0.0078125),
    "30": _as_leaf(lambda t: t * 32),
    "negative": _as_leaf(lambda t: -t),
    "whole": _as_leaf(lambda t: t.clone() if t.is_complex() else t.round()),
    "alike": _as_leaf(lambda t: t[..., :1].expand(t.shape).clone() if t.dim() and t.numel() else t),
    "zero": _as_leaf(torch.zeros_like),
    "complex": _as_leaf(
        lambda t: torch.complex(t.to(F64), t.flip(0).to(F64) if t.dim() else t.to(F64))
    ),
}


def _tried(run, function, sample):
    """Return the tensors a way gives, or the type of the exception."""
    torch.manual_seed(0)
    try:
        return [t.detach() if isinstance(t, Tensor) else t for t in run(function, sample)]
    except Exception as error:
        return type(error)


def _call(function, sample):
    leaves = [t for t in sample.tensors() if t.requires_grad]
    outputs = function(*sample.args, **sample.kwargs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return leaves, [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]


def _like(outputs, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(y.shape, generator=generator, dtype=F64)).to(y.dtype) for y in outputs
    ]


def _grad(outputs, leaves, vs, **options):
    return torch.autograd.grad(outputs, leaves, vs, allow_unused=True, **options)


def _first(function, sample):
    """The gradient, twice through one graph; what it was made of, unchanged; the values."""
    leaves, outputs = _call(function, sample)
    vs = _like(outputs)
    before = [v.clone() for v in vs]
    one = _grad(outputs, leaves, vs, retain_graph=True)
    one = [g if g is None else g.clone() for g in one]
    two = _grad(outputs, leaves, vs, retain_graph=True)
    three = _grad(outputs[:1], leaves, vs[:1])
    return [*one, *two, *three, *vs, *before, *(x.clone() for x in leaves), *outputs]


def _formula(function, sample):
    with formula_only():
        return _first(function, sample)


def _layouts(function, sample):
    leaves, outputs = _call(function, sample)
    found = []
    for change in (
        lambda v: v.mT.contiguous().mT if v.dim() > 1 else torch.stack((v, v), -1)[..., 0],
        lambda v: v.flatten()[:1].sum().expand(v.shape),
        lambda v: 1e3 * v,
        lambda v: 0 * v,
    ):
        vs = [change(v) for v in _like(outputs)]
        found += _grad(outputs, leaves, vs, retain_graph=True)
    return found


def _raw(function, sample):
    """What backward itself returns: the dtypes and shapes, which autograd repairs."""
    _, outputs = _call(function, sample)
    if len({y.grad_fn for y in outputs}) > 1:
        return []
    raw = outputs[0].grad_fn(*_like(outputs))
    raw = raw if isinstance(raw, tuple) else (raw,)
    return [(g.dtype, tuple(g.shape)) if isinstance(g, Tensor) else None for g in raw]


def _second(function, sample):
    leaves, outputs = _call(function, sample)
    vs = [v.requires_grad_() for v in _like(outputs)]
    points = [*leaves, *vs]
    firsts = _grad(outputs, leaves, vs, create_graph=True)
    seconds = _again(firsts, points, 2)
    return [*firsts, *seconds, *_again(seconds, points, 40)]


def _again(grads, points, seed):
    """The gradients of the gradients, each with a grad_output of its own."""
    on = [
        (g, _like([g], seed + k)[0])
        for k, g in enumerate(grads)
        if g is not None and g.requires_grad
    ]
    if not on:
        return [None] * len(points)
    return _grad([g for g, _ in on], points, [v for _, v in on], create_graph=True)


def _alone(function, sample):
    """Each input's gradient where no other is asked for."""
    found = []
    count = sum(t.requires_grad for t in sample.tensors())
    for k in range(count):
        seen = []

        def one(t, k=k, seen=seen):
            if not t.requires_grad:
                return t
            seen.append(t)
            return t.detach().clone().requires_grad_(len(seen) - 1 == k)

        torch.manual_seed(0)
        found += _first(function, sample.over_tensors(one))
        seen.clear()
        found += _second(function, sample.over_tensors(one))
    return found


def _forward_mode(function, sample):
    """The tangents of the outputs, of all inputs together and of each alone."""
    return [t for _, tangents in _tangents(function, sample) for t in tangents]


def _forward_mode_backward(function, sample):
    """The gradients of these tangents."""
    found = []
    for leaves, tangents in _tangents(function, sample):
        for t in tangents:
            on = t is not None and t.requires_grad
            found += (
                _grad([t], leaves, _like([t]), retain_graph=True) if on else [None] * len(leaves)
            )
    return found


def _tangents(function, sample):
    leaves = [t for t in sample.tensors() if t.requires_grad]
    for k in range(-1, len(leaves) if len(leaves) > 1 else 0):
        seen = []
        generator = torch.Generator().manual_seed(3)

        def dual(t, k=k, seen=seen, generator=generator):
            if not t.requires_grad:
                return t
            seen.append(t)
            tangent = torch.randn(t.shape, generator=generator, dtype=F64).to(t.dtype)
            return forward_ad.make_dual(t, tangent) if k in (-1, len(seen) - 1) else t

        torch.manual_seed(0)
        with forward_ad.dual_level():
            duals = sample.over_tensors(dual)
            outputs = function(*duals.args, **duals.kwargs)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            yield leaves, [forward_ad.unpack_dual(y).tangent for y in outputs]


def _batched(function, sample):
    leaves, outputs = _call(function, sample)
    vs = [torch.stack((v, -2 * v, 0 * v)) for v in _like(outputs)]
    return _grad(outputs, leaves, vs, is_grads_batched=True)


def _vmapped(function, sample):
    leaves = [t for t in sample.tensors() if t.requires_grad]
    places = {id(t): k for k, t in enumerate(leaves)}

    def gradients(*rows):
        def value(*rows):
            args, kwargs = over_tensors(
                lambda t: rows[places[id(t)]] if id(t) in places else t,
                (sample.args, sample.kwargs),
            )
            return function(*args, **kwargs)

        y, vjp = torch.func.vjp(value, *rows)
        vs = _like([y] if isinstance(y, Tensor) else y)
        return y, vjp(vs[0] if isinstance(y, Tensor) else tuple(vs))

    stacks = [torch.stack((t.detach(), t.detach() * 0.5, t.detach() * 0.75)) for t in leaves]
    y, found = torch.func.vmap(gradients, randomness="same")(*stacks)
    return [*((y,) if isinstance(y, Tensor) else y), *found]


def _autocast(function, sample):
    with torch.autocast("cpu", torch.bfloat16):
        leaves, outputs = _call(function, sample)
    return _grad(outputs, leaves, _like(outputs))


def _modified(function, sample):
    """Whether backward raises after an input was written to, or gives what it gave before."""
    found = []
    for k in range(len(list(sample.tensors()))):
        fresh = sample.over_tensors(lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        torch.manual_seed(0)
        leaves, outputs = _call(function, fresh)
        vs, written = _like(outputs), list(fresh.tensors())[k]
        before = _grad(outputs, leaves, vs, retain_graph=True)
        with torch.no_grad():
            written.logical_not_() if written.dtype == torch.bool else written.add_(1)
        try:
            after = _grad(outputs, leaves, vs)
        except RuntimeError as error:
            if "modified" not in str(error):
                raise
            after = before
        found += [a is b or torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    return found


WAYS = {
    "first gradient": _first,
    "create_graph": _second,
    "formula": _formula,
    "layouts": _layouts,
    "raw gradient": _raw,
    "each alone": _alone,
    "forward mode": _forward_mode,
    "gradient of forward mode": _forward_mode_backward,
    "batched": _batched,
    "vmap": _vmapped,
    "autocast": _autocast,
    "modified": _modified,
}
FEW = ("first gradient", "create_graph", "forward mode")


def _differ(got, expected, sample, way):
    """Return how two results differ, "" if they do not, or where the right op refuses."""
    if isinstance(expected, type):
        return ""
    if isinstance(got, type):
        return got.__name__
    if len(got) != len(expected):
        return f"{len(got)} results instead of {len(expected)}"
    dtypes = {t.dtype for t in (*sample.tensors(), *expected) if isinstance(t, Tensor)}
    dtypes |= {torch.bfloat16} if way == "autocast" else set()
    rounding = max(ROUNDING.get(dtype, 0.0) for dtype in dtypes)
    pairs = zip(got, expected, strict=True)
    return next(
        (f"[{k}] {how}" for k, (a, b) in enumerate(pairs) if (how := _two(a, b, rounding))), ""
    )


def _two(a, b, rounding):
    """Return how two values differ; no gradient is as good as zeros."""
    if a is None or b is None:
        other = b if a is None else a
        some = isinstance(other, Tensor) and bool((other != 0).any())
        return "one of two is none" if some else ""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if a == b else f"{a} instead of {b}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype}, {tuple(a.shape)} instead of {b.dtype}, {tuple(b.shape)}"
    wide = torch.complex128 if b.is_complex() else F64
    x, y = a.to(wide), b.to(wide)
    largest = float(y[y.isfinite()].abs().max()) if y.isfinite().any() else 0.0
    # Less than a rounding of what goes in is no difference: the far tail of a sigmoid.
    least = 32 * torch.finfo(F64 if rounding < 1e-6 else torch.float32).eps
    atol = 0.1 * rounding * min(largest, 1e300) + least
    near = torch.isclose(x, y, rtol=rounding, atol=atol) | y.isnan()  # which is no number to miss
    if near.all():
        return ""
    at = tuple((~near).nonzero()[0].tolist())
    return f"at {list(at)}: {x[at].item():.6g} instead of {y[at].item():.6g}"
