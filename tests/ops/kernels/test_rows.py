"""Normalization compiled: any shape, as near to the truth as torch, and what the loops leave to torch's own kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchbp.functional as B
from tests.ops.kernels.conftest import opened
from torchbp.ops.kernels import (
    _library,
    _rows,
    disabled,
    over_batch,
    over_batch_backward,
    over_groups,
    over_groups_backward,
    over_rows,
    over_rows_backward,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
names = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
EPS = 1e-5
ALL = (True, True, True)

# Each: how it is called with (x, w, b), and its definition. Shapes: one row, rows that are no whole vectors, long ones
# that are summed in several parts, short pieces, few and many of them.
LAYER = [(1, 20000), (300, 77), (6, 4999), (7000, 3), (130, 9, 16)]
GROUPS = [
    ((3, 32, 17, 17), 8),
    ((5, 64, 7, 9), 64),
    ((5, 64, 7, 9), 1),
    ((300, 256), 8),
    ((100, 32, 7), 4),
]
BATCH = [(2, 8, 50, 50), (70, 5, 49), (4, 3, 1500)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(shape):
    last = shape[-1:]
    return lambda f, x, w, b: f.layer_norm(x, last, w, b, EPS), last


def rms(shape):
    last = shape[-1:]
    return lambda f, x, w, _: f.rms_norm(x, last, w, EPS), last


def group(shape, groups):
    return lambda f, x, w, b: f.group_norm(x, groups, w, b, EPS), shape[1:2]


def batch(shape):
    return lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True, 0.1, EPS), shape[1:2]


CASES = {
    **{f"layer-{'x'.join(map(str, s))}": (s, *layer(s)) for s in LAYER},
    **{f"rms-{'x'.join(map(str, s))}": (s, *rms(s)) for s in LAYER},
    **{f"group-{'x'.join(map(str, s))}-{g}": (s, *group(s, g)) for s, g in GROUPS},
    **{f"batch-{'x'.join(map(str, s))}": (s, *batch(s)) for s in BATCH},
}
cases = pytest.mark.parametrize("norm", CASES.values(), ids=CASES)


@pytest.fixture(scope="module", autouse=True)
def _library_of_rows():
    with torch.no_grad(), _library.recording() as sources:
        for dtype in DTYPES:
            x = random(4, 64, 8, 8, dtype=dtype)
            for centred in (True, False):
                over_rows(x, 3, None, None, EPS, centred=centred)
                over_rows_backward(x, x, 3, None, None, EPS, ALL, centred=centred)
            over_groups(x, 8, None, None, EPS)
            over_groups_backward(x, x, 8, None, None, EPS, ALL)
    assert len(sources) == 6 * len(DTYPES)
    with opened(sources):
        yield


@pytest.fixture(autouse=True)
def _where_they_gain_nothing_too(monkeypatch):
    monkeypatch.setattr(_rows, "_gain_rows", lambda *_: True)
    monkeypatch.setattr(_rows, "_FROM", dict.fromkeys(_rows._FROM, 0))


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of compiled loops."""
    made = []
    call = _rows._call
    monkeypatch.setattr(_rows, "_call", lambda *args: (made.append(1), call(*args)))
    return made


