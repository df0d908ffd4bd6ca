"""Modules: parameters are left alone, buffers too in eval mode, and the gradient is right in both modes."""

import re
from collections.abc import Iterator

import torch
from torch import nn

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.duals import by_hand
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.modules import copied
from torchbp.verify.otherwise import differs_otherwise
from torchbp.verify.raised import BackwardRaised, reason
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts, same_outputs
from torchbp.verify.source import speaks
from torchbp.verify.tolerance import compare_all

NAME = "module"
MOVED = 1.0625  # times
TRAINING = re.compile(r"\btrain(ing)?\b")


def _run(case: Case) -> Iterator[Finding]:
    if not isinstance(case.func, nn.Module):
        raise NotApplicable("not a Module")
    was = case.func.training
    yield from _state(case, was)
    if case.steady:
        yield from _turned(case, was)
    other = case.in_mode(not was)
    yield from _state(case, not was)
    steady = was and case.steady  # in train mode, and so in the other
    if not accepts(other):
        return
    yield from _outdated(case, other if was else case)
    if _same(case, other):
        if speaks(case, TRAINING):
            yield from _called_again(other, f" of a second call in {_mode(not was)} mode")
    elif (steady or other.steady) and (
        found := check_lines(other, NAME, f" in {_mode(not was)} mode")
    ):
        yield found


def _mode(training: bool) -> str:
    return "train" if training else "eval"


def _turned(case: Case, was: bool) -> Iterator[Finding]:
    """Turn to the other mode between forward and backward, as an evaluation in between does."""
    if not by_hand(case):
        return
    other = case.in_mode(was)
    leaves, outputs = other.graph()
    other.turn(not was)
    got = other.backward(outputs, leaves, case.plain.cotangents)
    when = f" where the Module is in {_mode(not was)} mode by then"
    cause = "backward asks for the mode, not what forward kept of it in ctx"
    yield from compare_all(NAME, case, got, case.plain.grads, when=when, cause=cause)[:1]


def _outdated(case: Case, used: Case) -> list[Finding]:
    """Compare the output in eval mode, for other parameters than at the first call, with that of a new copy."""
    if not speaks(case, TRAINING) or not any(i >= case.size for i in case.where):
        return []

    def moved(base: Case) -> Case:
        where = [i for i in base.where if i >= base.size]
        return base.edited(lambda i, t: t * MOVED if i in where else t, parameters=True)

    now, new = moved(used), moved(case.in_mode(False))
    if not (used.steady and accepts(now) and accepts(new)) or same_outputs(now, new):
        return []
    slack = 1e3 * case.epsilon
    outputs = zip(now.all_outputs, new.all_outputs, strict=True)
    if any(not torch.allclose(a, b, rtol=slack, atol=slack) for a, b in outputs):
        message = "the output in eval mode is that of the parameters of an earlier call, and so is the gradient"
        cause = "kept from the first call: compute it again where a parameter is another"
        return [Finding(check=NAME, severity="wrong", message=message, cause=cause)]
    return []


def _called_again(case: Case, when: str) -> list[Finding]:
    """Compare the gradient of a second call, after the first one's backward: something may be kept with its graph."""
    cause = "kept from the first call with its graph: keep it detached, or compute it again"
    try:
        got = case.vjp(case.plain.cotangents)
    except BackwardRaised as error:
        message = f"backward{when} raised {reason(error.__cause__ or error)}"
        return [Finding(check=NAME, severity="wrong", message=message, cause=cause)]
    return compare_all(NAME, case, got, case.plain.grads, when=when, cause=cause)[:1]


def _same(case: Case, other: Case) -> bool:
    """Whether values and gradients are those of the sample's mode, however these are asked for."""
    return (
        same_outputs(case, other)
        and all(map(torch.equal, other.plain.grads, case.plain.grads))
        and not other.writes
        and not differs_otherwise(other, NAME, "")
    )


def _state(case: Case, training: bool) -> Iterator[Finding]:
    """Run a copy as a training step would, and see what of its state changed."""
    assert isinstance(case.func, nn.Module)
    module = copied(case.func).train(training)
    given = case.given
    if len({t.dtype for t in (*given.leaves, *module.parameters()) if t.is_floating_point()}) > 1:
        module, given = module.double(), case  # float64 inputs for a float32 module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    case.calls.count(forward=1, backward=1)
    outputs = [y for y in given.forward_of(module) if y.requires_grad]
    for name, buffer in module.named_buffers():
        if buffer.grad_fn is not None:
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"buffer {name} is a part of the graph after forward in {_mode(training)} mode",
                cause="it holds the graphs of all calls, and the second backward goes through the first: detach it",
            )
            return
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    parameters = {n for n, _ in module.named_parameters()}
    for name, value in module.state_dict().items():
        same = (
            torch.equal(value, before[name])
            if name in before and value.shape == before[name].shape
            else False
        )
        if not same and (name in parameters or not training):
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"forward and backward in {_mode(training)} mode change {name} of the state_dict",
                cause="an in-place operation on a parameter"
                if name in parameters
                else "a buffer updated in eval mode",
            )


CHECK = Check(
    name=NAME,
    tests="a Module's state is left alone, and both modes have right gradients",
    run=_run,
    order=89,
    level="full",
    differences=True,
)
