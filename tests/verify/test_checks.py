"""What single checks find, and what they let pass."""

import torch
from torch.autograd import Function

import torchbp


def sample(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def found(function, inputs, check):
    """Return what one check says, and see to it that it was made."""
    report = torchbp.gradcheck(function, inputs, checks=check, raise_exception=False)
    assert "itself failed" not in report.capabilities[check].detail
    return report.findings


class KeptOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.y = y.detach()
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * ctx.y


def test_an_output_that_was_modified_is_no_input_that_was():
    (finding,) = found(KeptOutput.apply, sample(2, 3), "modified")
    assert "after an output was modified" in finding.message


class FirstOfTwo(Function):
    """An input as it is, which autograd takes for a view of it."""

    @staticmethod
    def forward(ctx, x, y):
        return x

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, None


def test_a_view_that_refuses_is_not_modified():
    assert not found(FirstOfTwo.apply, (sample(3), sample(3, seed=1)), "modified")