def step(run, f, x, w, b, v):
    """Return y and the gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    y = run(f, *leaves)
    grads = torch.autograd.grad(y, leaves, v.to(y.dtype), allow_unused=True)
    return y.detach(), *(g for g in grads if g is not None)


def arguments(shape, of_weight, dtype=torch.float32, mean=0.0):
    x = (random(*shape).double() + mean).to(dtype)
    w, b = (random(*of_weight, dtype=dtype, seed=s) for s in (1, 2))
    return x, w, b, random(*shape, dtype=dtype, seed=3)


def truth(run, arguments):
    return step(run, F, *(t.double() for t in arguments))


def assert_near(made, exact, ulps):
    """Errors are those of some roundings, of numbers as large as the largest that cancel: here the typical ones."""
    for a, b in zip(made, exact, strict=True):
        size = b.square().mean().sqrt().clamp(min=1e-30) + b.abs()
        error = (a.double() - b).abs() / size / torch.finfo(a.dtype).eps
        assert error.max() < ulps, f"{error.max():.2f} ulps"


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_values_and_gradients_are_the_true_ones(calls, norm, dtype):
    shape, run, of_weight = norm
    given = arguments(shape, of_weight, dtype)
    made = step(run, B, *given)
    assert len(calls) == 2
    # float32: a few roundings. Half: one, of half a unit, and those of float32 are not seen.
    assert_near(made, truth(run, given), 12 if dtype == torch.float32 else 0.51)


@cases
def test_a_mean_far_from_zero_costs_no_digits(norm):
    shape, run, of_weight = norm
    given = arguments(shape, of_weight, mean=1e4)
    assert_near(step(run, B, *given), truth(run, given), 40)


def test_nor_does_one_that_the_first_elements_do_not_show():
    shape = (1, 200_000)
    run, of_weight = layer(shape)
    given = arguments(shape, of_weight, mean=1e4)
    given[0][:, :16] = 0
    assert_near(step(run, B, *given), truth(run, given), 40)


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_threads_change_no_bit(norm, dtype):
    shape, run, of_weight = norm
    given = arguments(shape, of_weight, dtype)
    alone = step(run, B, *given)
    torch.set_num_threads(2)
    try:
        together = step(run, B, *given)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("width", [3, 40])
def test_sums_over_many_rows_keep_their_digits(dtype, width):
    x = random(8192, width, dtype=dtype)
    b = torch.zeros(width, dtype=dtype, requires_grad=True)
    y = B.layer_norm(x, (width,), torch.ones(width, dtype=dtype), b)
    (grad_b,) = torch.autograd.grad(y, b, torch.ones_like(y))
    assert torch.equal(grad_b, torch.full_like(grad_b, 8192))


def test_sums_over_many_rows_are_not_taken_in_a_row():
    x = random(1 << 17, 3)
    b = torch.zeros(3, requires_grad=True)
    y = B.layer_norm(x, (3,), torch.ones(3), b)
    (grad_b,) = torch.autograd.grad(y, b, torch.full_like(y, 0.1))
    exact = torch.full_like(grad_b, 0.1).double() * (1 << 17)
    assert_close(grad_b.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "name", ["layer-300x77", "group-3x32x17x17-8", "group-100x32x7-4", "batch-2x8x50x50"]
)
def test_gradients_that_are_asked_for(name, needs):
    shape, run, of_weight = CASES[name]
    x, w, b, v = arguments(shape, of_weight)
    whole = step(run, B, x, w, b, v)[1:]
    leaves = [
        t.clone().requires_grad_(bool(need)) for t, need in zip((x, w, b), needs, strict=True)
    ]
    wanted = [t for t in leaves if t.requires_grad]
    made = iter(torch.autograd.grad(run(B, *leaves), wanted, v))
    for need, g in zip(needs, whole, strict=True):
        if need:  # that of the bias alone is torch's sum
            assert_close(next(made), g, rtol=1e-6, atol=1e-4 if needs == (0, 0, 1) else 0)


@pytest.mark.parametrize(
    "name", ["layer-300x77", "rms-300x77", "group-3x32x17x17-8", "batch-2x8x50x50"]
)
def test_without_weight_and_bias(name):
    shape, run, of_weight = CASES[name]
    x, _, _, v = arguments(shape, of_weight)

    def plain(f, x):
        return run(f, x, None, None)

    made = torch.autograd.grad(plain(B, x.requires_grad_()), x, v)
    wide = x.detach().double().requires_grad_()
    assert_near(made, torch.autograd.grad(plain(F, wide), wide, v.double()), 12)
    none = torch.zeros(of_weight, requires_grad=True)  # a bias alone
    if not name.startswith("rms"):
        (grad_b,) = torch.autograd.grad(run(B, x, None, none), none, v)
        dims = [i for i in range(v.dim()) if v.shape[i : i + 1] != none.shape]
        assert_close(grad_b, v.sum(dims), rtol=1e-5, atol=1e-4)


OF_ALL = ["layer-300x77", "rms-300x77", "group-3x32x17x17-8", "group-100x32x7-4", "batch-2x8x50x50"]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", OF_ALL)
def test_what_is_no_number_spreads_as_in_torchs_kernels(name, value):
    shape, run, of_weight = CASES[name]
    x, w, b, v = arguments(shape, of_weight)
    x.view(-1)[5] = value
    made = step(run, B, x, w, b, v)
    with disabled():
        theirs = step(run, B, x, w, b, v)
    for a, t in zip(made, theirs, strict=True):
        assert torch.equal(a.isfinite(), t.isfinite())
        assert_close(a, t, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("name", OF_ALL)
def test_constant_rows(name, value):
    shape, run, of_weight = CASES[name]
    x, w, b, v = arguments(shape, of_weight)
    x.fill_(value)
    y, grad_x, grad_w, *grad_b = step(run, B, x, w, b, v)
    exact = truth(run, (x, w, b, v))
    assert_near((y, grad_x, *grad_b), (*exact[:2], *exact[3:]), 12)
    if not (value and name.startswith("rms")):
        assert not grad_w.any()  # x̂ is 0: torch's is some 1e-4 there


@pytest.mark.parametrize("sum_too", [False, True], ids=["square", "sum"])
@pytest.mark.parametrize("name", OF_ALL)
def test_where_squares_overflow(name, sum_too):
    shape, run, of_weight = CASES[name]
    x, w, b, v = arguments(shape, of_weight)
    x = x.clamp(0.25, 1).mul(3e38) if sum_too else x * 1e25
    made, exact = step(run, B, x, w, b, v), truth(run, (x, w, b, v))
    largest = 1 / exact[1].abs().max()  # of the gradient of x, which is 1e-25 of it
    made, exact = ([y, grad_x.double() * largest, *others] for y, grad_x, *others in (made, exact))
    for a, e in zip(made, exact, strict=True):
        assert_close(a.double(), e.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_running_statistics_move_as_torchs(calls, dtype):
    x = random(6, 5, 600, dtype=dtype) + 2
    for running_dtype in {dtype, torch.float32}:
        ours, theirs = (
            [torch.full((5,), 0.5, dtype=running_dtype), torch.full((5,), 2.0, dtype=running_dtype)]
            for _ in range(2)
        )
        B.batch_norm(x, *ours, training=True, momentum=0.3)
        exact = [t.double() for t in theirs]
        F.batch_norm(x.double(), *exact, training=True, momentum=0.3)
        for a, t in zip(ours, exact, strict=True):
            assert_close(a, t.to(running_dtype), rtol=2 * torch.finfo(running_dtype).eps, atol=0)
    assert calls


def test_what_lies_elsewise_is_right(calls):
    x, w, b, v = arguments((40, 600), (600,))
    across = x.t().contiguous().t()
    for run in (layer((40, 600))[0], rms((40, 600))[0]):
        for a, t in zip(step(run, B, across, w, b, v), step(run, B, x, w, b, v), strict=True):
            assert torch.equal(a, t)
    run, _ = layer((40, 600))
    one = torch.ones(()).expand(40, 600)  # the gradient of a sum
    assert_near(step(run, B, x, w, b, one), truth(run, (x, w, b, one)), 12)
    x, w, b, v = arguments((4, 8, 30, 30), (8,))
    last = x.contiguous(memory_format=torch.channels_last)
    calls.clear()
    for run in (group(x.shape, 4)[0], batch(x.shape)[0]):
        leaves = [
            last.clone().requires_grad_(),
            w.clone().requires_grad_(),
            b.clone().requires_grad_(),
        ]
        y = run(B, *leaves)
        assert_close(y, run(F, x, w, b))
        torch.autograd.grad(y, leaves, v)
    assert not calls, "channels last is left to torch's kernels"


def test_leaves_to_torch_what_is_not_taken(calls):
    x, w = random(40, 600), random(600)
    assert over_rows(x[:2], 1, w, None, EPS) is None, "few elements"
    with torch.no_grad():
        assert over_rows(x, 1, w, None, EPS) is not None
        assert over_rows(x.double(), 1, w, None, EPS) is None
        assert over_rows(x, 1, w.double(), None, EPS) is None
        assert over_rows(x.to("meta"), 1, w, None, EPS) is None
        assert over_batch(x, None, None, EPS) is None, "no positions"
        assert over_batch_backward(x, x, None, None, EPS, ALL) is None
        assert over_rows_backward(x.bfloat16().double(), x, 1, w, None, EPS, ALL) is None
        with disabled():
            assert over_rows(x, 1, w, None, EPS) is None
    assert over_rows(x, 1, w, None, EPS) is None, "somebody differentiates"
    seen = []
    torch.func.vmap(lambda x: seen.append(over_rows(x, 1, None, None, EPS)) or x)(
        random(2, 40, 600)
    )
    assert seen == [None]
    calls.clear()
    assert B.layer_norm(x[:0], (600,), w).shape == (0, 600)
    assert B.group_norm(torch.zeros(0, 4, 9), 2).shape == (0, 4, 9)
    x = x.requires_grad_()
    (grad_x,) = torch.autograd.grad(B.layer_norm(x, (600,)).square().sum(), x, create_graph=True)
    assert grad_x.requires_grad, "a second derivative is by the formula"
