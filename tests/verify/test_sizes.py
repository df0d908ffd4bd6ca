"""Which sizes change where integers of several dimensions are among the inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function

import torchbp


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


LABELS = torch.tensor([[1, 3, -1, 0], [2, -1, 0, 1], [0, 1, 2, -1]])
PLACES = torch.tensor([[0, 2], [3, 1], [1, 0]])


class Chosen(Function):
    """Elements of rows, whose gradient is that of the first 16 columns."""

    @staticmethod
    def forward(ctx, x, places):
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.gather(1, places)

    @staticmethod
    def backward(ctx, grad_y):
        (places,) = ctx.saved_tensors
        grad_x = grad_y.new_zeros(ctx.shape)
        return grad_x.scatter_add(1, places[:, :16], grad_y[:, :16]), None


def sizes_of(function, inputs):
    """Return the report, and how large the inputs were."""
    seen = set()

    def call(*args):
        seen.update(n for t in args for n in t.shape)
        return function(*args)

    return torchbp.gradcheck(call, inputs, checks="sizes", raise_exception=False), seen


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (F.multilabel_margin_loss, (leaf(3, 4), LABELS)),
        (lambda x, i: x.gather(1, i), (leaf(3, 4), PLACES)),
    ],
)
def test_sizes_of_integers_of_several_dimensions_change(function, inputs):
    report, seen = sizes_of(function, inputs)
    assert report
    assert report.capabilities["sizes"].status == "ok"
    assert {33, 127, 2053} <= seen


def test_what_is_wrong_at_such_sizes_is_found():
    report, _ = sizes_of(Chosen.apply, (leaf(3, 4), torch.tensor([[0, 2, 1, 3]] * 3)))
    assert not report


def test_indices_that_write_over_each_other_where_repeated_are_no_fault():
    """Which of two values is written decides whose gradient it is."""
    report, _ = sizes_of(lambda x, i, y: x.scatter(1, i, y), (leaf(3, 4), PLACES, leaf(3, 2)))
    assert report
    assert report.capabilities["sizes"].status == "ok"
