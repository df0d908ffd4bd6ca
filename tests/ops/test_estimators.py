"""The layers whose backward is not the derivative of their forward: the rule that each states."""

import pytest
import torch

import torchbp
import torchbp.functional as F
from torchbp.ops._op import all_ops
from torchbp.verify import GradientError

ESTIMATORS = [op for op in all_ops().values() if op.estimator]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_declared_because_a_gradient_checker_objects(estimator):
    """The declaration is needed: finite differences find another gradient than the stated rule."""
    from torchbp.ops._samples import Make

    sample = next(iter(estimator.samples(Make())))
    with pytest.raises(GradientError):
        torchbp.gradcheck(lambda x: estimator.function(x, *sample.args[1:]), sample.args[:1])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5])
def test_gradient_scale_is_the_identity_with_a_scaled_gradient(scale):
    x, v = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    y = F.gradient_scale(x, scale)
    assert torch.equal(y, x)
    y.backward(v)
    assert torch.equal(x.grad, scale * v)


def test_gradient_reversal_climbs_below_and_descends_above():
    x = torch.tensor([2.0], requires_grad=True)
    w = torch.tensor([3.0], requires_grad=True)
    (w * F.gradient_reversal(x, 0.1)).backward()
    assert w.grad.item() == 2.0
    assert x.grad.item() == pytest.approx(-0.3)


def test_surrogate_spike_pulses():
    """The three formulas, at numbers worked out by hand, with k = 2 at x = ±1/4: z = ±1/2."""
    wanted = {"fast_sigmoid": 2 / 2.25, "arctan": 2 / (1 + torch.pi**2 / 4), "triangle": 1.0}
    for surrogate, pulse in wanted.items():
        x = torch.tensor([-0.25, 0.25, 0.0], dtype=torch.float64, requires_grad=True)
        y = F.surrogate_spike(x, surrogate, 2.0)
        assert y.tolist() == [0.0, 1.0, 0.0]
        y.sum().backward()
        assert x.grad.tolist() == pytest.approx([pulse, pulse, 2.0])


def test_surrogate_spike_refuses_an_unknown_pulse():
    with pytest.raises(ValueError, match="surrogate_spike: expected surrogate to be one of"):
        F.surrogate_spike(torch.zeros(1), "gauss")
