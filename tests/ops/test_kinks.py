"""At a kink of max(0, u) the slope is that of this torch's clamp, 1 until 2.13, 0 from 2.14 on; second derivatives."""

from functools import partial

import pytest
import torch

import torchbp.functional as F
from tests.device import DEVICE


def column(*values):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE).unsqueeze(1)


def manhattan(u, v):
    return (u - v).abs().sum(-1)


AT = {  # name: arguments of which the kink is the middle row, or element
    "hinge_embedding_loss": ((column(0.5, 1, 2),), {"target": -column(1, 1, 1)}),
    "margin_ranking_loss": ((column(0, 0.5, 2), column(0, 0, 0), column(1, 1, 1)), {"margin": 0.5}),
    "cosine_embedding_loss": (
        (
            torch.eye(2, device=DEVICE).double()[[0, 0, 0]],
            torch.tensor([[1.0, 1], [0, 1], [-1, 1]], device=DEVICE).double(),
        ),
        {"target": -torch.ones(3, device=DEVICE)},
    ),
    "triplet_margin_loss": (
        (column(0, 0, 0), column(2, 1, 0.5), column(2, 2, 2)),
        {"eps": 0.0},
    ),
    "triplet_margin_with_distance_loss": (
        (column(0, 0, 0), column(2, 1, 0.5), column(2, 2, 2)),
        {"distance_function": manhattan},
    ),
    "normalize": (
        (torch.tensor([[1.0, 2.0], [3.0, 4.0], [6.0, 8.0]], device=DEVICE).double(),),
        {"eps": 5.0},
    ),
}
AT["triplet_margin_loss-swap"] = (AT["triplet_margin_loss"][0], {"eps": 0.0, "swap": True})
AT["triplet_margin_loss-1"] = (AT["triplet_margin_loss"][0], {"eps": 0.0, "p": 1})


@pytest.mark.parametrize("kink", AT)
def test_slope_at_the_kink(kink):
    """The gradients and tangents of torch's function, and at the kink those of one side."""
    tensors, options = AT[kink]
    name = kink.partition("-")[0]
    if name != "normalize":
        options = {**options, "reduction": "none"}
    results = []
    for home in (F, torch.nn.functional):
        f = partial(getattr(home, name), **options)
        live = [t.clone().requires_grad_() for t in tensors]
        y = f(*live)
        weights = torch.arange(1.0, 1 + y.numel(), dtype=y.dtype, device=DEVICE).view_as(y)
        gradients = torch.autograd.grad(y, live, weights)
        tangents = torch.func.jvp(f, tensors, tuple(torch.ones_like(t) * 0.3 for t in tensors))
        results.append((y.detach(), gradients, tangents))
    torch.testing.assert_close(*results)


ONE = torch.ones(1, dtype=torch.float64, device=DEVICE)
TWICE = {  # name: the input where the first derivative has a kink, and further arguments
    "elu": (0.0, (0.7,)),
    "celu": (0.0, (0.7,)),
    "selu": (0.0, ()),
    "prelu": (0.0, (0.2 * ONE,)),
    "huber_loss": (0.5, (0 * ONE, "mean", 0.5)),
    "smooth_l1_loss": (-1.0, (0 * ONE,)),
}


@pytest.mark.parametrize("kink", TWICE)
def test_second_derivative_at_the_kink(kink):
    """Torch's, in every torch: by x, of the gradients of all inputs."""
    at, others = TWICE[kink]
    results = []
    for home in (F, torch.nn.functional):
        x = (at * ONE).requires_grad_()
        given = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in others]
        live = [x, *(a for a in given if isinstance(a, torch.Tensor))]
        first = torch.autograd.grad(getattr(home, kink)(x, *given).sum(), live, create_graph=True)
        second = [
            torch.autograd.grad(3 * g.sum(), x, retain_graph=True, allow_unused=True)[0]
            for g in first
        ]
        results.append(
            [*first, *(torch.zeros(1, device=DEVICE).double() if g is None else g for g in second)]
        )
    torch.testing.assert_close(*results)
