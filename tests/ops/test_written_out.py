"""Wrappers with the parameters of what they wrap, and what goes past them."""

import inspect
import traceback

import pytest
import torch
from torch.overrides import TorchFunctionMode

import torchbp.functional as F
from torchbp.ops._written_out import tensors, written_out


def wrapped(x: torch.Tensor, factor: float = 2.0, *, weight: torch.Tensor | None = None) -> object:
    """Three kinds of parameters."""
    return x, factor, weight


def test_arguments_arrive_as_they_were_given():
    made = written_out("return function({given}), [{each}]", wrapped, function=wrapped)
    assert str(inspect.signature(made)) == "(x, factor=2.0, *, weight=None)"
    assert made(1) == ((1, 2.0, None), [1, 2.0, None])
    assert made(1, 3, weight=4) == ((1, 3, 4), [1, 3, 4])
    with pytest.raises(TypeError, match=r"wrapped\(\) missing 1 required positional argument: 'x'"):
        made()


def test_tensors_are_told_by_their_annotation():
    assert tensors(wrapped) == ["x", "weight"]


def test_a_traceback_shows_its_lines():
    def divide(zero: float) -> None: ...

    made = written_out("return 1 / {each}", divide)
    with pytest.raises(ZeroDivisionError) as error:
        made(0)
    assert "return 1 / zero" in "".join(traceback.format_exception(error.value))


class _Recording(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = func, args, kwargs
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "args", "kwargs"),
    [
        (F.relu, 1, {}),
        (lambda x: F.relu(input=x), 1, {}),
        (lambda x: F.hardtanh(x, -2.0), 1, {"min_val": -2.0}),
        (lambda x: F.threshold(x, 0.5, value=3.0), 3, {}),
        (lambda x: F.cross_entropy(x, x.softmax(-1), z_loss=0.1), 2, {"z_loss": 0.1}),
    ],
)
def test_a_mode_sees_what_has_no_default_by_place_and_what_was_chosen_by_name(call, args, kwargs):
    x = torch.randn(3, 4)
    with _Recording() as mode:
        call(x)
    _, places, names = mode.seen
    assert (len(places), names) == (args, kwargs)


def test_sparse_goes_to_torchs_own_by_place_and_by_name():
    x = torch.tensor([[-1.0, 0.0], [0.0, 2.0]]).to_sparse().requires_grad_()
    for y in (F.relu(x), F.relu(input=x)):
        assert type(y.grad_fn).__name__ == "ReluBackward0"


def test_what_has_outlived_its_transform_still_has_a_gradient():
    weight, kept = torch.tensor([1.0, 2.0], requires_grad=True), []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * weight)
        return x.sum()

    torch.func.grad(keep)(torch.tensor([-1.0, 3.0]))
    (grad,) = torch.autograd.grad(F.relu(kept[0]).sum(), weight)
    assert grad.tolist() == [0.0, 3.0]
