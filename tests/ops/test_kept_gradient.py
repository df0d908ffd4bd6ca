"""Losses that keep their gradient: torch's values, the truth's gradients, and derivatives of any order."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import vmap

import torchbp
import torchbp.functional as F
from torchbp.functional import gelu, linear
from torchbp.ops import _recipe
from torchbp.ops.losses import _kept_gradient
from torchbp.ops.losses._log_sums import minus_log1p_sum

pytestmark = pytest.mark.cpu("elsewhere nothing looks at values, which it needs")
NAMES = ("binary_cross_entropy_with_logits", "soft_margin_loss")
REDUCTIONS = ("mean", "sum")
TORCHS = torch.nn.functional


@pytest.fixture
def small_is_many(monkeypatch):
    monkeypatch.setattr(_kept_gradient, "FEW", 0)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the Function, through what the losses call."""
    made = []
    own = _kept_gradient.with_kept_gradient

    def noted(*args):
        made.append(args)
        return own(*args)

    for name in NAMES:
        monkeypatch.setattr(f"torchbp.ops.losses.{name}.with_kept_gradient", noted)
    return made


def scores(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return (3 * x).requires_grad_()


def targets(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Probabilities, a third of them 0 and a third 1; or ±1."""
    t = torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    t = (3 * t - 1).clamp(0, 1)
    return t if name.startswith("binary") else (t - 0.5).sign()


def exact_gradient(name: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Of the sum, in float64, with both tails."""
    x, t = x.detach().double(), t.double()
    if name.startswith("binary"):
        return (1 - t) * torch.sigmoid(x) - t * torch.sigmoid(-x)
    return -t * torch.sigmoid(-t * x)


def exact_loss(name: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The mean, in float64, where torch's soft margin overflows."""
    x, t = x.detach().double(), t.double()
    if name.startswith("binary"):
        return ((x > 0) * x - t * x + torch.log1p(torch.exp(-x.abs()))).mean()
    return ((-t * x).clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).mean()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name, reduction, small_is_many, calls):
    x, t = scores(5, 4), targets(name, 5, 4)

    def loss(x):
        return getattr(F, name)(x, t, reduction=reduction)

    assert gradcheck(loss, (x,), check_batched_grad=True)
    assert gradgradcheck(loss, (x,), check_batched_grad=True)
    assert gradgradcheck(lambda x: loss(x).sin(), (x,))
    assert calls
    assert gradcheck(loss, (x,), check_forward_ad=True)


@pytest.mark.parametrize("name", NAMES)
def test_third_derivative(name, small_is_many):
    x, t = scores(5, 4), targets(name, 5, 4)
    found = []
    for f in (getattr(F, name), getattr(TORCHS, name)):
        g = f(x, t, reduction="sum")
        for _ in range(3):
            (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        found.append(g.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(300, 100), (1031, 1021)], ids=["a piece", "pieces, and a rest"])
@pytest.mark.parametrize("name", NAMES)
def test_many_as_the_truth(name, shape, threads, calls):
    x = scores(*shape, dtype=torch.float32).detach()
    x.view(-1)[:12] = torch.tensor([0, -0.0, 20, -20, 40, -40, 87, -87, 1e3, -1e3, 1e-30, -1e-30])
    x.requires_grad_()
    t = targets(name, *shape, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = getattr(F, name)(x, t)
        (grad,) = torch.autograd.grad(found, x, torch.tensor(float(x.numel())))
    finally:
        torch.set_num_threads(before)
    assert calls
    exact = exact_gradient(name, x, t)
    hard = t == t.round()  # elsewhere σ(x) - t cancels
    torch.testing.assert_close(grad[hard].double(), exact[hard], rtol=5e-7, atol=1e-38)
    torch.testing.assert_close(grad.double(), exact, rtol=5e-7, atol=1.2e-7)
    loss = exact_loss(name, x, t)
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [0.0, -0.0, 0.1, 3.0, -20.0, 30.0, 100.0])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_equal_logits(x, t, calls):
    """Of a constant no error averages out; where the target is all but met the loss is a tail."""
    logits = torch.full((300, 100), x, requires_grad=True)
    target = torch.full_like(logits, t, requires_grad=False)
    found = F.binary_cross_entropy_with_logits(logits, target)
    margin = F.soft_margin_loss(logits, 2 * target - 1)
    assert len(calls) == 2
    one, sign = torch.tensor(x, dtype=torch.float64), 2 * t - 1
    exact = torch.nn.functional.softplus(-sign * one, threshold=1e3)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-38)
    torch.testing.assert_close(margin.double(), exact, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize(
    ("x", "t", "loss", "slope"),
    [
        (torch.inf, 1.0, 0.0, 0.0),
        (torch.inf, 0.0, torch.inf, 1.0),
        (-torch.inf, 0.0, 0.0, 0.0),
        (-torch.inf, 1.0, torch.inf, -1.0),
        (-torch.inf, 0.25, torch.inf, -0.25),
        (torch.nan, 0.0, torch.nan, torch.nan),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_limits(name, x, t, loss, slope, calls):
    if t == 0.25 and name == "soft_margin_loss":
        return
    many = torch.zeros(300, 100)
    many[7, 3] = x
    many.requires_grad_()
    target = torch.full_like(many, t, requires_grad=False)
    target = target if name.startswith("binary") else 2 * target - 1
    found = getattr(F, name)(many, target, reduction="sum")
    (grad,) = torch.autograd.grad(found, many)
    assert calls
    rest = (many.numel() - 1) * torch.tensor(2.0).log()
    torch.testing.assert_close(found, rest + loss, equal_nan=True)
    torch.testing.assert_close(grad[7, 3], torch.tensor(slope), rtol=0, atol=0, equal_nan=True)
    assert grad[7, 4] == exact_gradient(name, many[7, 4], target[7, 4])


@pytest.mark.parametrize("name", NAMES)
def test_others_go_their_way(name, calls):
    x, t = scores(300, 100, dtype=torch.float32), targets(name, 300, 100, dtype=torch.float32)
    f = getattr(F, name)
    f(x, t, reduction="none")
    f(x.detach(), t)
    with torch.no_grad():
        f(x, t)
    f(x, t.clone().requires_grad_())
    f(x[:50], t[:50])
    f(x.mT, t.mT.contiguous())
    f(x.mT.contiguous(), t.mT)
    f(x.bfloat16(), t.bfloat16())
    vmap(f)(x.view(3, 100, 100), t.view(3, 100, 100))
    with forward_ad.dual_level():
        dual = f(x, forward_ad.make_dual(t, torch.ones_like(t)))
        assert forward_ad.unpack_dual(dual).tangent is not None
    if name.startswith("binary"):
        f(x, t, weight=torch.ones(100))
        f(x, t, pos_weight=torch.ones(100))
    assert not calls
    f(x, t)
    assert calls


@pytest.mark.parametrize("name", NAMES)
def test_keeps_torchs_bytes(name, calls):
    x, t = scores(300, 100, dtype=torch.float32), targets(name, 300, 100, dtype=torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: kept.setdefault(s.untyped_storage().data_ptr(), s), lambda s: s
    ):
        loss = getattr(F, name)(x, t)
    assert calls
    assert loss.requires_grad
    assert sum(s.untyped_storage().nbytes() for s in kept.values()) == 8 * x.numel()
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("name", NAMES)
def test_in_a_network_and_a_second_backward(name, calls):
    x, w = scores(300, 400), scores(400, 100)
    t = targets(name, 300, 100)
    loss = getattr(F, name)(linear(gelu(x), w.t()), t)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert calls
    exact = torch.autograd.grad(getattr(TORCHS, name)(TORCHS.gelu(x) @ w, t), (x, w))
    for a, b, c in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("n", [8, 10, 7])
def test_sum_of_logarithms(n):
    p = torch.linspace(0, 0.5, n, dtype=torch.float64)
    before = p.clone()
    found = minus_log1p_sum(p, p.new_empty(n // 2))
    torch.testing.assert_close(found, -torch.log1p(-p).sum())
    assert torch.equal(p, before)


@pytest.mark.parametrize("name", NAMES)
def test_lean_keeps_the_scores_and_every_bit(name, calls):
    x, w, t = scores(300, 400), scores(400, 100), targets(name, 300, 100)

    def step():
        loss = getattr(F, name)(linear(gelu(x), w.t()), t)
        first = torch.autograd.grad(loss, (x, w), create_graph=True)
        assert (loss.grad_fn.saved_tensors[1] is None) == bool(_recipe.asked)
        return loss.detach(), *first, *torch.autograd.grad(first[0].square().sum(), (x, w))

    plain = step()
    with torchbp.lean_scope():
        lean = step()
    assert len(calls) == 2
    for a, b in zip(plain[:3], lean[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(plain[3:], lean[3:])
