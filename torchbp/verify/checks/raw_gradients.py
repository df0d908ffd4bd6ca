"""Raw gradients: what a Function's backward itself returns, before autograd mends it.

The engine sums a gradient to the input's shape and casts it to its dtype without a word. A gradient of fewer bits has
lost what nothing gives back; the other cases are worth knowing.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph

NAME = "raw_gradients"


def _run(case: Case) -> Iterator[Finding]:
    found = dict(_returned(case))
    as_given = dict(_returned(case.given)) if found and case.given is not case else found
    for which, finding in found.items():
        # What is right as the sample is given is not wrong.
        same = which in as_given and as_given[which].severity == finding.severity
        yield finding if same else replace(finding, severity="note")


def _returned(case: Case) -> Iterator[tuple[tuple[str, int], Finding]]:
    """Yield what is to be said of what backward returns at this sample, and of which gradient."""
    leaves, outputs = case.kept
    nodes = [n for n in graph(outputs) if isinstance(n, BackwardCFunction)]
    if not nodes:
        raise NotApplicable("no autograd.Function written in Python")
    incoming: dict[Any, tuple[Any, ...]] = {}

    def keep(node: Any) -> Any:
        return node.register_prehook(lambda grads: incoming.update({node: tuple(grads)}))

    hooks = [keep(node) for node in nodes]
    try:
        case.backward(outputs, leaves, case.plain.cotangents, retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    for node, grads in incoming.items():
        given = [torch.zeros((), device=leaves[0].device) if g is None else g for g in grads]
        if any(g is None for g in grads):
            continue
        try:
            raw = node.apply(*given)
        except Exception as error:
            raise BackwardRaised(reason(error)) from error
        raw = raw if isinstance(raw, tuple) else (raw,)
        function = type(node).__name__.removesuffix("Backward")
        # Of the inputs that are no tensors there is no next function.
        wanted = [k for k, asked in enumerate(node.needs_input_grad) if asked]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        for number, (before, i) in zip(wanted, edges, strict=False):
            g = raw[number] if number < len(raw) else None
            if isinstance(g, Tensor):
                meta = before._input_metadata[i]  # noqa: SLF001  # an edge has no public dtype and shape
                found = _compare(case, function, number, g, meta)
                if found:
                    yield (function, number), found


def _compare(case: Case, function: str, number: int, g: Tensor, meta: Any) -> Finding | None:
    what = f"{function}.backward returns gradient {number}"
    said = None
    wrong = False
    if g.dtype != meta.dtype:
        said = f"{what} as {_short(g.dtype)}, expected {_short(meta.dtype)}"
        wrong = case.options["check_grad_dtypes"] or _bits(g.dtype) < _bits(meta.dtype)
    elif g.device != meta.device:
        said = f"{what} on {g.device}, expected {meta.device}"
        wrong = g.dim() > 0
    elif tuple(g.shape) != tuple(meta.shape):
        said = f"{what} with shape {tuple(g.shape)} for an input of shape {tuple(meta.shape)}; autograd sums it"
        wrong = True
    if said is None:
        return None
    cause = "autograd casts, or sums, without a word" if wrong else None
    return Finding(check=NAME, severity="wrong" if wrong else "note", message=said, cause=cause)


def _bits(dtype: torch.dtype) -> float:
    kind = dtype.is_floating_point or dtype.is_complex
    return -torch.finfo(dtype).eps if kind else -1.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECK = Check(
    name=NAME,
    tests="backward itself returns the dtype, device and shape of the input",
    run=_run,
    order=50,
)
