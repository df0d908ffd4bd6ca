"""Products of bfloat16 in float32 (_half_products.py), and the large cells that are made of them."""

import pytest
import torch

import torchbp.nn
from tests.device import DEVICE
from torchbp import functional as F
from torchbp.ops import _half_products as halves
from torchbp.ops._half_products import parts, product, suit
from torchbp.ops._precision import ulps

ROWS = 256  # of 128 features: as many products as MKL's kernel is asked for
GATES = {"rnn_tanh_cell": 1, "rnn_relu_cell": 1, "gru_cell": 3, "lstm_cell": 4}
there = pytest.mark.skipif(
    halves._MKL is None or DEVICE != "cpu", reason="this processor multiplies no bfloat16 matrices"
)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


VIEWS = {
    "rows": lambda t: t,
    "columns": lambda t: t.mT.contiguous().mT,
    "part": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "part-of-columns": lambda t: torch.cat((t, t))[: t.shape[0]].mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand_as(t),
    "every-second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


@there
@pytest.mark.parametrize("onto", [False, True], ids=["new", "onto"])
@pytest.mark.parametrize("right", VIEWS)
@pytest.mark.parametrize("left", VIEWS)
def test_product(left, right, onto):
    """However the factors lie: what float32 makes of them."""
    a, b = VIEWS[left](random(5, 7)), VIEWS[right](random(7, 3))
    before = random(5, 3, dtype=torch.float32)
    found = product((a,), b, before.clone() if onto else None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, a.float() @ b.float() + onto * before)


@there
def test_two_halves_hold_a_float():
    """To 2^-16 of each element, which one half alone is not: 2^-8."""
    d = random(300, 300, dtype=torch.float32)
    high, low = parts(d)
    assert high.dtype == low.dtype == torch.bfloat16
    error = ((high.double() + low.double() - d) / d).abs().max()
    assert error <= 2**-16 < ((high.double() - d) / d).abs().max()
    b = random(300, 8)
    exact = d.double() @ b.double()
    torch.testing.assert_close(product((high, low), b).double(), exact, rtol=1e-4, atol=1e-3)


def test_few_numbers_and_others_are_not_asked_for():
    large, small = random(2048, 128), random(2, 128)
    with torch.no_grad():
        assert suit(ROWS, large) == (halves._MKL is not None)
        assert not suit(1, small)
        assert not suit(ROWS, None)
        assert not suit(ROWS, large.float())
        assert not suit(ROWS, large, large.half())
        assert not suit(ROWS, large.to("meta"))
    assert not suit(ROWS, large), "in a backward: create_graph"


def cell(name, dtype=torch.bfloat16, rows=ROWS, width=128):
    """Return the arguments of a large cell, leaves, and an incoming gradient."""
    n = GATES[name] * width
    scale = width**-0.5
    x, h, c = (random(rows + k, width)[:rows] for k in range(3))
    weights = [scale * random(n, width + k)[:, :width] for k in (0, 1)] + [
        random(n),
        random(n + 1)[:n],
    ]
    leaves = [t.to(dtype).detach().requires_grad_() for t in (x, h, c, *weights)]
    x, h, c, *weights = leaves
    state = (h, c) if name == "lstm_cell" else h
    leaves = leaves if name == "lstm_cell" else [x, h, *weights]
    return (x, state, *weights), leaves, random(rows, width + 2)[:, :width].to(dtype)


def step(name, arguments, leaves, v):
    y = getattr(F, name)(*arguments)
    made = list(y) if isinstance(y, tuple) else [y]
    return [t.detach() for t in made] + list(torch.autograd.grad(made, leaves, [v] * len(made)))


@there
@pytest.mark.parametrize("name", GATES)
def test_a_large_cell_rounds_once(name, monkeypatch):
    """Values and gradients by halves are those of float64, rounded; and they do go to the kernel."""
    arguments, leaves, v = cell(name)
    calls = []
    monkeypatch.setattr(halves, "_MKL", lambda *a, call=halves._MKL: calls.append(call(*a)))
    found = step(name, arguments, leaves, v)
    assert len(calls) >= 2 + 2 + 8  # forward, again, and four products of halves
    wide = {id(t): t.detach().double().requires_grad_() for t in leaves}
    over = lambda t: tuple(wide[id(s)] for s in t) if isinstance(t, tuple) else wide[id(t)]  # noqa: E731
    exact = step(name, tuple(map(over, arguments)), list(wide.values()), v.double())
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        errors = ulps(a, b, torch.bfloat16, b.square().mean().sqrt() / 16)
        assert errors.max() < 0.55  # of one half 3
        assert errors.mean() < 0.27


@there
@pytest.mark.parametrize("which", ["x", "h", "v"])
@pytest.mark.parametrize("name", GATES)
def test_infinities_in_a_large_cell(name, which, monkeypatch):
    """What halves make NaN of, float32 computes: by halves and without them the same numbers are finite."""
    arguments, leaves, v = cell(name)
    with torch.no_grad():
        {"x": leaves[0], "h": leaves[1], "v": v}[which][0, 0] = torch.inf
    found = step(name, arguments, leaves, v)
    monkeypatch.setattr(halves, "_MKL", None)
    for a, b in zip(found, step(name, arguments, leaves, v), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-9, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saturated_large_cell_passes_nothing_on(dtype):
    """x = -∞ saturates; the gradient of the weights that it meets tends to 0, of many rows, too."""
    module = torchbp.nn.RNNCell(128, 128, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        module.weight_ih.fill_(1)
    x = torch.full((ROWS, 128), -torch.inf, device=DEVICE, dtype=dtype)
    h = module(x)
    assert torch.equal(h, -torch.ones_like(h))
    h.sum().backward()
    for p in module.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))


@there
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_large_layer_over_time(name, monkeypatch):
    """The products of all steps at once go to the kernel; outputs and gradients are float32's, rounded."""
    module = getattr(torchbp.nn, name)(128, 128, dtype=torch.bfloat16)
    x = random(4, ROWS, 128).requires_grad_()
    results, calls = [], []
    for mkl in (lambda *a, call=halves._MKL: calls.append(call(*a)), None):
        monkeypatch.setattr(halves, "_MKL", mkl)
        y = module(x)[0]
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))))
    assert calls
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-4 * b.abs().max().item())
