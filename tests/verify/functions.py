"""Right functions of many kinds, torch's own: each alarm on one of them is false, or a defect of torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Sample = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]
FUNCTIONS: dict[str, Sample] = {}


def r(*shape, positive=False, unit=False):
    t = torch.randn(shape, dtype=torch.float64)
    t = t.abs() + 0.2 if positive else t
    return (t.sigmoid() * 0.8 + 0.1 if unit else t).requires_grad_()


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64, requires_grad=True)


def factored(size):
    lu, pivots = torch.linalg.lu_factor(torch.randn(size, size, dtype=torch.float64))
    return lu.requires_grad_(), pivots


def steep():
    """Return factors that, repeated to 34 by 34, make their gradient 10⁴ times as large."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(28)
        lu, pivots = torch.linalg.lu_factor(torch.randn(3, 3, dtype=torch.float64))
        return torch.randn(3, 2, dtype=torch.float64).requires_grad_(), lu.requires_grad_(), pivots


def add(name, function, make):
    FUNCTIONS[name] = (function, make)


UNARY = [
    "sin",
    "cos",
    "tan",
    "tanh",
    "sinh",
    "cosh",
    "asinh",
    "atan",
    "exp",
    "expm1",
    "exp2",
    "sigmoid",
    "erf",
    "erfc",
    "square",
    "neg",
    "abs",
    "relu",
    "sinc",
    "rad2deg",
    "deg2rad",
    "frac",
    "positive",
    "logcumsumexp0",
    "cumsum0",
    "softmax0",
    "log_softmax0",
    "logsumexp0",
    "sum",
    "mean",
    "prod",
    "std",
    "var",
    "norm",
    "amax",
    "amin",
    "max",
    "min",
    "median",
    "nanmedian",
    "nansum",
    "nanmean",
    "flatten",
    "ravel",
    "t",
    "clone",
    "flip0",
    "roll1",
    "diff",
    "tril",
    "triu",
    "diagonal",
    "trace",
    "msort",
    "unsqueeze0",
    "cumprod0",
    "cummax0",
    "cummin0",
    "argsort_gather",
    "nan_to_num",
    "clamp",
    "trapezoid",
    "squeeze",
    "tile2",
    "repeat_interleave2",
    "aminmax",
    "logit_of_sigmoid",
    "rot90",
    "fliplr",
    "flipud",
    "outer_self",
    "gram",
    "vander_like",
    "view_as_complex_abs",
]
SPECIAL = {
    "logcumsumexp0": lambda x: x.logcumsumexp(0),
    "cumsum0": lambda x: x.cumsum(0),
    "softmax0": lambda x: x.softmax(0),
    "log_softmax0": lambda x: x.log_softmax(0),
    "logsumexp0": lambda x: x.logsumexp(0),
    "flip0": lambda x: x.flip(0),
    "roll1": lambda x: x.roll(1, 0),
    "unsqueeze0": lambda x: x.unsqueeze(0),
    "cumprod0": lambda x: x.cumprod(0),
    "cummax0": lambda x: x.cummax(0).values,
    "cummin0": lambda x: x.cummin(0).values,
    "argsort_gather": lambda x: x.gather(1, x.argsort(1)),
    "clamp": lambda x: x.clamp(-1, 1),
    "tile2": lambda x: x.tile(2),
    "repeat_interleave2": lambda x: x.repeat_interleave(2, 0),
    "logit_of_sigmoid": lambda x: x.sigmoid().logit(),
    "outer_self": lambda x: torch.outer(x.sum(0), x.sum(1)),
    "gram": lambda x: x @ x.mT,
    "vander_like": lambda x: x[..., None] ** torch.arange(3),
    "view_as_complex_abs": lambda x: torch.view_as_complex(x.view(*x.shape[:-1], 2, 2)).abs(),
}
for _n in UNARY:
    add(_n, SPECIAL.get(_n) or getattr(torch, _n), lambda: (r(3, 4),))
for _n in ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma"]:
    add(_n, getattr(torch, _n), lambda: (r(3, 4, positive=True),))
for _n in ["asin", "acos", "atanh", "logit", "erfinv"]:
    add(_n, getattr(torch, _n), lambda: (r(3, 4, unit=True),))
for _n in ["i0e", "i1e", "ndtr", "log_ndtr", "entr", "xlog1py_self", "expit"]:
    add(_n, (lambda x: torch.special.xlog1py(x, x)) if _n == "xlog1py_self" else getattr(torch.special, _n),
        lambda: (r(3, 4, positive=True),))  # fmt: skip
