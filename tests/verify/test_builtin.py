"""What torch's own functions give instead of a gradient is told from what is wrong."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

import torchbp
from tests.verify.networks import Trained
from tests.verify.unseen import real


def check(function, *inputs):
    return torchbp.gradcheck(function, inputs, skip=("compile",), raise_exception=False)


def notes(report):
    return [f.message + (f.cause or "") for f in report.findings if f.severity == "note"]


def indices():
    return torch.tensor([0, 2, 2, 1])


def test_row_of_padding_has_no_gradient_on_purpose():
    assert check(nn.Embedding(4, 3, padding_idx=0, dtype=torch.float64), indices())


def test_row_without_a_gradient_is_wrong_where_nobody_pads():
    class Lookup(Function):
        @staticmethod
        def forward(ctx, w, i):
            ctx.save_for_backward(i)
            ctx.rows = len(w)
            return w[i]

        @staticmethod
        def backward(ctx, g):
            (i,) = ctx.saved_tensors
            grad = g.new_zeros(ctx.rows, g.shape[1]).index_add(0, i, g)
            grad[0] = 0
            return grad, None

    assert not check(Lookup.apply, real(4, 3), indices())


def test_hardsigmoid_of_torch_has_eight_digits():
    report = check(F.hardsigmoid, real(3, 4))
    assert report, str(report)
    assert "hardsigmoid" in "".join(notes(report))


def test_less_than_that_is_wrong_of_any_function():
    class Sixth(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.hardsigmoid(x)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (x.abs() < 3) * 0.1666667

    assert not check(lambda x: F.hardsigmoid(Sixth.apply(x)), real(3, 4))


def test_what_torch_sums_in_bfloat16_is_noted():
    report = check(nn.Sequential(nn.Tanh(), nn.LayerNorm(4)).double(), real(3, 4))
    assert report, str(report)
    assert "layer_norm" in "".join(notes(report))


def test_what_autograd_sums_over_steps_is_noted():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNN(2, 3, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            return self.cell(x)[0]

    report = check(Steps(), real(2, 4, 2))
    assert report, str(report)
    assert "autograd" in "".join(notes(report))


def test_rounding_between_layers_is_measured():
    """Far from the origin a batch norm takes large numbers from each other, which no Function can help."""
    torch.manual_seed(9)
    layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    assert check(Trained(layers, nn.MSELoss()), real(3, 5), real(3, 4, seed=1).detach())
