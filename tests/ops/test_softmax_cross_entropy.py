"""Cross entropy of many logits, which keeps softmax(x): torch's values, gradients and derivatives of any order."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import vmap

import torchbp
from torchbp.functional import cross_entropy, gelu, linear
from torchbp.ops.losses import _softmax_cross_entropy

pytestmark = pytest.mark.cpu("elsewhere nothing looks at values, which it needs")
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture
def small_is_many(monkeypatch):
    monkeypatch.setattr(_softmax_cross_entropy, "FEW", 0)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the Function, through the function that cross entropy calls."""
    made = []
    own = _softmax_cross_entropy.of_softmax

    def noted(*args):
        made.append(args)
        return own(*args)

    monkeypatch.setattr("torchbp.ops.losses.cross_entropy.of_softmax", noted)
    return made


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return (3 * x).requires_grad_()


def labels(n: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(reduction, small_is_many, calls):
    x, t = logits(5, 4), labels(5, 4)

    def loss(x):
        return cross_entropy(x, t, reduction=reduction)

    assert gradcheck(loss, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, (x,), check_batched_grad=True)
    assert gradgradcheck(lambda x: loss(x).sin(), (x,))
    assert calls


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_over_reverse(reduction, small_is_many):
    x, v, t = logits(5, 4), logits(5, 4).detach().flip(0), labels(5, 4)
    products = []
    for f in (cross_entropy, torch.nn.functional.cross_entropy):
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(x, v), t, reduction=reduction)
            (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            products.append(forward_ad.unpack_dual(g).tangent.detach())
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_many_as_torch(reduction, threads, calls):
    x, t = logits(300, 100, dtype=torch.float32), labels(300, 100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = cross_entropy(x, t, reduction=reduction)
        exact = torch.nn.functional.cross_entropy(x.double(), t, reduction=reduction)
        (grad,) = torch.autograd.grad(found.sum(), x)
        (truth,) = torch.autograd.grad(exact.sum(), x)
    finally:
        torch.set_num_threads(before)
    assert calls
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, truth, rtol=3e-6, atol=0)


@pytest.mark.parametrize("far", [60.0, 90.0, 1e4, torch.inf])
def test_a_target_that_is_all_but_impossible(far, calls):
    x = logits(300, 100, dtype=torch.float32).detach()
    t = labels(300, 100)
    x[7, t[7]] = -far
    x.requires_grad_()
    found = cross_entropy(x, t, reduction="none")
    assert calls
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(x, t, reduction="none"))
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad[7, t[7]] == -1


def test_what_has_no_number_stays_so(calls):
    x = logits(300, 100, dtype=torch.float32).detach()
    x[3, 4] = torch.nan
    found = cross_entropy(x, labels(300, 100), reduction="none")
    assert calls
    assert found.isnan().nonzero().tolist() == [[3]]


def test_others_go_their_way(calls):
    x, t = logits(300, 100, dtype=torch.float32), labels(300, 100)
    some = t.clone()
    some[5] = -100
    cross_entropy(x, some)
    cross_entropy(x, t, label_smoothing=0.1)
    cross_entropy(x, t, weight=torch.ones(100))
    cross_entropy(x.bfloat16(), t)
    cross_entropy(x[:50], t[:50])
    vmap(cross_entropy)(x.view(3, 100, 100), t.view(3, 100))
    assert not calls
    with pytest.raises(IndexError):
        cross_entropy(x, t + 100)
    with pytest.raises(ValueError, match="batch"):
        cross_entropy(x, t[:7])


def test_lean_keeps_the_logits_and_every_bit(calls):
    x, w, t = logits(300, 400), logits(400, 100), labels(300, 100)

    def step():
        loss = cross_entropy(linear(gelu(x), w.t()), t)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    plain = step()
    with torchbp.lean_scope():
        lean = step()
    assert len(calls) == 2
    for a, b in zip(plain, lean, strict=True):
        assert torch.equal(a, b)


def test_a_second_backward_finds_what_the_first_left(small_is_many):
    x, t = logits(5, 4), labels(5, 4)
    loss = cross_entropy(x, t)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    second = torch.autograd.grad(loss, x)
    assert torch.equal(first[0], second[0])
