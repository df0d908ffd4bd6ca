"""Cross entropy along rows compiled: all its options near the truth, edges as without, and what is not taken."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchbp.functional as B
from tests.ops.kernels.conftest import opened
from tests.ops.kernels.test_softmax import DTYPES, assert_near, dtypes, odd_rows, random
from torchbp.ops._capabilities import kept_bytes
from torchbp.ops._samples import Sample
from torchbp.ops.kernels import (
    _cross_entropy,
    _library,
    disabled,
    over_log_partition,
    over_log_probabilities,
    over_probabilities,
    over_softmax_gradient,
)
from torchbp.ops.losses import _focal_gradient

SHAPES = [(1, 20000), (300, 77), (6, 4999), (7000, 3), (1200, 16), (70, 640)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-1-ignored": {"label_smoothing": 1.0, "ignore_index": 1},
    "weight": {"weight": True},
    "all": {"weight": True, "label_smoothing": 0.1, "ignore_index": 1},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def _library_of_rows():
    with torch.no_grad(), _library.recording() as sources:
        for dtype in DTYPES:
            x = random(64, 512, dtype=dtype)
            over_log_partition(x)
            over_softmax_gradient(x, x[0, :1])
    assert len(sources) == 2 * len(DTYPES)
    with opened(sources):
        yield


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of compiled loops."""
    made = []
    call = _cross_entropy.call
    monkeypatch.setattr(_cross_entropy, "call", lambda *args: (made.append(1), call(*args)))
    return made


def given(shape, dtype, options):
    """Return logits, targets and options, a weight among them where one is wanted."""
    x = random(*shape, dtype=dtype) * 3
    target = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(4))
    options = dict(options)
    if options.get("weight"):
        options["weight"] = random(shape[1], seed=5).abs().add(0.2).to(dtype)
    return x, target, options


