"""Embedding's own rules, which are no derivatives: padding, bounded norms, gradients by frequency, sparse gradients."""

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from torchbp.ops._function import formula_only

INDEX = torch.tensor([[0, 2, 2], [4, 1, 2]], device=DEVICE)


def both(**kwargs):
    """Value and weight gradient, ours and torch's, of equal tables."""
    results = []
    for f in (F.embedding, torch.nn.functional.embedding):
        table = (
            torch.arange(15.0, dtype=torch.float64, device=DEVICE).reshape(5, 3).requires_grad_()
        )
        y = f(INDEX, table, **kwargs)
        y.backward(torch.arange(18.0, dtype=torch.float64, device=DEVICE).reshape(2, 3, 3))
        results.append((y, table, table.grad))
    return results


@pytest.mark.parametrize("engine", ["default", "formula"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding", [None, 0, 2, -1, 3])
def test_gradient_of_rows_as_in_torch(padding, sparse, engine):
    kwargs = {"padding_idx": padding, "sparse": sparse}
    if engine == "formula":
        with formula_only():
            ours, theirs = both(**kwargs)
    else:
        ours, theirs = both(**kwargs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.layout == b.layout
        torch.testing.assert_close(a.to_dense(), b.to_dense())
    if padding is not None:
        assert not ours[2].to_dense()[padding].any()
    if sparse:
        assert ours[2]._nnz() == theirs[2]._nnz()


@pytest.mark.parametrize("engine", ["default", "formula"])
def test_by_frequency_as_in_torch(engine):
    if engine == "formula":
        with formula_only():
            ours, theirs = both(scale_grad_by_freq=True, padding_idx=4)
    else:
        ours, theirs = both(scale_grad_by_freq=True, padding_idx=4)
    torch.testing.assert_close(ours, theirs)
    (_, _, sparse), (_, _, dense) = both_sparse_and_dense()
    torch.testing.assert_close(sparse.to_dense(), dense)  # torch refuses this one


def both_sparse_and_dense():
    results = []
    for sparse in (True, False):
        table = torch.ones(5, 3, requires_grad=True, device=DEVICE)
        y = F.embedding(INDEX, table, scale_grad_by_freq=True, sparse=sparse)
        y.sum().backward()
        results.append((y, table, table.grad))
    return results


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0])
def test_bounded_norms_as_in_torch(norm_type):
    """The selected rows are scaled in the table itself, the others stay."""
    ours, theirs = both(max_norm=2.5, norm_type=norm_type)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(
        ours[1][3], torch.tensor([9.0, 10.0, 11.0], dtype=torch.float64, device=DEVICE)
    )
    assert ours[0].norm(norm_type, dim=-1).max() <= 2.5 + 1e-6


def test_forward_mode_is_the_transpose():
    """By frequency and with padding, forward mode is that of the same linear map as backward."""
    kwargs = {"padding_idx": 1, "scale_grad_by_freq": True}
    table, t = torch.randn(5, 3, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    v = torch.randn(2, 3, 3, device=DEVICE)
    f = lambda w: F.embedding(INDEX, w, **kwargs)  # noqa: E731
    _, tangent = torch.func.jvp(f, (table,), (t,))
    _, pullback = torch.func.vjp(f, table)
    torch.testing.assert_close((tangent * v).sum(), (pullback(v)[0] * t).sum())


def test_trains_with_sparse_adam():
    module = torchbp.nn.Embedding(5, 3, sparse=True, device=DEVICE)
    before = module.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(module.parameters())
    module(INDEX).sum().backward()
    optimizer.step()
    changed = (module.weight != before).any(1)
    assert changed.tolist() == [True, True, True, False, True]