for _n in [
    "relu",
    "relu6",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "softplus",
    "softsign",
    "tanhshrink",
    "logsigmoid",
    "leaky_relu",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "hardshrink",
    "softshrink",
    "threshold1",
    "glu",
    "softmin",
    "softmax1",
    "normalize",
    "gelu_tanh",
]:
    _f = {
        "threshold1": lambda x: F.threshold(x, 0.1, 0.5),
        "softmin": lambda x: F.softmin(x, 1),
        "softmax1": lambda x: F.softmax(x, 1),
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }.get(_n) or getattr(F, _n)
    add(f"F.{_n}", _f, lambda: (r(3, 4),))
for _n in [
    "add",
    "sub",
    "mul",
    "minimum",
    "maximum",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "atan2",
    "where_mask",
    "lerp",
]:
    _f = {
        "where_mask": lambda x, y: torch.where(x > 0, x, y),
        "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    }.get(_n) or getattr(torch, _n)
    add(_n, _f, lambda: (r(3, 4), r(3, 4)))
    add(f"{_n}_broadcast", _f, lambda: (r(3, 4), r(4)))
for _n in ["div", "pow", "fmod", "remainder", "xlogy", "copysign", "float_power"]:
    add(_n, getattr(torch, _n), lambda: (r(3, 4, positive=True), r(3, 4, positive=True)))
for _n, _shapes in {
    "matmul": ((3, 4), (4, 5)), "mm": ((3, 4), (4, 5)), "mv": ((3, 4), (4,)), "dot": ((4,), (4,)),
    "bmm": ((2, 3, 4), (2, 4, 5)), "outer": ((3,), (4,)), "addmm": ((3, 5), (3, 4), (4, 5)),
    "addmv": ((3,), (3, 4), (4,)), "baddbmm": ((2, 3, 5), (2, 3, 4), (2, 4, 5)), "addcmul": ((3,), (3,), (3,)),
    "cdist": ((3, 4), (5, 4)), "dist": ((3, 4), (3, 4)), "cross": ((2, 3), (2, 3)), "tensordot2": ((3, 4), (4, 3)),
    "cosine_similarity": ((3, 4), (3, 4)), "pairwise_distance": ((3, 4), (3, 4)), "vdot": ((4,), (4,)),
    "cat2": ((3, 4), (2, 4)), "stack2": ((3, 4), (3, 4)), "einsum": ((3, 4), (4, 5)), "inner": ((3, 4), (2, 4)),
}.items():  # fmt: skip
    _f = {
        "tensordot2": lambda x, y: torch.tensordot(x, y, 1),
        "cat2": lambda x, y: torch.cat([x, y]),
        "stack2": lambda x, y: torch.stack([x, y]),
        "einsum": lambda x, y: torch.einsum("ij,jk->ik", x, y),
        "cross": torch.linalg.cross,
        "pairwise_distance": F.pairwise_distance,
    }.get(_n) or getattr(torch, _n)
    add(_n, _f, lambda s=_shapes: tuple(r(*shape) for shape in s))
for _n in [
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "soft_margin_loss",
    "poisson_nll_loss",
]:
    add(f"F.{_n}", getattr(F, _n), lambda: (r(3, 4), r(3, 4).detach().abs()))
    add(
        f"F.{_n}_none",
        partial(getattr(F, _n), reduction="none"),
        lambda: (r(3, 4), r(3, 4).detach().abs()),
    )
add("F.bce", F.binary_cross_entropy, lambda: (r(3, 4, unit=True), r(3, 4, unit=True).detach()))
add(
    "F.bce_logits",
    F.binary_cross_entropy_with_logits,
    lambda: (r(3, 4), r(3, 4, unit=True).detach()),
)
add("F.kl_div", F.kl_div, lambda: (r(3, 4), r(3, 4, unit=True).detach()))
for _kw in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"reduction": "sum"}):
    add(f"F.cross_entropy{_kw or ''}", lambda x, t, kw=_kw: F.cross_entropy(x, t, **kw),
        lambda: (r(5, 3), torch.tensor([0, 2, 1, 1, 0])))  # fmt: skip