def in_float64(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def step(f, x, target, options):
    """Return the loss and the gradient, where the incoming one is of several values."""
    x = x.detach().clone().requires_grad_()
    loss = f(x, target, **options)
    v = random(*loss.shape, dtype=torch.bfloat16, seed=6).to(loss.dtype) if loss.dim() else None
    return loss.detach(), *torch.autograd.grad(loss, x, v)


@shapes
@options
@reductions
@dtypes
def test_loss_and_gradient_are_the_true_ones(calls, shape, options, reduction, dtype):
    x, target, options = given(shape, dtype, options | {"reduction": reduction})
    made = step(B.cross_entropy, x, target, options)
    assert len(calls) == 2
    exact = step(F.cross_entropy, x.double(), target, in_float64(options))
    # float32: a few roundings. Half: one, of half a unit; in the gradient p - 1 cancels digits of float32
    if dtype == torch.float32:
        assert_near(made, exact, 6)
    else:
        assert_near(made[:1], exact[:1], 0.51)
        rtol = 0.51 * torch.finfo(dtype).eps
        assert_close(made[1].double(), exact[1], rtol=rtol, atol=5e-7)


@reductions
@dtypes
def test_z_loss(calls, reduction, dtype):
    x, target, _ = given((300, 77), dtype, {})
    options = {"z_loss": 0.1, "ignore_index": 1, "reduction": reduction}
    made = step(B.cross_entropy, x, target, options)
    assert len(calls) == 4
    with disabled():
        exact = step(B.cross_entropy, x.double(), target, options)
    # of two gradients, each rounded, digits cancel
    assert_near(made, exact, 6 if dtype == torch.float32 else 3)


@shapes
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
@dtypes
def test_focal_loss(calls, monkeypatch, shape, weighted, gamma, dtype):
    monkeypatch.setattr(_focal_gradient, "_MANY", 0)
    monkeypatch.setattr(_focal_gradient, "_MANY_HALF", 0)
    x, target, _ = given(shape, dtype, {})
    x[:, 0] += 12  # of class 0, 1 - p is small
    options = {"gamma": gamma}
    if weighted:
        options |= {"ignore_index": 1, "alpha": random(shape[1], seed=5).abs().add(0.2).to(dtype)}
    for reduction in ("mean", "none"):
        calls.clear()
        made = step(B.focal_loss, x, target, options | {"reduction": reduction})
        assert len(calls) == 3
        exact = step(
            B.focal_loss, x.double(), target, in_float64(options | {"reduction": reduction})
        )
        assert_near(made, exact, 12 if dtype == torch.float32 else 0.51)


@pytest.mark.parametrize("more", [2, 12, 40])
def test_what_is_left_of_1_keeps_its_digits(more):
    x, target, _ = given((300, 77), torch.float32, {})
    x.scatter_add_(1, target[:, None], torch.full((300, 1), float(more)))
    with torch.no_grad():
        _, u = over_probabilities(x, target, -1)
    exact = torch.softmax(x.double(), 1).scatter(1, target[:, None], 0).sum(1)
    assert_close(u.double(), exact, rtol=3e-6, atol=0)  # x - m, up to 45, is rounded


@options
@dtypes
def test_threads_change_no_bit(options, dtype):
    arguments = given((300, 770), dtype, options)
    alone = step(B.cross_entropy, *arguments)
    torch.set_num_threads(2)
    try:
        together = step(B.cross_entropy, *arguments)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@dtypes
def test_a_row_is_the_same_anywhere(dtype):
    x, target, options = given((1200, 16), dtype, {"reduction": "none"})
    moved = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = (B.cross_entropy(x[i], target[i], **options) for i in (moved, slice(None)))
    assert torch.equal(a, b[moved])


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("width", [3, 77, 5000])
@dtypes
def test_infinities_as_without(dtype, width, z_loss):
    x = odd_rows(dtype, width)
    target = torch.zeros(len(x), dtype=torch.int64)
    target[1] = target[7] = 2  # logits of -∞
    target[8] = 1
    options = {"reduction": "none", "z_loss": z_loss}
    made = step(B.cross_entropy, x, target, options)
    with disabled():
        plain = step(B.cross_entropy, x, target, options)
    eps = torch.finfo(dtype).eps
    for a, b in zip(made, plain, strict=True):
        assert_close(a, b, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    assert made[0][8:].isfinite().all()


@pytest.mark.parametrize("width", [3, 77, 5000])
@dtypes
def test_log_partition_of_infinities(dtype, width):
    x = odd_rows(dtype, width)
    x[9, 0], x[9, 1] = torch.inf, torch.nan
    with torch.no_grad():
        assert_close(
            over_log_partition(x), x.float().logsumexp(1), rtol=1e-6, atol=1e-6, equal_nan=True
        )


@reductions
def test_rows_that_are_ignored_count_for_nothing(reduction):
    x, target, options = given((300, 77), torch.float32, {"reduction": reduction})
    target[:200], x[:200] = -100, torch.nan
    loss, grad_x = step(B.cross_entropy, x, target, options)
    of_others = B.cross_entropy(x[200:], target[200:], **options)
    assert_close(loss[200:] if loss.dim() else loss, of_others)
    assert not grad_x[:200].any()
    assert grad_x[200:].any()


@options
def test_nothing_that_counts(calls, options):
    x, _, options = given((300, 77), torch.float32, options | {"ignore_index": 1})
    loss, grad_x = step(B.cross_entropy, x, torch.ones(300, dtype=torch.int64), options)
    assert calls
    assert loss.isnan()
    assert not grad_x.any()


@pytest.mark.parametrize("outside", [77, -1, 1 << 40])
@dtypes
def test_what_is_no_class_raises(dtype, outside):
    x, target, _ = given((300, 77), dtype, {})
    target[299] = outside
    with pytest.raises(IndexError):
        B.cross_entropy(x, target)


@dtypes
def test_keeps_no_more_than_without(dtype):
    x, target, _ = given((300, 77), dtype, {})
    sample = Sample((x.requires_grad_(), target))
    with disabled():
        without = kept_bytes(B.cross_entropy, sample)
    assert kept_bytes(B.cross_entropy, sample) <= without


def test_further_derivatives_are_the_formulas(calls):
    x, target, _ = given((300, 77), torch.float32, {})
    x = x.requires_grad_()
    (grad_x,) = torch.autograd.grad(B.cross_entropy(x, target), x, create_graph=True)
    assert len(calls) == 1
    v = random(300, 77, seed=7)
    (second,) = torch.autograd.grad(grad_x, x, v)
    wide, v = x.detach().double(), v.double()
    _, exact = torch.func.jvp(torch.func.grad(lambda x: F.cross_entropy(x, target)), (wide,), (v,))
    assert_close(second.double(), exact, rtol=1e-4, atol=1e-9)
    _, tangent = torch.func.jvp(lambda x: B.cross_entropy(x, target), (x.detach(),), (v.float(),))
    assert_close(tangent.double(), (grad_x.detach() * v).sum(), rtol=1e-4, atol=1e-7)


def test_is_traced_as_the_formula(calls):
    x, target, _ = given((300, 77), torch.float32, {})

    def loss(x):
        return B.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1)

    plain = loss(x)
    calls.clear()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for made in (compiled(x), torch.func.vmap(loss)(x[None])[0]):
        assert_close(made, plain)
    assert not calls


def test_leaves_to_torch_what_is_not_taken(calls):
    x, target, _ = given((300, 77), torch.float32, {})
    with torch.no_grad():
        assert over_log_probabilities(x, target, -1) is not None
        assert over_log_probabilities(x, target[:9], -1) is None
        assert over_log_probabilities(x, target.int(), -1) is None
        assert over_log_probabilities(x, target.repeat(2)[::2], -1) is None
        assert over_log_probabilities(x, target, -1, torch.ones(77).double()) is None
        assert over_log_probabilities(x, target, -1, torch.ones(76)) is None
        for other in (x.t(), x[:9], x.double(), x.to("meta"), x.view(3, 100, 77)):
            assert over_log_partition(other) is None
        with disabled():
            assert over_log_partition(x) is None
        number = torch.ones(())
        turned = torch._neg_view(number)
        assert over_softmax_gradient(x, number) is not None
        assert over_softmax_gradient(x, turned) is None
    assert over_log_partition(x) is None, "somebody differentiates"
    calls.clear()
    maps = torch.stack([x.view(10, 30, 77).mT] * 2).requires_grad_()
    B.cross_entropy(maps[0], target.view(10, 30)).backward()
    assert not calls, "classes are no rows"
