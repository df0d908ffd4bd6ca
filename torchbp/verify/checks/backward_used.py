"""Backward used: which ways of differentiating a function call its hand-written backward, and which go round it.

torch.compile of a torch.func transform differentiates forward instead, without a word (torch 2.13): the numbers are
right, what the backward was written for is not had. Found by doubling what backward returns and looking for the factor.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph, tensors_in
from torchbp.verify.tolerance import largest

NAME = "backward_used"


def _run(case: Case) -> Iterator[Finding]:
    nodes = [n for n in graph(case.kept[1]) if isinstance(n, BackwardCFunction)]
    functions = {type(n)._forward_cls for n in nodes}  # type: ignore[attr-defined]  # noqa: SLF001
    if not functions:
        raise NotApplicable("no autograd.Function written in Python")
    for way, gradients in _ways(case).items():
        case.calls.count(forward=1)
        with ExitStack() as patched:
            for function in functions:
                doubled = staticmethod(_doubled(function.backward))
                patched.enter_context(mock.patch.object(function, "backward", doubled))
            try:
                got = gradients()
            except Exception as error:
                yield _note(f"{way} refuses: {reason(error)}")
                continue
        pairs = zip(got, case.plain.grads, strict=True)
        if all(largest(g - e) <= 1e-3 * largest(e) for g, e in pairs):
            yield _note(f"{way} does not call backward: it differentiates forward instead")


def _ways(case: Case) -> dict[str, Callable[[], Sequence[Tensor]]]:
    bare, wanted = case.bare(), case.differentiable
    cotangents = case.plain.cotangents

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_in(bare(leaves))
        return tuple([outputs[i] for i in wanted])

    def pulled(*leaves: Tensor) -> tuple[Tensor, ...]:
        pull: Callable[..., tuple[Tensor, ...]] = torch.func.vjp(forward, *leaves)[1]
        return pull(cotangents)

    def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
        code = run.__code__.replace()  # new: dynamo counts recompilations per code object
        new = types.FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)
        return torch.compile(new, backend="aot_eager", dynamic=False)

    def backward(run: Callable[..., tuple[Tensor, ...]]) -> Sequence[Tensor]:
        leaves = case.fresh()
        return case.backward(run(*leaves), leaves, cotangents)

    return {
        "backward()": lambda: backward(forward),
        "torch.func.vjp": lambda: pulled(*case.leaves),
        "torch.compile": lambda: backward(compiled(forward)),
        "torch.compile of torch.func.vjp": lambda: compiled(pulled)(*case.leaves),
    }


def _doubled(backward: Callable[..., Any]) -> Callable[..., Any]:
    def twice(ctx: Any, *grads: Any) -> Any:
        given = backward(ctx, *grads)
        several = given if isinstance(given, tuple) else (given,)
        return tuple([None if g is None else 2 * g for g in several])

    return twice


def _note(message: str) -> Finding:
    return Finding(check=NAME, severity="note", message=message)


CHECK = Check(
    name=NAME,
    tests="which ways of differentiating call the hand-written backward",
    run=_run,
    order=98,
    level="asked",
)
