"""convert() on layers like those of transformers, of which this suite has none; `make frameworks` has the real ones."""

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbp
from torchbp.swap import report


class GELUActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = F.gelu

    def forward(self, input):
        return self.act(input)


class NewGELUActivation(nn.Module):
    def forward(self, input):
        return F.gelu(input, approximate="tanh")


class ReLUSquaredActivation(nn.Module):
    def forward(self, input):
        return F.relu(input).square()


class LlamaRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * (1 + self.weight.float())).type_as(hidden_states)


class OddRMSNorm(LlamaRMSNorm):
    """Named like the others, and something else."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + 0.1


THEIRS = [
    GELUActivation,
    NewGELUActivation,
    ReLUSquaredActivation,
    LlamaRMSNorm,
    GemmaRMSNorm,
    OddRMSNorm,
]


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    module = types.ModuleType("transformers.models.some")
    for kind in THEIRS:
        setattr(module, kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.models", types.ModuleType("transformers.models"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def model():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), GELUActivation(), LlamaRMSNorm(8), NewGELUActivation()]
    layers += [GemmaRMSNorm(8), nn.Linear(8, 8), ReLUSquaredActivation(), OddRMSNorm(8)]
    made = nn.Sequential(*layers)
    for p in made.parameters():
        nn.init.normal_(p, 0.5, 0.5)
    return made


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converts_what_computes_the_same(dtype):
    own = model().to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    expected = gradients(own, x)
    ours = torchbp.convert(own)
    assert [type(m).__module__.startswith("torchbp") for m in ours] == [True] * 7 + [False]
    assert isinstance(ours[2], LlamaRMSNorm)
    for e, a in zip(expected, gradients(ours, x), strict=True):
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-5}
            if dtype is torch.float32
            else {"rtol": 0.1, "atol": 0.1 * e.abs().max()}
        )
        torch.testing.assert_close(a, e, **tolerance)


def test_runs_a_hand_written_backward():
    ours = torchbp.convert(model())
    x = torch.randn(5, 8, requires_grad=True)
    nodes = [ours[i](x).grad_fn.name() for i in (1, 3, 6)]
    assert nodes == ["GELUFunctionBackward", "GELUFunctionBackward", "SquaredReLUFunctionBackward"]


def test_reverts():
    reverted = torchbp.revert(torchbp.convert(model()))
    assert [type(m) for m in reverted] == [type(m) for m in model()]


def test_state_copies_and_pickles():
    ours = torchbp.convert(model())
    x = torch.randn(5, 6)
    theirs = model()
    theirs.load_state_dict(ours.state_dict())
    # What is pickled goes by the real class's name, which here stands in a module made for the test.
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in again] == [type(m) for m in ours]
        assert torch.equal(again(x), ours(x))


def test_report_tells():
    told = report(torchbp.convert(model()))
    assert ("2", "LlamaRMSNorm") in told.hand_written
    assert [name for name, *_ in told.left] == ["7"]
    assert ("2", "LlamaRMSNorm") in report(model()).convertible


def test_leaves_what_cannot_be_tried():
    with torch.device("meta"):
        norm = LlamaRMSNorm(4)
    assert type(torchbp.convert(norm)) is LlamaRMSNorm
