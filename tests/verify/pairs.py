"""Wrong functions with right twins, part one: what no small random sample shows.

Each `Pair` holds a wrong differentiable function and a correct twin. A validator is good when it flags every
`wrong` and passes every `right`. `make(dtype, seed)` is the sample an ordinary user would write: small, random,
contiguous, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd import Function

F64 = torch.float64


@dataclass(frozen=True)
class Pair:
    name: str
    family: str
    bug: str
    trigger: str
    wrong: Callable
    right: Callable
    make: Callable
    gradcheck: bool  # whether torch.autograd.gradcheck catches it (torch 2.13, measured)
    reference: Callable | None = None  # a trusted function, or None: the twin is
    source: str = ""  # where it was reported
    needs_reference: bool = False  # forward and backward agree: only a reference can tell


PAIRS: dict[str, Pair] = {}


def register(name, family, wrong, right, make, *, bug, trigger, gradcheck=False, **more):
    PAIRS[name] = Pair(name, family, bug, trigger, wrong, right, make, gradcheck, **more)


# ---------------------------------------------------------------------------------------------- samples
def rand(*shape, low=None):
    """Sample maker: one random tensor per shape; `low` shifts values away from zero."""

    def make(dtype=F64, seed=0):
        g = torch.Generator().manual_seed(seed)
        out = []
        for s in shape:
            t = torch.randn(s, generator=g, dtype=F64)
            if low is not None:
                t = t.abs() + low
            out.append(t.to(dtype).requires_grad_())
        return tuple(out)

    return make


def rand_labels(*shape, classes):
    """Sample maker for classification losses: logits and integer targets."""

    def make(dtype=F64, seed=0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, classes, generator=g, dtype=F64).to(dtype).requires_grad_()
        return x, torch.randint(classes, shape, generator=g)

    return make


def raw(t, n):
    """What a kernel with hard-coded contiguous indexing reads: n consecutive elements from t's first
    address.  Reads past the end of the storage give zeros here (garbage on a real device).  Differentiable,
    so that double backward is as good or bad as first order."""
    there = min(n, t.untyped_storage().nbytes() // t.element_size() - t.storage_offset())
    return F.pad(t.as_strided((there,), (1,), t.storage_offset()), (0, n - there))


# ------------------------------------------------------------------------------------- base: elementwise
class Pointwise(Function):
    """Base of elementwise functions."""

    generate_vmap_rule = True

    @classmethod
    def fn(cls, x):
        return cls.apply(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])


def dtanh(x):
    return (1 - x.tanh() ** 2).conj()


class Tanh(Pointwise):
    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * dtanh(x)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * dtanh(x).conj()


class TanhSign(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -g * dtanh(x)


class TanhFactor(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * dtanh(x) * 2


class TanhNoUpstream(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return dtanh(x) * torch.ones_like(g)


class TanhOneElement(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gx = g * dtanh(x)
        gx = gx.clone()
        gx.view(-1)[-1:] *= 1.01
        return gx


class TanhClamp(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.clamp(-1, 1) * dtanh(x)


class TanhAbs(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.abs() * dtanh(x)


class TanhRawGrad(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return raw(g, g.numel()).view(g.shape) * dtanh(x)


class TanhInnerStride(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if g.dim() and g.stride(-1) != 1:
            g = g.contiguous()
        return raw(g, g.numel()).view(g.shape) * dtanh(x)


class TanhStrideZero(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        expanded = g.numel() > 1 and 0 in g.stride()
        g = raw(g, g.numel()).view(g.shape) if expanded else g
        return g * dtanh(x)


class TanhRawInput(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - raw(x, x.numel()).view(x.shape).tanh() ** 2)


class TanhEatsGrad(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.mul_(dtanh(x))


class TanhNoise(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * dtanh(x) * (1 + 1e-6 * torch.rand_like(x))


class TanhJvp(Tanh):
    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * (1 - x.tanh())


class TanhDetached(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh() ** 2)


class TanhHalf(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (g.half() * (1 - x.half().tanh() ** 2)).to(g.dtype)


class TanhFloatGrad(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.float() * (1 - x.float().tanh() ** 2)


class TanhWrongDevice(Tanh):
    @staticmethod
    def backward(ctx, g):
        return torch.empty_like(g, device="meta")


class TanhCompilePath(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        d = dtanh(x)
        return g * d * (0.5 if torch.compiler.is_compiling() else 1.0)


class TanhGraphBreak(Tanh):
    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        if not math.isfinite(float(x.detach().sum())):
            raise ValueError("non-finite input")
        return x.tanh()


class TanhEmpty(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scale = x.abs().max()
        return g * (1 - (x / scale * scale).tanh() ** 2)


class TanhVmap(Tanh):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x):
        return TanhVmap.apply(x), 0  # right only for in_dims == 0


class TanhStale(Tanh):
    last = None

    @staticmethod
    def setup_context(ctx, inputs, output):
        TanhStale.last = inputs[0]
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * (1 - TanhStale.last.tanh() ** 2)


class TanhCtxOutput(Tanh):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.y = output
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.y**2)


class TanhLeak(Tanh):
    kept: list = []  # noqa: RUF012  # the bug

    @staticmethod
    def setup_context(ctx, inputs, output):
        TanhLeak.kept.append(inputs[0].detach().clone())
        ctx.i = len(TanhLeak.kept) - 1
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])


class TanhDirty(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.detach().tanh_()  # writes over the caller's x without mark_dirty
        ctx.save_for_backward(x)
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


class TanhNoConj(Tanh):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def entry(cls):
    """A callable for a Function that has a jvp: dynamo refuses those, so compile a subclass without it."""
    plain = type(cls.__name__ + "Compiled", (cls,), {"jvp": staticmethod(Function.jvp)})

    def fn(x):
        return (plain if torch.compiler.is_compiling() else cls).apply(x)

    return fn


T = rand((3, 4))
tanh = entry(Tanh)
for _name, _fam, _cls, _bug, _trig, _gc in [
    ("sign_flip", "formula", TanhSign, "gradient has the wrong sign", "any input", True),
    ("factor_two", "formula", TanhFactor, "gradient is 2x too large", "any input", True),
    (
        "one_element_1pct",
        "formula",
        TanhOneElement,
        "only the last element is 1 % off",
        "any input",
        True,
    ),
    (
        "forgets_grad_output",
        "upstream",
        TanhNoUpstream,
        "does not multiply by grad_output",
        "any grad_output but ones",
        True,
    ),
    (
        "clamps_grad_output",
        "upstream",
        TanhClamp,
        "clamps grad_output to [-1, 1]",
        "|grad_output| > 1",
        False,
    ),
    ("abs_grad_output", "upstream", TanhAbs, "uses |grad_output|", "a negative grad_output", False),
    (
        "mutates_grad_output",
        "state",
        TanhEatsGrad,
        "writes in place on grad_output",
        "grad_output shared with another branch",
        False,
    ),
    (
        "raw_read_grad",
        "layout",
        TanhRawGrad,
        "indexes grad_output as if contiguous",
        "transposed, sliced or expanded grad_output",
        False,
    ),
    (
        "inner_stride_only",
        "layout",
        TanhInnerStride,
        "checks only the last stride of grad_output",
        "grad_output sliced by the backward of cat",
        False,
    ),
    (
        "stride0_grad",
        "layout",
        TanhStrideZero,
        "reads out of bounds on an expanded grad_output",
        "y.sum().backward()",
        False,
    ),
    (
        "raw_read_input",
        "layout",
        TanhRawInput,
        "indexes the saved input as if contiguous",
        "transposed input",
        False,
    ),
    (
        "nondeterministic",
        "state",
        TanhNoise,
        "backward adds random noise of 1e-6",
        "run twice",
        True,
    ),
    (
        "stale_class_cache",
        "state",
        TanhStale,
        "keeps the last input on the class",
        "applied twice in one graph",
        False,
    ),
    (
        "ctx_output_attribute",
        "state",
        TanhCtxOutput,
        "keeps the output as ctx attribute: cycle, no version check",
        "output modified in place; memory watched",
        False,
    ),
    (
        "global_leak",
        "state",
        TanhLeak,
        "appends every input to a global list",
        "memory watched",
        False,
    ),
    ("wrong_jvp", "transform", TanhJvp, "forward-mode rule is wrong", "forward AD", False),
    (
        "detached_double_backward",
        "transform",
        TanhDetached,
        "second derivative w.r.t. x is lost",
        "double backward",
        False,
    ),
    (
        "wrong_vmap",
        "transform",
        TanhVmap,
        "vmap rule ignores in_dims",
        "vmap with in_dims=1",
        False,
    ),
    (
        "compile_path_wrong",
        "transform",
        TanhCompilePath,
        "halves the gradient under torch.compile",
        "torch.compile",
        False,
    ),
    (
        "graph_break",
        "transform",
        TanhGraphBreak,
        "reads a tensor value in Python: breaks the graph and vmap",
        "torch.compile(fullgraph=True)",
        False,
    ),
    (
        "half_inside",
        "precision",
        TanhHalf,
        "computes the gradient in float16 whatever the input",
        "tolerance below 1e-3",
        True,
    ),
    (
        "float32_grad",
        "precision",
        TanhFloatGrad,
        "returns a float32 gradient for float64 input",
        "dtype watched; tolerance below 1e-7",
        False,
    ),
    (
        "wrong_device",
        "precision",
        TanhWrongDevice,
        "returns a gradient on another device",
        "any input",
        True,
    ),
    (
        "empty_crash",
        "coverage",
        TanhEmpty,
        "backward takes max() of an empty tensor",
        "empty input",
        False,
    ),
]:
    register(
        _name,
        _fam,
        entry(_cls),
        tanh,
        T,
        bug=_bug,
        trigger=_trig,
        gradcheck=_gc,
        reference=torch.tanh,
    )

register(
    "mutates_input",
    "state",
    TanhDirty.apply,
    tanh,
    T,
    reference=torch.tanh,
    gradcheck=True,
    bug="overwrites its input without mark_dirty",
    trigger="input compared before and after",
)


def complex_sample(dtype=torch.complex128, seed=0):
    return T(torch.complex128, seed)


register(
    "complex_no_conj",
    "coverage",
    entry(TanhNoConj),
    tanh,
    complex_sample,
    reference=torch.tanh,
    gradcheck=False,
    bug="forgets conj() for complex input",
    trigger="complex input",
)


# --------------------------------------------------------------------------------- domain edges and kinks
class Softplus(Pointwise):
    @staticmethod
    def forward(x):
        return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.sigmoid(x)


class SoftplusOverflow(Softplus):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.exp(x) / (1 + torch.exp(x))


class SafeSqrt(Pointwise):
    @staticmethod
    def forward(x):
        return x.clamp(min=0).sqrt()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        pos = x > 0
        return torch.where(pos, g * 0.5 / torch.where(pos, x, 1).sqrt(), 0)


class SafeSqrtNaN(SafeSqrt):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x > 0) * 0.5 / x.sqrt()


class Leaky(Pointwise):
    @staticmethod
    def forward(x):
        return torch.where(x > 0, x, 0.1 * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, 0.1 * g)


class LeakyScalars(Leaky):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.where(x > 0, 1.0, 0.1)  # two Python scalars make a float32 tensor


class LeakyKink(Leaky):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ((x >= 0).to(g.dtype) + 0.1 * (x <= 0).to(g.dtype))


register(
    "overflow_to_nan",
    "coverage",
    SoftplusOverflow.fn,
    Softplus.fn,
    T,
    reference=F.softplus,
    gradcheck=False,
    bug="exp overflows, gradient becomes NaN",
    trigger="large input (x > 710; > 88 in float32)",
)
register(
    "where_nan",
    "coverage",
    SafeSqrtNaN.fn,
    SafeSqrt.fn,
    rand((3, 4), low=0.1),
    gradcheck=False,
    bug="0 * inf: NaN leaks out of the masked branch",
    trigger="x <= 0",
)
register(
    "where_scalars_float32",
    "precision",
    LeakyScalars.fn,
    Leaky.fn,
    T,
    gradcheck=False,
    reference=lambda x: F.leaky_relu(x, 0.1),
    bug="torch.where of two Python scalars is float32: slope 0.1 is off by 1.5e-8",
    trigger="tolerance below 1e-8",
)
register(
    "kink_outside_subgradient",
    "coverage",
    LeakyKink.fn,
    Leaky.fn,
    T,
    gradcheck=False,
    reference=lambda x: F.leaky_relu(x, 0.1),
    bug="gradient at 0 is 1.1, outside [0.1, 1]",
    trigger="x == 0",
)


# -------------------------------------------------------------------------------- several inputs or outputs
def linear_grads(x, w, g):
    rows, cols = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return g @ w.conj(), rows.mT @ cols.conj(), rows.sum(0)


class Linear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, b):
        return x @ w.mT + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return linear_grads(x, w, g)

    @classmethod
    def fn(cls, x, w, b):
        return cls.apply(x, w, b)


class LinearBiasMean(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, gw, gb = linear_grads(x, w, g)
        return gx, gw, gb / max(g.numel() // g.shape[-1], 1)


class LinearTransposed(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, *linear_grads(x, w, g)[1:]


class LinearFrozen(Linear):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        gx, gw, gb = linear_grads(x, w, g)
        nx, nw, _ = ctx.needs_input_grad
        return gx if nx else None, gw if nw else None, gb if nw else None


class LinearAutocast(Linear):
    """Under autocast the output is bfloat16 but the saved tensors are float32."""

    @staticmethod
    def forward(x, w, b):
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return linear_grads(x, w, g)


class LinearAutocastOk(LinearAutocast):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return linear_grads(x, w, g.to(x.dtype))


L = rand((4, 3), (3, 3), (3,))
register(
    "bias_mean_not_sum",
    "formula",
    LinearBiasMean.fn,
    Linear.fn,
    L,
    reference=F.linear,
    gradcheck=True,
    bug="bias gradient averages over the batch instead of summing",
    trigger="batch > 1",
)
register(
    "transposed_weight",
    "formula",
    LinearTransposed.fn,
    Linear.fn,
    L,
    reference=F.linear,
    gradcheck=True,
    bug="multiplies by the transposed square weight",
    trigger="any input",
)
register(
    "frozen_weight",
    "coverage",
    LinearFrozen.fn,
    Linear.fn,
    L,
    reference=F.linear,
    gradcheck=False,
    bug="bias gradient is tied to the weight's flag: None when only the weight is frozen",
    trigger="weight frozen, bias not",
)
register(
    "autocast_dtype",
    "precision",
    LinearAutocast.fn,
    LinearAutocastOk.fn,
    L,
    reference=F.linear,
    gradcheck=False,
    bug="backward mixes dtypes under autocast",
    trigger="torch.autocast",
)


class SinCos(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gs, gc):
        (x,) = ctx.saved_tensors
        return gs * x.cos().conj() - gc * x.sin().conj()

    @classmethod
    def fn(cls, x):
        return cls.apply(x)


class SinCosOverwrite(SinCos):
    @staticmethod
    def backward(ctx, gs, gc):
        (x,) = ctx.saved_tensors
        gx = gs * x.cos()
        return torch.where(gc != 0, -gc * x.sin(), gx)  # should add


class SinCosUndefined(SinCos):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0])


register(
    "multi_output_overwrite",
    "upstream",
    SinCosOverwrite.fn,
    SinCos.fn,
    T,
    gradcheck=False,
    bug="gradients of two outputs overwrite each other instead of adding",
    trigger="both outputs used together",
)
register(
    "undefined_grad",
    "upstream",
    SinCosUndefined.fn,
    SinCos.fn,
    T,
    gradcheck=True,
    bug="fails when one grad_output is None",
    trigger="one output unused",
)


# ------------------------------------------------------------------------------------------------- losses
class MeanSquare(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return (x - y).square().mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = g * 2 * (x - y).conj() / max(x.numel(), 1)
        return gx, -gx

    @classmethod
    def fn(cls, x, y):
        return cls.apply(x, y)


class SumNotMean(MeanSquare):
    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gx = g * 2 * (x - y)
        return gx, -gx


class GradInForward(Function):
    """Computes the gradient in forward, scales the buffer in place in backward."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.gx = 2 * (x - y) / max(x.numel(), 1)
        return (x - y).square().mean()

    @staticmethod
    def backward(ctx, g):
        gx = ctx.gx.mul_(g)
        return gx, -gx


