"""Sums of rows in a loop, and the ops that are made of them: any width, right to the last digits, one order of sums."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchbp.functional as B
from tests.ops.kernels.conftest import opened
from torchbp.ops._precision import ulps
from torchbp.ops.kernels import ROWS, SUM, _library, _loop, disabled, in_one_loop

DTYPES = (torch.float32, torch.bfloat16)
names = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
SHAPES = [(300, 77), (17, 1024), (700, 64), (9, 2, 1500), (1, 20_001), (3, 100_003), (40, 513)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def products(a, b):
    d = a - b
    return d, d * d, a * b


OUTPUTS = (None, ROWS, ROWS)


def triplet(f, a, p, n, **kwargs):
    kwargs = {"eps": 0.0, **kwargs}  # distances may be 0
    return f.triplet_margin_loss(a, p, n, margin=3.0, reduction="none", **kwargs)


def triplet_swapped(f, a, p, n):
    return triplet(f, a, p, n, swap=True, eps=1e-6)


def cosine(f, a, b, _):
    target = torch.arange(a.shape[0]) % 3 - 1
    return f.cosine_embedding_loss(a, b, target, margin=-0.5, reduction="none")


def normalized(f, a, *_):
    return f.normalize(a)


def normalized_up_to(f, a, *_):
    return f.normalize(a, eps=20.0, dim=-1)


OPS = (triplet, triplet_swapped, cosine, normalized, normalized_up_to)


def step(run, f, *leaves):
    """Return the values and the gradients for an incoming one that differs from row to row."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    y = run(f, *leaves)
    v = random(*y.shape, seed=9).bfloat16().to(y.dtype)
    grads = torch.autograd.grad(y, leaves, v, allow_unused=True)
    return y.detach(), *(g for g in grads if g is not None)


@pytest.fixture(scope="module", autouse=True)
def _library_of_sums():
    with _library.recording() as sources:
        for dtype in DTYPES:
            a, b, c = (random(300, 64, dtype=dtype, seed=s) for s in range(3))
            with torch.no_grad():
                in_one_loop(products, a, b, outputs=OUTPUTS)
            for run in OPS:
                step(run, B, a, b, c)
    with opened(sources):
        yield


@pytest.fixture
def found():
    """Count the loops that ran."""
    _library.remembered.clear()
    return lambda: sum(run is not None for run in _library.remembered.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@torch.no_grad()
def test_sums_are_the_true_ones_whatever_the_width_and_the_threads(dtype, shape):
    a, b = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    d, squares, dots = in_one_loop(products, a, b, outputs=OUTPUTS)
    assert squares.shape == dots.shape == shape[:-1]
    assert squares.dtype == dots.dtype == torch.float32
    assert torch.equal(d, (a.float() - b.float()).to(dtype))
    wide_a, wide_b = a.double(), b.double()
    for made, terms in ((squares, (wide_a - wide_b).square()), (dots, wide_a * wide_b)):
        error = (made - terms.sum(-1)).abs() / terms.abs().sum(-1)
        assert error.max() < 1.5e-7  # a rounding of each term, and of few sums
    torch.set_num_threads(2)
    try:
        again = in_one_loop(products, a, b, outputs=OUTPUTS)
    finally:
        torch.set_num_threads(1)
    for made, known in zip(again, (d, squares, dots), strict=True):
        assert torch.equal(made, known)


@pytest.mark.parametrize("width", [77, 513, 5000])
@torch.no_grad()
def test_a_sum_depends_on_no_other_row(width):
    a, b = random(80, width).repeat(5, 1), random(80, width, seed=1).repeat(5, 1)
    for made in in_one_loop(products, a, b, outputs=OUTPUTS)[1:]:
        assert torch.equal(made, made[:80].repeat(5))


@torch.no_grad()
def test_rows_of_many_equal_terms_keep_their_digits():
    a = torch.full((2, 1 << 20), 0.1)
    _, _, dots = in_one_loop(products, a, a, outputs=OUTPUTS)
    assert_close(dots.double(), a.double().square().float().double().sum(1), rtol=1e-7, atol=0)


@torch.no_grad()
def test_leaves_to_the_formula_what_is_not_taken():
    a = random(300, 80)
    across = random(80, 300).t()
    assert in_one_loop(products, a, a, outputs=OUTPUTS) is not None
    assert in_one_loop(products, across, across, outputs=OUTPUTS) is None, "no whole rows"
    few = random(_loop.MANY // 32, 32)
    assert in_one_loop(products, few, few, outputs=OUTPUTS) is None, "short rows"
    with _library.recording() as asked:
        assert in_one_loop(products, a, a, outputs=(None, ROWS, SUM)) is None
    assert not asked, "a sum of all elements wants other chunks"
    halves = random(300, 160).chunk(2, -1)
    for made, known in zip(
        in_one_loop(products, *halves, outputs=OUTPUTS) or (),
        in_one_loop(products, *(h.contiguous() for h in halves), outputs=OUTPUTS),
        strict=False,
    ):
        assert torch.equal(made, known)


@pytest.mark.parametrize("shape", [(300, 77), (17, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("run", OPS)
def test_ops_are_as_near_the_truth_as_without(found, run, dtype, shape):
    given = [random(*shape, dtype=dtype, seed=s) for s in range(3)]
    made = step(run, B, *given)
    assert found() >= (1 if run is triplet_swapped else 2)  # of whose gradients none is a loop
    with disabled():
        plain = step(run, B, *given)
    truth = step(run, F, *(t.double() for t in given))
    for a, b, c in zip(made, plain, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        scale = c.square().mean().sqrt() / 16  # of what cancels
        with_, without = ulps(a, c, dtype, scale), ulps(b, c, dtype, scale)
        assert with_.mean() <= max(1.1 * without.mean(), 0.5)
        assert with_.quantile(0.999) <= 1.5 * max(without.quantile(0.999).item(), 1.0)


@pytest.mark.parametrize("value", [0.0, 1e25, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("run", OPS)
def test_rows_at_the_edge_are_those_without(found, run, dtype, value):
    """Equal vectors, zeros, squares that overflow, and what is no number, each in some rows."""
    a, p, n = (random(300, 64, dtype=dtype, seed=s) for s in range(3))
    p[::4] = a[::4]
    a[::3, :40] = value
    a[::6] = value
    made = step(run, B, a, p, n)
    once = run is triplet_swapped or value == 1e25  # whose gradients are no loop, or in float64
    assert found() >= (1 if once else 2)
    with disabled():
        plain = step(run, B, a, p, n)
    for x, y in zip(made, plain, strict=True):
        assert_close(x, y, rtol=4 * torch.finfo(dtype).eps, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("run", [triplet, cosine])
def test_gradients_that_are_asked_for(run):
    given = [random(300, 64, seed=s) for s in range(3)]
    _, *whole = step(run, B, *given)
    for i, known in enumerate(whole):
        leaves = [t.clone().requires_grad_(i == k) for k, t in enumerate(given)]
        y = run(B, *leaves)
        (made,) = torch.autograd.grad(y, leaves[i], random(*y.shape, seed=9).bfloat16().float())
        assert torch.equal(made, known)
