"""What dropout by channel and alpha dropout promise beyond values: what is dropped together, moments, dimensions."""

import math
import warnings

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.device import DEVICE

CHANNELS = {
    "dropout1d": (200, 50, 3),
    "dropout2d": (200, 50, 3, 2),
    "dropout3d": (200, 50, 3, 2, 2),
    "feature_alpha_dropout": (200, 50, 3, 2),
}


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_channels_are_dropped_whole_and_at_the_rate(name, p):
    y = getattr(F, name)(torch.ones(CHANNELS[name], device=DEVICE), p, True)
    channels = y.flatten(2)
    assert (channels == channels[..., :1]).all()
    dropped = channels[..., 0] == channels.min()
    n = dropped.numel()
    assert abs(dropped.float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert 0 < dropped[0].sum() < 50 or p != 0.5  # samples and channels draw by themselves
    assert not (dropped == dropped[:1]).all()


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance_stay(name, p):
    y = getattr(F, name)(torch.randn(1000, 1000, device=DEVICE), p, True)
    assert abs(y.mean()) < 2e-2
    assert abs(y.var() - 1) < 3e-2


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_two_values_of_a_constant_as_in_torch(name):
    ours = getattr(F, name)(
        torch.ones(40, 40, dtype=torch.float64, device=DEVICE), 0.3, True
    ).unique()
    theirs = getattr(torch.nn.functional, name)(
        torch.ones(40, 40, device=DEVICE).double(), 0.3, True
    ).unique()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"])
def test_reproducible_and_anew(name):
    module, x = getattr(torchbp.nn, name)(0.5), torch.ones(8, 8, 2, 2, device=DEVICE)
    x = x if name == "Dropout2d" else x[..., 0] if name == "Dropout1d" else x[..., None]
    torch.manual_seed(3)
    first, second = module(x), module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)
    assert module.eval()(x) is x


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d"])
@pytest.mark.parametrize("dims", range(7))
def test_other_dimensions_as_in_torch(name, dims):
    """What torch refuses, and what it takes with a warning."""
    x = torch.randn([*range(2, 2 + dims)], device=DEVICE)

    def outcome(function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                shape = function(x).shape
            except RuntimeError:
                shape = None
        return shape, bool(caught)

    assert outcome(getattr(F, name)) == outcome(getattr(torch.nn.functional, name))


def test_an_image_without_batch_is_a_batch_of_sequences():
    """dropout2d takes three dimensions as (N, C, L), dropout3d four as (C, D, H, W), as torch does."""
    with pytest.warns(UserWarning, match="dropout2d"):
        y = F.dropout2d(torch.ones(100, 50, 3, device=DEVICE))
    assert (y == y[..., :1]).all()
    assert not (y[:, 0] == y[:1, 0]).all()
    z = F.dropout3d(torch.ones(100, 50, 3, 2, device=DEVICE))
    assert (z == z[:, :1, :1, :1]).all()