class LowSum(Function):
    """Column sums; the bad version keeps the running sum in the input's own dtype."""

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        acc = torch.zeros_like(w)
        for row in g * x:
            acc = acc + row
        return g * w, acc

    @classmethod
    def fn(cls, x, w):
        return cls.apply(x, w)


class GoodSum(LowSum):
    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        return g * w.conj(), (g.to(wide) * x.conj().to(wide)).sum(0).to(w.dtype)


register(
    "sum_not_mean",
    "formula",
    SumNotMean.fn,
    MeanSquare.fn,
    rand((3, 4), (3, 4)),
    reference=F.mse_loss,
    gradcheck=True,
    bug="gradient of the mean misses 1/N",
    trigger="any input",
)
register(
    "grad_buffer_in_place",
    "state",
    GradInForward.apply,
    MeanSquare.fn,
    rand((3, 4), (3, 4)),
    reference=F.mse_loss,
    gradcheck=False,
    bug="second backward through the same graph is scaled twice",
    trigger="retain_graph=True and grad_output != 1",
)
register(
    "low_precision_sum",
    "precision",
    LowSum.fn,
    GoodSum.fn,
    rand((6, 3), (3,)),
    gradcheck=False,
    bug="running sum in bfloat16 loses small addends",
    trigger="bfloat16 and many rows",
)


