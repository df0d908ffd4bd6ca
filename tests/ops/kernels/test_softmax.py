"""Softmax along rows compiled: near the truth, the same bits wherever a row stands, infinities as without."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchbp.functional as B
from tests.ops.kernels.conftest import opened
from torchbp.ops.kernels import (
    _library,
    _softmax,
    disabled,
    over_log_softmax,
    over_softmax,
    over_softmax_backward,
)
from torchbp.ops.kernels import over_log_softmax_backward as over_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[1:]
names = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
# One row, rows that are no whole vectors, long ones that are summed in several parts, short ones, of one element, many.
SHAPES = [(1, 20000), (300, 77), (6, 4999), (7000, 3), (130, 9, 16), (17000, 1), (70, 640)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=names)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def log_softmax(f, x):
    return f.log_softmax(x, -1)


def softmax(f, x):
    return f.softmax(x, -1)


OF_LOOPS = [(log_softmax, d) for d in DTYPES] + [(softmax, d) for d in HALF]
of_loops = pytest.mark.parametrize(("run", "dtype"), OF_LOOPS)


@pytest.fixture(scope="module", autouse=True)
def _library_of_rows():
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _library.recording() as sources:
        patch.setattr(_softmax, "_gain_values", lambda _: True)
        for dtype in DTYPES:
            x = random(64, 512, dtype=dtype)
            over_log_softmax(x, 1)
            over_backward(x, x, 1)
            over_softmax(x, 1)
            over_softmax_backward(x, x, 1)
    assert len(sources) == 1 + 4 * len(HALF)
    with opened(sources):
        yield


@pytest.fixture(autouse=True)
def _where_they_gain_nothing_too(monkeypatch):
    monkeypatch.setattr(_softmax, "_gain_values", lambda _: True)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of compiled loops."""
    made = []
    call = _softmax.call
    monkeypatch.setattr(_softmax, "call", lambda *args: (made.append(1), call(*args)))
    return made


def step(run, f, x, v):
    """Return the value and the gradient of x."""
    x = x.detach().clone().requires_grad_()
    y = run(f, x)
    return y.detach(), *torch.autograd.grad(y, x, v.to(y.dtype))


def assert_near(made, exact, ulps):
    """Errors are those of some roundings, of numbers as large as the largest that cancel: here the typical ones."""
    for a, b in zip(made, exact, strict=True):
        size = b.square().mean().sqrt().clamp(min=1e-30) + b.abs()
        error = (a.double() - b).abs() / size / torch.finfo(a.dtype).eps
        assert error.max() < ulps, f"{error.max():.2f} ulps"


@shapes
@dtypes
def test_log_softmax_is_the_true_one(calls, shape, dtype):
    x, v = random(*shape, dtype=dtype) * 3, random(*shape, dtype=dtype, seed=1)
    made = step(log_softmax, B, x, v)
    assert len(calls) == (1 if dtype == torch.float32 else 2)
    exact = step(log_softmax, F, x.double(), v.double())
    # float32: a few roundings; its gradient is torch's, from exp(y), off by |y| of them, times Σ v.
    # Half: one, of half a unit, and those of float32 are not seen.
    assert_near(made[:1], exact[:1], 3 if dtype == torch.float32 else 0.51)
    assert_near(made[1:], exact[1:], 32 if dtype == torch.float32 else 0.51)


@shapes
@pytest.mark.parametrize("dtype", HALF, ids=names)
def test_softmax_is_the_true_one(calls, shape, dtype):
    x, v = random(*shape, dtype=dtype) * 3, random(*shape, dtype=dtype, seed=1)
    made = step(softmax, B, x, v)
    assert len(calls) == 2
    y = made[0].double()
    exact = torch.softmax(x.double(), -1), y * (v.double() - (y * v.double()).sum(-1, True))
    rtol, least = 0.51 * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    assert_close(made[0].double(), exact[0], rtol=rtol, atol=least * torch.finfo(dtype).eps)
    assert_close(
        made[1].double(), exact[1], rtol=rtol, atol=2e-6
    )  # v - Σ cancels digits of float32


