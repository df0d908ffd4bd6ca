"""Raw gradients: what a Function's backward itself returns, before autograd mends it.

The engine sums a gradient to the input's shape and casts it to its dtype without a word. A gradient of fewer bits has
lost what nothing gives back; the other cases are worth knowing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised, reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import graph

NAME = "raw_gradients"
MIXED = "Expected all tensors to be on the same device"
FACTORIES = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.zeros,
)


def _run(case: Case) -> Iterator[Finding]:
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
    whole = {node: grads for node, grads in incoming.items() if all(g is not None for g in grads)}
    for node, given in whole.items():
        try:
            raw = _apply(node, given)
        except Exception as error:
            raise BackwardRaised(reason(error)) from error
        function = type(node).__name__.removesuffix("Backward")
        if _makes_elsewhere(node, given):
            yield _elsewhere(function)
        for number, (g, (before, i)) in enumerate(zip(raw, node.next_functions, strict=False)):
            if before is not None and isinstance(g, Tensor):
                meta = before._input_metadata[i]  # noqa: SLF001  # an edge has no public dtype and shape
                found = _compare(case, function, number, g, meta)
                if found:
                    yield found


def _makes_elsewhere(node: Any, given: Sequence[Tensor]) -> bool:
    """Whether a gradient is made of a tensor, of more than one number, for which backward names no device."""
    with _Elsewhere() as elsewhere:
        try:
            raw = _apply(node, given)
        except Exception as error:
            return elsewhere.made and MIXED in str(error)
    return any(isinstance(g, Tensor) and g.device.type == "meta" for g in raw)


def _apply(node: Any, given: Sequence[Tensor]) -> tuple[Any, ...]:
    raw = node.apply(*given)
    return raw if isinstance(raw, tuple) else (raw,)


class _Elsewhere(TorchFunctionMode):
    """Puts on the meta device what is made without a device: a tensor there stands for one on another.

    A tensor of no dimension goes with those of any device, if it is a CPU's.
    """

    made = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in FACTORIES or (kwargs or {}).get("device") is not None or not result.dim():
            return result
        self.made = True
        return result.to("meta")


def _elsewhere(function: str) -> Finding:
    return Finding(
        check=NAME,
        severity="note",  # on a CPU all is well
        message=f"{function}.backward makes a tensor on the default device, and mixes it with its inputs",
        cause="zeros, full, arange and the like without device=: fails on a GPU",
    )


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
    if said is None:
        return None
    cause = "autograd casts without a word; the bits are lost" if wrong else None
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