IGNORE = -100


class CrossEntropy(Function):
    """Saves only inputs (x, t, weight) and recomputes, so that double backward stays right."""

    @staticmethod
    def parts(x, t, weight):
        keep = t != IGNORE
        idx = torch.where(keep, t, 0)
        w = keep.to(x.dtype) if weight is None else weight[idx] * keep
        return x.log_softmax(-1), idx, w, w.sum()

    @staticmethod
    def forward(ctx, x, t, weight=None):
        p, idx, w, total = CrossEntropy.parts(x, t, weight)
        ctx.save_for_backward(x, t, weight)
        return -(p.gather(-1, idx[..., None])[..., 0] * w).sum() / total

    @staticmethod
    def backward(ctx, g):
        p, idx, w, total = CrossEntropy.parts(*ctx.saved_tensors)
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * (w / total)[..., None], None, None

    @classmethod
    def fn(cls, x, t, weight=None):
        return cls.apply(x, t, weight)


class CrossEntropyIgnored(CrossEntropy):
    @staticmethod
    def backward(ctx, g):
        p, idx, _w, total = CrossEntropy.parts(*ctx.saved_tensors)
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) / total, None, None


class CrossEntropyRows(CrossEntropy):
    @staticmethod
    def backward(ctx, g):
        p, idx, w, total = CrossEntropy.parts(*ctx.saved_tensors)
        total = total * p.shape[0] / idx.numel()
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * (w / total)[..., None], None, None


