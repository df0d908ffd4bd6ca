"""torch's own samples: what its test suite calls its functions and Modules with, torchbp's are called with, too.

Nobody here chose them: values and gradients must be torch's to rounding, and bad input must raise the same type.
"""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

import torchbp.functional as F
import torchbp.nn
from tests.device import DEVICE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # raised while torch's lists are made
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_utils import set_rng_seed

DTYPES = (
    torch.float64,
    pytest.param(torch.float32, marks=pytest.mark.slow),
    torch.complex64,
)
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.complex64: {"rtol": 1e-4, "atol": 1e-5},
}
# Where torch's are not the measure, and why.
# torch's float64 kernel multiplies with 1/6 in float32, 1e-8 off: the one's backward, on a GPU all of both
HALF_CONSTANTS = {"hardsigmoid"} if DEVICE == "cpu" else {"hardsigmoid", "hardswish"}
WIDER = {
    ("silu", torch.complex64),  # torch refuses the derivative
    ("linear_cross_entropy", "error"),  # torch refuses input of three dimensions
}
RANDOM = (
    "dropout",
    "rrelu",
    "gumbel",
)  # compared where nothing is drawn: tests/ops/test_special.py

OPS = [
    op
    for op in op_db
    if (own := getattr(F, op.name.rpartition(".")[2], None)) is not None
    and own is not getattr(torch.nn.functional, op.name.rpartition(".")[2], own)
    and not any(word in op.name for word in RANDOM)
]
MODULES = [
    info
    for info in module_db
    if getattr(torchbp.nn, info.module_cls.__name__, info.module_cls) is not info.module_cls
    and not any(word in info.module_cls.__name__.lower() for word in RANDOM)
]


def copied(structure):
    def copy(x):
        return x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x

    return tree_map(copy, structure)


def tensors(structure):
    return [x for x in tree_leaves(structure) if torch.is_tensor(x) and x.requires_grad]


def outcome(function, args, kwargs, parameters=()):
    """The output and the gradients along a random direction; or the type of the error."""
    args, kwargs = copied(args), copied(kwargs)
    leaves = [*tensors((args, kwargs)), *parameters]
    try:
        output = function(*args, **kwargs)
        reached = tensors(output)
        torch.manual_seed(1)
        directions = [torch.randn_like(y) for y in reached]
        grads = torch.autograd.grad(reached, leaves, directions, allow_unused=True)
    except Exception as error:
        return type(error)
    return output, grads


def assert_same(got, expected, tolerance):
    if isinstance(expected, type) or isinstance(got, type):
        assert got is expected
        return
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if torch.is_tensor(theirs):
            torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
        else:
            assert ours == theirs


def of_log_probabilities(function, name):
    """torch's CTC gradient is right only behind a log_softmax; there both are compared."""
    if name not in {"ctc_loss", "CTCLoss"}:
        return function
    return lambda x, *args, **kwargs: function(x.log_softmax(-1), *args, **kwargs)


@pytest.mark.filterwarnings("ignore")  # of deprecated arguments, in both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("listed", OPS, ids=lambda op: op.name + op.variant_test_name)
def test_function(listed, dtype):
    name = listed.name.rpartition(".")[2]
    if dtype not in listed.supported_dtypes(DEVICE) or (name, dtype) in WIDER:
        pytest.skip("torch has none")
    set_rng_seed(0)
    ours = of_log_probabilities(getattr(F, name), name)
    theirs = of_log_probabilities(getattr(torch.nn.functional, name), name)
    tolerance = TOLERANCE[dtype]
    if name in HALF_CONSTANTS:
        tolerance = TOLERANCE[torch.float32]
    grad = dtype in listed.supported_backward_dtypes(DEVICE)
    for sample in listed.sample_inputs(DEVICE, dtype, requires_grad=grad):
        args = (sample.input, *sample.args)
        expected = outcome(theirs, args, sample.kwargs)
        assert_same(outcome(ours, args, sample.kwargs), expected, tolerance)


def second_order(function, args, kwargs):
    """The gradients, and theirs along random directions."""
    args, kwargs = copied(args), copied(kwargs)
    leaves, outputs = tensors((args, kwargs)), tensors(function(*args, **kwargs))
    torch.manual_seed(1)
    directions = [torch.randn_like(y).requires_grad_() for y in outputs]
    first = torch.autograd.grad(outputs, leaves, directions, create_graph=True, allow_unused=True)
    reached = [g for g in first if g is not None and g.requires_grad]
    further = [torch.randn_like(g) for g in reached]
    return first, torch.autograd.grad(reached, leaves + directions, further, allow_unused=True)


