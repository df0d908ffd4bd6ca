"""Layouts of grad_output: the gradient depends on its values, not on its strides.

autograd hands a backward what the next one made: `sum().backward()` an expanded scalar (stride 0), a transpose a
transposed tensor, `cat` a slice of a larger one. A kernel that indexes it as contiguous reads the wrong elements.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "grad_output_layouts"


def _transposed(v: Tensor) -> Tensor:
    return v.mT.contiguous().mT if v.dim() >= 2 else _strided(v)


def _strided(v: Tensor) -> Tensor:
    """Return v as every second element of a larger tensor whose other elements are not v's."""
    wide = torch.full((*v.shape, 2), -7.0, dtype=v.dtype, device=v.device)
    wide[..., 0] = v
    return wide[..., 0]


def _slice(v: Tensor) -> Tensor:
    """Return v as the backward of `cat` hands it on: the last stride is 1, the others skip."""
    if v.dim() == 0:
        return torch.stack([v + 7, v])[1]
    wide = torch.full((*v.shape[:-1], v.shape[-1] + 3), -7.0, dtype=v.dtype, device=v.device)
    wide[..., 2:-1] = v
    return wide[..., 2:-1]


def _reversed_dims(v: Tensor) -> Tensor:
    dims = tuple(reversed(range(v.dim())))
    return v.permute(dims).contiguous().permute(dims)


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "strided": _strided,
    "a slice, as the backward of cat makes it": _slice,
    "permuted": _reversed_dims,
}


def _run(case: Case) -> Iterator[Finding]:
    v, g = case.plain.cotangents, case.plain.grads
    for layout, change in SAME.items():
        cause = "grad_output indexed as if contiguous"
        got = case.vjp([change(t) for t in v])
        found = compare_all(
            NAME, case, got, g, when=f" for a grad_output that is {layout}", cause=cause
        )
        yield from found
        if found:
            return
    rows = [t[..., :1].contiguous() if t.dim() else t for t in v]
    for parts, text in (
        ([_first(t) for t in v], "of sum().backward()"),
        (rows, "of a sum over rows"),
    ):
        expanded = [p.expand(t.shape) for p, t in zip(parts, v, strict=True)]
        got = case.vjp(expanded)
        expected = case.vjp([t.contiguous() for t in expanded])
        cause = "stride 0 not respected: grad_output indexed as if contiguous"
        found = compare_all(
            NAME, case, got, expected, when=f" for the expanded grad_output {text}", cause=cause
        )
        yield from found
        if found:
            return


def _first(t: Tensor) -> Tensor:
    return t.reshape(-1)[:1].reshape((1,) * t.dim()) if t.numel() else t.sum()


CHECK = Check(
    name=NAME,
    tests="the gradient does not depend on the strides of grad_output",
    run=_run,
    order=30,
)