class CrossEntropyIntermediate(CrossEntropy):
    @staticmethod
    def forward(ctx, x, t, weight=None):
        p, idx, w, total = CrossEntropy.parts(x, t, weight)
        ctx.save_for_backward(p, idx, w, total)
        return -(p.gather(-1, idx[..., None])[..., 0] * w).sum() / total

    @staticmethod
    def backward(ctx, g):
        p, idx, w, total = ctx.saved_tensors
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * (w / total)[..., None], None, None


class CrossEntropyWeight(CrossEntropy):
    """Divides by N where torch divides by the sum of the weights, in forward and backward alike."""

    @staticmethod
    def forward(ctx, x, t, weight=None):
        p, idx, w, _total = CrossEntropy.parts(x, t, weight)
        ctx.save_for_backward(x, t, weight)
        return -(p.gather(-1, idx[..., None])[..., 0] * w).sum() / t.numel()

    @staticmethod
    def backward(ctx, g):
        p, idx, w, _total = CrossEntropy.parts(*ctx.saved_tensors)
        return g * (p.exp() - F.one_hot(idx, p.shape[-1])) * w[..., None] / idx.numel(), None, None


def labels_weight(dtype=F64, seed=0):
    x, t = rand_labels(4, classes=3)(dtype, seed)
    return x, t, torch.tensor([1.0, 2.0, 3.0], dtype=dtype)


