"""Losses in one loop: their limits at ±∞, and what they keep, are those without; the step that trains is compiled."""

from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

import torchbp.functional as TF
from torchbp.ops._capabilities import kept_bytes
from torchbp.ops._samples import Sample
from torchbp.ops.kernels import _library, _loop, disabled

EDGES = (torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, 90.0, -90.0, 1e30, -1e30)
TARGETS = (0.0, 1.0, -1.0, 0.5)
N = 2 * _loop.MANY
LOSSES = {  # and the targets they are for
    "binary_cross_entropy_with_logits": (0.0, 1.0, 0.5),
    "hinge_embedding_loss": TARGETS,
    "huber_loss": TARGETS,
    "kl_div": (0.0, 1.0, 0.5),
    "l1_loss": TARGETS,
    "poisson_nll_loss": (0.0, 1.0, 2.0),
    "sigmoid_focal_loss": (0.0, 1.0, 0.5),
    "soft_margin_loss": (1.0, -1.0),
}


def step(name, x, t):
    """Return the sum of the losses and their gradient."""
    x = x.clone().requires_grad_()
    loss = getattr(TF, name)(x, t, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, x)


@pytest.mark.parametrize("name", LOSSES)
def test_limits_and_bytes_are_those_without(compiled, name):
    compiled(lambda: step(name, torch.zeros(N), torch.zeros(N)))
    for edge in EDGES:
        for target in LOSSES[name]:
            x, t = torch.full((N,), edge), torch.full((N,), target)
            with patch.object(_library, "find", wraps=_library.find) as asked:
                made = step(name, x, t)
            with disabled():
                plain = step(name, x, t)
            # torch.dot, of which the loss without is made, loses 4e-6 of equal terms
            assert_close(made, plain, rtol=1e-5, atol=1e-38, equal_nan=True)
            assert all(_library.find(*call.args) is not None for call in asked.call_args_list)
    args = torch.zeros(N, requires_grad=True), torch.zeros(N)
    sample = Sample(args, {"reduction": "sum"})
    with disabled():
        before = kept_bytes(getattr(TF, name), sample)
    assert kept_bytes(getattr(TF, name), sample) <= before


def test_what_is_usual_is_compiled():
    """A loss is mostly one of data: the gradient of its target, which samples ask for, is another formula."""
    from torchbp.ops._op import all_ops
    from torchbp.ops.kernels import _build

    op = all_ops()["binary_cross_entropy_with_logits"]
    sources = _build.asked_for({op.name: op}, (torch.float32,))
    x, t = op.benchmark(_build.Make(torch.float32), N).args
    with _library.recording() as wanted:
        step(op.name, x.detach(), t)
    assert wanted
    assert set(wanted) <= set(sources)