def forward_mode(function, args, kwargs):
    """The output's change along a random direction of all inputs."""
    torch.manual_seed(1)
    with forward_ad.dual_level():

        def dual(x):
            known = torch.is_tensor(x) and x.requires_grad
            return forward_ad.make_dual(x.detach(), torch.randn_like(x)) if known else x

        output = function(*tree_map(dual, args), **tree_map(dual, kwargs))
        return [forward_ad.unpack_dual(y).tangent for y in tree_leaves(output)]


def mapped(function, args, kwargs):
    """The outputs over a batch of two first arguments."""
    first, *rest = tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, args)
    return torch.vmap(lambda x: function(x, *rest, **kwargs))(torch.stack([first, first / 2]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", [second_order, forward_mode, mapped])
@pytest.mark.parametrize("listed", OPS, ids=lambda op: op.name + op.variant_test_name)
def test_transform(listed, transform):
    """What torch can do on its samples, torchbp can, with the same result."""
    name = listed.name.rpartition(".")[2]
    if name == "linear_cross_entropy":
        pytest.skip("torch's is wrong there, with its options for chunks")
    set_rng_seed(0)
    ours = of_log_probabilities(getattr(F, name), name)
    theirs = of_log_probabilities(getattr(torch.nn.functional, name), name)
    for sample in listed.sample_inputs(DEVICE, torch.float64, requires_grad=True):
        args = (sample.input, *sample.args)
        try:
            expected = transform(theirs, args, sample.kwargs)
        except Exception:
            continue
        got = transform(ours, args, sample.kwargs)
        zero = torch.zeros((), dtype=torch.float64, device=DEVICE)  # for None
        for pair in zip(tree_leaves(got), tree_leaves(expected), strict=True):
            same_shape = torch.broadcast_tensors(*(zero if x is None else x for x in pair))
            torch.testing.assert_close(*same_shape, rtol=1e-7, atol=1e-8, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "listed", [op for op in OPS if op.error_inputs_func], ids=lambda op: op.name
)
def test_error(listed):
    name = listed.name.rpartition(".")[2]
    if (name, "error") in WIDER:
        pytest.skip("torchbp takes more")
    for error in listed.error_inputs(DEVICE):
        sample = error.sample_input
        args = (sample.input, *sample.args)
        expected = outcome(getattr(torch.nn.functional, name), args, sample.kwargs)
        assert isinstance(expected, type)
        assert outcome(getattr(F, name), args, sample.kwargs) is expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"]
)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.module_cls.__name__)
def test_module(info, training):
    name, dtype = info.module_cls.__name__, torch.float64
    near = {"rtol": 1e-8, "atol": 1e-9}
    if name.lower() in HALF_CONSTANTS:
        near = TOLERANCE[torch.float32]
    set_rng_seed(0)
    for given in info.module_inputs_func(
        info, device=DEVICE, dtype=dtype, requires_grad=True, training=training
    ):
        if given.forward_input is None:
            continue
        made = []
        for kind in (getattr(torchbp.nn, name), info.module_cls):
            torch.manual_seed(0)
            made.append(
                kind(*given.constructor_input.args, **given.constructor_input.kwargs)
                .to(DEVICE, dtype)
                .train(training)
            )
        ours, theirs = made
        assert repr(ours) == repr(theirs)
        assert_same(ours.state_dict(), theirs.state_dict(), {"rtol": 0, "atol": 0})
        args, kwargs = given.forward_input.args, given.forward_input.kwargs
        found = [
            outcome(of_log_probabilities(module, name), args, kwargs, module.parameters())
            for module in (ours, theirs)
        ]
        assert_same(*found, near)
        assert_same(ours.state_dict(), theirs.state_dict(), {"rtol": 1e-8, "atol": 1e-9})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "info",
    [info for info in MODULES if info.module_error_inputs_func],
    ids=lambda info: info.module_cls.__name__,
)
def test_module_error(info):
    def error_of(kind, given):
        try:
            module = kind(*given.constructor_input.args, **given.constructor_input.kwargs)
            if given.forward_input is not None:
                module(*given.forward_input.args, **given.forward_input.kwargs)
        except Exception as error:
            return type(error)
        return None

    for wrong in info.module_error_inputs_func(
        info, device=DEVICE, dtype=torch.float64, requires_grad=False, training=True
    ):
        given = wrong.module_error_input
        expected = error_of(info.module_cls, given)
        assert error_of(getattr(torchbp.nn, info.module_cls.__name__), given) is expected