add("F.nll_loss", F.nll_loss, lambda: (r(5, 3), torch.tensor([0, 2, 1, 1, 0])))
add("F.multi_margin_loss", F.multi_margin_loss, lambda: (r(5, 3), torch.tensor([0, 2, 1, 1, 0])))
add("F.linear", F.linear, lambda: (r(4, 3), r(5, 3), r(5)))
add("F.embedding", lambda w, i: F.embedding(i, w), lambda: (r(5, 3), torch.tensor([0, 2, 2, 4])))
add("index_select", lambda x, i: x.index_select(0, i), lambda: (r(5, 3), torch.tensor([0, 2, 2])))
add(
    "gather", lambda x, i: x.gather(1, i), lambda: (r(3, 4), torch.tensor([[0, 1], [2, 2], [3, 0]]))
)
add(
    "index_add",
    lambda x, i, s: x.index_add(0, i, s),
    lambda: (r(5, 3), torch.tensor([0, 2]), r(2, 3)),
)
add("masked_fill", lambda x, m: x.masked_fill(m, 0.0), lambda: (r(3, 4), torch.rand(3, 4) > 0.5))
add("adaptive_avg_pool1d", F.adaptive_avg_pool1d, lambda: (r(3, 8, 8), 1))
add(
    "stft",
    lambda x: torch.view_as_real(torch.stft(x, 7, center=False, return_complex=True)),
    lambda: (r(10),),
)
add(
    "lu_solve of nothing",
    lambda b, lu: torch.lu_solve(b, lu, torch.tensor([1], dtype=torch.int32, device=b.device)),
    lambda: (zeros(1, 0), r(1, 1)),
)
add(
    "F.layer_norm",
    lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    lambda: (r(3, 4), r(4), r(4)),
)
add("F.rms_norm", lambda x, w: F.rms_norm(x, x.shape[-1:], w), lambda: (r(3, 4), r(4)))
add("F.mse_loss of two numbers", F.mse_loss, lambda: (r(), r()))
add(
    "F.hinge_embedding_loss of labels that require grad",
    lambda x, t: F.hinge_embedding_loss(x, t, margin=8.0, reduction="sum"),
    lambda: (r(5, 5), r(5, 5).detach().sign().requires_grad_()),
)
add(
    "index_put of one row",
    lambda x, i, v: x.index_put((i,), v),
    lambda: (r(5, 5), torch.tensor([4]), r(1, 5)),
)
add("F.group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), lambda: (r(2, 4, 3), r(4), r(4)))
add("F.instance_norm", F.instance_norm, lambda: (r(2, 3, 4),))
add("F.conv1d", F.conv1d, lambda: (r(2, 3, 6), r(4, 3, 3), r(4)))
add("F.conv2d", F.conv2d, lambda: (r(1, 2, 4, 4), r(3, 2, 3, 3), r(3)))
add("F.avg_pool1d", lambda x: F.avg_pool1d(x, 2), lambda: (r(2, 3, 6),))
add("F.max_pool1d", lambda x: F.max_pool1d(x, 2), lambda: (r(2, 3, 6),))
add("F.pad", lambda x: F.pad(x, (1, 2)), lambda: (r(3, 4),))
add("F.dropout", lambda x: F.dropout(x, 0.5), lambda: (r(3, 4),))
add(
    "F.scaled_dot_product_attention",
    F.scaled_dot_product_attention,
    lambda: (r(1, 2, 3, 4), r(1, 2, 3, 4), r(1, 2, 3, 4)),
)
add(
    "checkpoint",
    lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    lambda: (r(3, 4),),
)
add("inplace_relu", lambda x: F.relu(x.clone(), inplace=True), lambda: (r(3, 4),))
add("complex_abs", torch.abs, lambda: (torch.randn(3, dtype=torch.complex128).requires_grad_(),))
add("complex_exp", torch.exp, lambda: (torch.randn(3, dtype=torch.complex128).requires_grad_(),))
add("round decimals", lambda x: torch.round(x, decimals=3), lambda: (r(20),))
add("norm inf at 0", lambda x: torch.linalg.vector_norm(x, torch.inf), lambda: (zeros(5),))
add("matrix_exp", lambda x: torch.matrix_exp(3 * x), lambda: (r(5, 5),))
add("slogdet", lambda x: torch.linalg.slogdet(x)[1], lambda: (r(4, 4),))
add("lu_solve", torch.linalg.lu_solve, lambda: (*factored(4), r(4, 2)))
add("lu_solve, steep", lambda b, lu, p: torch.linalg.lu_solve(lu, p, b), steep)
add("qr of square matrices", torch.linalg.qr, lambda: (r(2, 3, 3),))
add("householder_product", torch.linalg.householder_product, lambda: (r(5, 5), r(5)))
for _m in (
    torch.nn.GRUCell(3, 4),
    torch.nn.LSTMCell(3, 4),
    torch.nn.BatchNorm1d(3),
    torch.nn.PReLU(),
):
    add(f"nn.{type(_m).__name__}", _m, lambda: (r(5, 3),))
