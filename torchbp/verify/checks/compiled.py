"""torch.compile: the compiled function gives eager's values and gradients; a graph break is a refusal.

Traced with the `aot_eager` backend, which runs all of dynamo and AOTAutograd and generates no code. One case is more
than a refusal: an autograd.Function that reads the value of a floating-point tensor into Python once and so breaks the
graph. It waits for the device on every call, and vmap cannot follow it. Iterative solvers, which read a residual time
and again, are left in peace, and so is who reads one before, to see whether the Function may be called.
"""

import logging
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, ForwardRaised, reason
from torchbp.verify.report import Finding
from torchbp.verify.source import codes_of, functions
from torchbp.verify.tensors import graph, tensors_in
from torchbp.verify.tolerance import compare, compare_all, largest, rounding

NAME = "compile"
CUSTOM = "GeneratedBackwardFor"  # of torch.library
CAUSE = "another path while torch.compile traces, or an operation it traces differently"


def _run(case: Case) -> Iterator[Finding]:
    loud = logging.getLogger("torch")
    level = loud.level
    loud.setLevel(logging.CRITICAL)
    try:
        refusal = ""
        found = _fake(case)
        if found:
            yield from found
            return
        for fullgraph in (True, False):
            try:
                found = _compare(case, fullgraph)
                break
            except (ForwardRaised, BackwardRaised) as error:
                refusal = refusal or reason(error)
        yield from found
        if refusal and not found:
            reads = _reads(case)
            if reads == 1:
                yield Finding(
                    check=NAME,
                    severity="wrong",
                    message="the graph breaks: forward reads the value of a floating-point tensor in Python "
                    f"({refusal})",
                    cause="float(), .item() or bool() of a tensor: waits for the device, breaks torch.compile and vmap",
                )
            raise Refused(refusal)
    finally:
        loud.setLevel(level)


def _fake(case: Case) -> list[Finding]:
    """Hold the outputs' shapes and dtypes against what the fake kernels of custom ops, if there are any, promise."""
    if not any(node.name().startswith(CUSTOM) for node in graph(case.kept[1])):
        return []
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports sympy

    with FakeTensorMode() as mode:
        try:
            leaves = [mode.from_tensor(leaf).requires_grad_() for leaf in case.leaves]
            promised = tensors_in(case.call(leaves, seeded=False, fixed=mode.from_tensor))
        except ForwardRaised:
            return []
    pairs = zip(promised, case.all_outputs, strict=False)
    return [
        Finding(
            check=NAME,
            severity="wrong",
            message=f"a fake kernel promises output {k} as {_kind(fake)}, and it is {_kind(y)}",
            cause="register_fake: torch.compile plans memory and shapes with what it says",
        )
        for k, (fake, y) in enumerate(pairs)
        if _kind(fake) != _kind(y)
    ]


def _kind(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _compare(case: Case, fullgraph: bool) -> list[Finding]:
    run = _fresh_code(case)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=fullgraph, dynamic=False)
    leaves = case.fresh()
    case.calls.count(forward=1)
    try:
        outputs = compiled(*leaves)
    except Exception as error:
        raise ForwardRaised(reason(error)) from error
    found = []
    for i, (y, e) in enumerate(zip(outputs, case.plain.outputs, strict=True)):
        wrong = compare(
            NAME,
            str(i),
            y,
            e,
            rounding(case, e) * largest(e),
            what="output",
            when=" under torch.compile",
            cause=CAUSE,
        )
        found += [wrong] if wrong else []
    got = case.backward(outputs, leaves, case.plain.cotangents)
    return found + compare_all(
        NAME, case, got, case.plain.grads, when=" under torch.compile", cause=CAUSE
    )


def _fresh_code(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """Return forward as a function whose code object is new: dynamo counts recompilations per code object."""
    wanted = case.differentiable
    bare = case.bare()

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = tensors_in(bare(leaves))
        return tuple([outputs[i] for i in wanted])

    return types.FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
    )


class _Reads(TorchDispatchMode):
    """Counts the floating-point values that are read into Python while some code runs."""

    only_watches = True  # torchbp runs under it as without

    def __init__(self, codes: Set[types.CodeType]) -> None:
        super().__init__()
        self.codes = codes
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():  # noqa: SLF001
            frames = traceback.walk_stack(sys._getframe())  # noqa: SLF001  # documented, and the only way
            self.count += any(frame.f_code in self.codes for frame, _ in frames)
        return func(*args, **(kwargs or {}))


def _reads(case: Case) -> int:
    """Return how many are read within a Function: what is read before, to see whether it may be called, is loud."""
    with _Reads(codes_of(functions(case))) as reads:
        case.forward(case.fresh())
    return reads.count


CHECK = Check(
    name=NAME,
    tests="torch.compile gives the same values and gradients, in one graph",
    run=_run,
    order=90,
    needs=("no random numbers", "same values"),
    level="full",
)