def ce_reference(x, t, weight=None):
    return F.cross_entropy(x.flatten(0, -2), t.flatten(), weight)


register(
    "saved_intermediate",
    "transform",
    CrossEntropyIntermediate.fn,
    CrossEntropy.fn,
    rand_labels(4, classes=3),
    reference=ce_reference,
    gradcheck=False,
    bug="saves log_softmax computed in forward: double backward is silently wrong",
    trigger="double backward",
)
register(
    "ignored_rows",
    "coverage",
    CrossEntropyIgnored.fn,
    CrossEntropy.fn,
    rand_labels(4, classes=3),
    reference=ce_reference,
    gradcheck=False,
    bug="ignored targets still get a gradient",
    trigger="a target equal to ignore_index",
)
register(
    "rows_not_tokens",
    "coverage",
    CrossEntropyRows.fn,
    CrossEntropy.fn,
    rand_labels(4, classes=3),
    reference=ce_reference,
    gradcheck=False,
    bug="divides by shape[0] instead of the number of targets",
    trigger="3-d input",
)
register(
    "weighted_mean",
    "coverage",
    CrossEntropyWeight.fn,
    CrossEntropy.fn,
    labels_weight,
    needs_reference=True,
    reference=ce_reference,
    gradcheck=False,
    bug="forward and backward agree but differ from torch's definition",
    trigger="compared with a reference",
)
