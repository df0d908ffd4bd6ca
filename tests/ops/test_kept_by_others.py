"""What torch keeps of an op on somebody's behalf: checkpoints, selective ones, tensors that may be written to."""

from functools import partial

import pytest
import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.device import DEVICE
from tests.ops.conftest import Case, drawn, make
from torchbp import nn

SAVED, MADE_AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
DEAR = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.sigmoid, torch.ops.aten.tanh}
POLICIES = {
    "none": None,
    "all": lambda *_, **__: SAVED,
    "the dear ones": lambda _, op, *__, **___: SAVED if op.overloadpacket in DEAR else MADE_AGAIN,
}


class Large(Case):
    """What the op is benchmarked on, with more elements than losses take whole."""

    def sample(self, dtype=torch.float32):
        return self.op.benchmark(make(dtype), 40_000)


def gradients(f, tensors):
    y = f(*tensors)
    return torch.autograd.grad(y.sin().sum(), tensors, allow_unused=True)


def check_checkpointed(f, tensors, policy):
    """The gradients of ``f`` behind and before another op, checkpointed, against those that are not."""

    def step(*tensors):
        return f(*[t.sin() for t in tensors])

    options = {}
    if policy is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    again = partial(checkpoint, step, use_reentrant=False, **options)
    torch.testing.assert_close(gradients(again, tensors), gradients(step, tensors))


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoints(first, policy):
    """Whatever of its steps a policy keeps, even all."""
    if policy == "all" and first.op.random:
        pytest.skip("a draw is written, torch's too")
    check_checkpointed(*first.of_tensors(first.sample()), POLICIES[policy])


def test_checkpoints_of_large_tensors(op):
    if op.random:
        pytest.skip("a draw is written, torch's too")
    check_checkpointed(*Large(op, 0).of_tensors(Large(op, 0).sample()), POLICIES["all"])


def test_checkpoints_of_bfloat16(op):
    """A backward reads what was kept once: torch refuses to make it a second time."""
    case = Large(op, 0)
    f, tensors = case.of_tensors(case.sample(torch.bfloat16))
    y = checkpoint(f, *tensors, use_reentrant=False)
    torch.autograd.grad(y.sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_checkpoints_of_recurrent_layers(kind, policy):
    layers = kind(3, 4, num_layers=2, bidirectional=True).to(DEVICE)

    def f(x, *_):
        return layers(x)[0]

    x = drawn((5, 2, 3), torch.float32).requires_grad_()
    check_checkpointed(f, (x, *layers.parameters()), POLICIES[policy])


def test_inputs_written_to(first):
    """Under ``allow_mutation_on_saved_tensors`` what was kept is as it was."""
    f, tensors = first.of_tensors(first.sample())
    want = gradients(f, tensors)
    with allow_mutation_on_saved_tensors():
        given = [t * 1 for t in tensors]
        y = f(*given).sin()
        with torch.no_grad():
            for t in given:
                t.mul_(0.3)
        found = torch.autograd.grad(y.sum(), tensors, allow_unused=True)
    torch.testing.assert_close(found, want)


@pytest.mark.cpu("which is where it keeps them")
def test_saved_on_cpu(first):
    f, tensors = first.of_tensors(first.sample())
    want = gradients(f, tensors)
    with save_on_cpu():
        found = gradients(f, tensors)
    torch.testing.assert_close(found, want)
