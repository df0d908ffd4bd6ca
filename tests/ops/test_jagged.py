"""Jagged nested tensors: what torch's ops take, ours take, and beyond torch what works row by row."""

from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import torchs, with_args
from torchbp.ops._samples import one_tensor

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

BOUNDS = [0, 2, 3, 6]
ROW_BY_ROW = {
    "quick_gelu": F.quick_gelu,
    "softcap": partial(F.softcap, cap=2.0),
    "sparsemax": F.sparsemax,
    "straight_through": partial(F.straight_through, quantizer="sign", window=(-1, 1)),
    "gradient_clip": partial(F.gradient_clip, max_norm=0.5, dim=-1),
    "feedback_alignment_linear": partial(
        F.feedback_alignment_linear, weight=torch.ones(5, 4), feedback=torch.randn(5, 4)
    ),
}


@cache
def bounds() -> Tensor:
    """The same tensor for all: by it torch knows that two are ragged alike."""
    return torch.tensor(BOUNDS, device=DEVICE)


def nest(values: Tensor, lengths: Tensor | None = None) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, bounds(), lengths)


def here(function):
    kwargs = {
        k: v.to(DEVICE) if isinstance(v, Tensor) else v
        for k, v in getattr(function, "keywords", {}).items()
    }
    return partial(function, **kwargs)


@pytest.fixture(params=ROW_BY_ROW)
def function(request):
    return here(ROW_BY_ROW[request.param])


@pytest.fixture
def values():
    torch.manual_seed(0)
    return torch.randn(6, 4, device=DEVICE, requires_grad=True)


def outcome(rows, values):
    (grad,) = torch.autograd.grad([y.sin().sum() for y in rows], values)
    return *rows, grad


def test_each_row_is_what_it_is_alone(function, values):
    ours = outcome(function(nest(values)).unbind(), values)
    alone = [function(values[a:b]) for a, b in pairwise(BOUNDS)]
    for a, b in zip(ours, outcome(alone, values), strict=True):
        torch.testing.assert_close(a, b)


def test_what_lies_between_rows_gets_no_gradient(function, values):
    x = nest(values, torch.tensor([1, 1, 2], device=DEVICE))
    *rows, grad = outcome(function(x).unbind(), values)
    assert [len(row) for row in rows] == [1, 1, 2]
    assert not grad[[1, 5]].any()


def test_the_output_is_jagged_as_the_input_is(function, values):
    x = nest(values)
    y = function(x)
    assert y.shape[:2] == x.shape[:2]  # by the same symbol, or their sum would raise
    if y.shape == x.shape:
        torch.testing.assert_close((x + y).values(), x.values() + y.values())


@pytest.mark.parametrize("name", ["quick_gelu", "softcap", "straight_through"])
def test_transposed(name, values):
    function, x = ROW_BY_ROW[name], nest(values)
    y = function(x.transpose(1, 2)).transpose(1, 2)
    assert torch.equal(y.values(), function(x).values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_compiled(function, values):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    ours, eager = (outcome([f(nest(values)).values()], values) for f in (compiled, function))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("dim", "kind"), [(1, "ragged"), (-2, "ragged"), (0, "batch"), (-3, "batch")]
)
@pytest.mark.parametrize("name", ["sparsemax", "gradient_clip"])
def test_along_a_dimension_that_rows_have_not_alike(name, dim, kind, values):
    given = {"max_norm": 1.0} if name == "gradient_clip" else {}
    with pytest.raises(RuntimeError, match=rf"{name}: expected a dim .* got {dim}, the {kind}"):
        getattr(F, name)(nest(values), dim=dim, **given)
    with pytest.raises(IndexError, match=f"{name}: expected a dim of"):
        getattr(F, name)(nest(values), dim=3, **given)


@pytest.mark.parametrize("transposed", ["sparsemax", "feedback_alignment_linear"])
def test_along_a_last_dimension_that_is_ragged(transposed, values):
    with pytest.raises(RuntimeError, match="got -1, the ragged one; pad it"):
        here(ROW_BY_ROW[transposed])(nest(values).transpose(1, 2))


def test_what_torchs_own_takes(first):
    """Of values of many rows the outcome of torch's own, or of its ops in a row, wherever that takes them."""
    theirs = torchs(first.op)
    sample = first.sample(torch.float32)
    length = next((t.shape[0] for t in sample.tensors() if t.dim()), 0)
    if theirs is None or first.op.random or not length:
        pytest.skip("nothing to compare with")

    def result(function):
        leaves = []

        def leaf(t):
            batched = t.dim() and t.shape[0] == length
            t = torch.cat([t.detach()] * 6)[:6] if batched else t.detach().clone()
            if t.is_floating_point():
                leaves.append(t.requires_grad_())
            return nest(t) if batched else t

        given = with_args(sample, leaf)
        y = one_tensor(function(*given.args, **given.kwargs))
        y = y.values() if y.is_nested else y
        return y, *torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)

    try:
        want = result(theirs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
        pytest.skip("torch's own refuses")
    for a, b in zip(result(first.op.function), want, strict=True):
        torch.testing.assert_close(a, b)