@pytest.mark.parametrize("dtype", HALF, ids=names)
def test_small_probabilities_keep_their_digits(dtype):
    x = torch.zeros(256, 88, dtype=dtype)
    x[:] = -torch.arange(88)
    v = torch.zeros_like(x)
    v[:, 0] = -1  # the gradient of all others is p
    grad_x = step(log_softmax, B, x, v)[1][:, 1:].double()
    exact = torch.softmax(x.double(), 1)[:, 1:]
    least = torch.finfo(dtype).smallest_normal
    assert_close(
        grad_x, exact, rtol=torch.finfo(dtype).eps / 2, atol=least * torch.finfo(dtype).eps
    )


@dtypes
def test_large_logits_cost_no_digits(dtype):
    x = random(300, 77, dtype=dtype) + 100
    given = x, random(300, 77, dtype=dtype, seed=1)
    exact = step(log_softmax, F, *(t.double() for t in given))
    assert_near(step(log_softmax, B, *given), exact, 8 if dtype == torch.float32 else 0.51)


@shapes
@of_loops
def test_threads_change_no_bit(shape, dtype, run):
    given = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    alone = step(run, B, *given)
    torch.set_num_threads(2)
    try:
        together = step(run, B, *given)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(300, 77), (7000, 3), (1200, 16)], ids=str)
@of_loops
def test_a_row_is_the_same_anywhere(shape, dtype, run):
    x, v = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    moved = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    for a, b in zip(step(run, B, x[moved], v[moved]), step(run, B, x, v), strict=True):
        assert torch.equal(a, b[moved])


def odd_rows(dtype, width):
    """Return rows with infinities and NaN, between others that they must not touch."""
    x = random(16400 // width + 12, width, dtype=dtype)
    x[1, 2] = -torch.inf
    x[2, width - 1] = torch.inf
    x[3, 0] = torch.nan
    x[4] = -torch.inf
    x[5] = torch.nan
    x[6, 0], x[6, 1] = torch.inf, -torch.inf
    x[7, 1:] = -torch.inf
    return x


@pytest.mark.parametrize("width", [3, 77, 5000])
@dtypes
@pytest.mark.parametrize("run", [log_softmax, softmax])
def test_infinities_as_without(dtype, width, run):
    x = odd_rows(dtype, width)
    v = random(*x.shape, dtype=dtype, seed=1)
    made = step(run, B, x, v)
    with disabled():
        plain = step(run, B, x, v)
    eps = torch.finfo(dtype).eps
    for a, b in zip(made, plain, strict=True):
        assert_close(a, b, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    assert made[0][8:].isfinite().all()


def test_leaves_to_torch_what_is_not_taken(calls):
    x = random(40, 600)
    assert over_log_softmax(x, 1) is None, "somebody differentiates"
    with torch.no_grad():
        assert over_log_softmax(x, 1) is not None
        assert over_log_softmax(x, -1) is not None
        assert over_log_softmax(x, 0) is None
        assert over_log_softmax(x.t(), 1) is None
        assert over_log_softmax(x[:2], 1) is None, "few elements"
        assert over_log_softmax(x.double(), 1) is None
        assert over_softmax(x, 1) is None, "torch's own kernel"
        assert over_softmax_backward(x, x, 1) is None
        assert over_log_softmax(x.to("meta"), 1) is None
        assert over_backward(x, x, 1) is None, "torch's own kernel"
        h = x.bfloat16()
        assert over_backward(h, h, 1) is not None
        assert over_backward(h, h, 0) is None
        assert over_backward(x, h, 1) is None, "dtypes"
        with disabled():
            assert over_log_softmax(x, 1) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(over_log_softmax(x, 1)) or x)(random(2, 40, 600))
    assert seen == [None]
    calls.clear()
    assert B.log_softmax(torch.zeros(0, 600), 1).shape == (0, 600)
    assert B.log_softmax(torch.zeros(600, 0), 1).shape == (600, 0)
    x = random(40, 600, dtype=torch.bfloat16).requires_grad_()
    y = B.log_softmax(x, 1)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert grad_x.requires_grad, "a second derivative is by the formula"
    assert len(calls) == 1, "of y alone"


def test_gradients_of_other_layouts(calls):
    x = random(40, 600, dtype=torch.bfloat16)
    one = torch.ones((), dtype=x.dtype).expand(40, 600)  # of a sum
    across = random(600, 40, dtype=x.dtype, seed=1).t()
    for v in (one, across):
        calls.clear()
        made = step(log_softmax, B, x, v)
        assert len(calls) == 2
        assert_near(made, step(log_softmax, F, x.double(), v.double()), 0.51)
