"""Writes: backward leaves inputs, grad_output and saved tensors as they are; forward leaves the inputs.

Others hold the same tensors: grad_output goes to another branch of the graph too, a saved tensor is somebody's weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in

NAME = "writes"


def _run(case: Case) -> Iterator[Finding]:
    leaves = case.fresh()
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        if t.layout == torch.strided:
            saved.append((t.detach(), t.detach().clone()))
        return t.detach() if t.grad_fn is not None else t

    fixed: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        fixed.append(t.clone())
        return fixed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = tensors_in(case.call(leaves, fixed=keep))
    outputs = [result[i] for i in case.differentiable]
    if not case.copies_leaves:
        yield from _changed("forward", "input", case.names, leaves, case.leaves)
    before = [t.clone() for t in fixed]
    leaf_values = [leaf.detach().clone() for leaf in leaves]
    saved = [(t, t.clone()) for t, _ in saved]
    v = [t.clone() for t in case.plain.cotangents]
    case.backward(outputs, leaves, v)
    numbers = [f"grad_output {i}" if len(v) > 1 else "grad_output" for i in range(len(v))]
    yield from _changed("backward", "", numbers, v, case.plain.cotangents)
    yield from _changed("backward", "", case.names, leaves, leaf_values)
    yield from _changed("backward", "", ["an argument"] * len(fixed), fixed, before)
    names = [f"saved tensor {i}" for i in range(len(saved))]
    yield from _changed("backward", "", names, [t for t, _ in saved], [t for _, t in saved])


def _changed(
    phase: str,
    kind: str,
    names: list[str],
    now: list[Tensor] | tuple[Tensor, ...],
    before: list[Tensor] | tuple[Tensor, ...],
) -> Iterator[Finding]:
    for name, a, b in zip(names, now, before, strict=True):
        same = (
            (a == b) | (a.isnan() & b.isnan())
            if a.is_floating_point() or a.is_complex()
            else a == b
        )
        if not bool(same.all()):
            at = tuple((~same).nonzero()[0].tolist())
            yield Finding(
                check=NAME,
                severity="wrong",
                message=f"{phase} writes to {name}: element {list(at)} was {b[at].item():.4g}, is {a[at].item():.4g}",
                input=name,
                index=at,
                got=a[at].item(),
                expected=b[at].item(),
                cause="an in-place operation on a tensor that others hold"
                + (" (forward: mark_dirty is missing)" if kind else ""),
            )


CHECK = Check(
    name=NAME,
    tests="backward writes to no input, grad_output or saved tensor; forward to no input",
    run=_run,
    order=12,
)
