"""Formulas evaluated piece by piece: the same values, where it may be done; and left alone where it may not."""

from contextlib import nullcontext

import pytest
import torch

from tests.ops.conftest import HALF
from torchbp.ops import _pieces
from torchbp.ops._function import formula_only
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make, one_tensor

pytestmark = pytest.mark.cpu("a GPU takes every tensor whole")
ELEMENTWISE = [op for op in all_ops().values() if op.elementwise and not op.random]


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 2048 elements, from 4096 on."""
    monkeypatch.setattr(_pieces, "_LARGE", 1 << 12)
    monkeypatch.setattr(_pieces, "_LARGE_HALF", 1 << 12)
    monkeypatch.setattr(_pieces, "PIECE", 1 << 11)


def value_and_gradient(op, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = one_tensor(op.function(x))
    v = torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad(y, x, v)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("elementwise", ELEMENTWISE, ids=repr)
def test_pieces_give_the_whole(elementwise, dtype, small_pieces):
    """At a length that no piece divides, value and gradient are the formula's on the whole tensor."""
    x = Make(dtype).normal(103, 101)
    pieces = value_and_gradient(elementwise, x)
    with formula_only():
        whole = value_and_gradient(elementwise, x)
    unit = torch.finfo(dtype).eps
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=4 * unit)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


def test_what_is_separable(small_pieces):
    x = torch.randn(64, 128)
    with torch.no_grad():
        assert _pieces.separable(x, x, torch.ones(()))
        assert not _pieces.separable(x[:1])  # small
        assert not _pieces.separable(x, x[0])  # broadcast
        assert not _pieces.separable(x, x.t().contiguous().t())  # in another order
        assert not _pieces.separable(x, x.double())
        with formula_only():
            assert not _pieces.separable(x)
    assert not _pieces.separable(x)  # under grad mode a formula is differentiated


def test_a_formula_under_grad_mode_is_differentiated(small_pieces):
    x = torch.randn(64, 128, requires_grad=True)
    (grad,) = torch.autograd.grad(_pieces.in_pieces(product, x, x).sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach())


def test_pieces_call_the_formula_piece_by_piece(small_pieces):
    lengths = []

    def formula(x: torch.Tensor) -> torch.Tensor:
        lengths.append(x.numel())
        return x + 1

    x = torch.randn(5000)
    with torch.no_grad():
        assert torch.equal(_pieces.in_pieces(formula, x), x + 1)
    assert len(lengths) > 1
    assert sum(lengths) == 5000


WHOLE = [op for op in all_ops().values() if not (op.elementwise or op.random)]


@pytest.mark.parametrize("by_rows", WHOLE, ids=repr)
def test_rows_give_the_whole(by_rows, small_pieces):
    """What works along rows, or sums over them, in bfloat16: as the formula on the whole tensors."""
    results = []
    for formula in (False, True):
        sample = by_rows.benchmark(Make(torch.bfloat16), 10_000)
        live = [t for t in sample.tensors() if t.requires_grad]
        with formula_only() if formula else nullcontext():
            try:
                y = one_tensor(by_rows.function(*sample.args, **sample.kwargs))
            except RuntimeError as error:
                pytest.skip(str(error))
            v = torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape)
            results.append((y.detach(), *torch.autograd.grad(y, live, v)))
    unit = torch.finfo(torch.bfloat16).eps
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=2 * unit * b.abs().max().item())
