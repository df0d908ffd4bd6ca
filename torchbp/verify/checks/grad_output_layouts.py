"""Layouts of grad_output: the gradient depends on its values, not on its strides.

autograd hands a backward what the next one made: `sum().backward()` an expanded scalar (stride 0), a transpose a
transposed tensor, `cat` a slice of a larger one. A kernel that indexes it as contiguous reads the wrong elements.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.otherwise import strided
from torchbp.verify.report import Finding
from torchbp.verify.tolerance import compare_all

NAME = "grad_output_layouts"


def _transposed(v: Tensor) -> Tensor:
    return v.mT.contiguous().mT if v.dim() >= 2 else strided(v)


def _slice(v: Tensor) -> Tensor:
    """Return v as the backward of `cat` hands it on: the last stride is 1, the others skip."""
    if v.dim() == 0:
        return torch.stack([v + 7, v])[1]
    wide = torch.full((*v.shape[:-1], v.shape[-1] + 3), -7.0, dtype=v.dtype, device=v.device)
    wide[..., 2:-1] = v
    return wide[..., 2:-1]


def _permuted_or_lower(v: Tensor) -> Tensor:
    """Return v permuted; of fewer than three dimensions, transposed already, as the last rows of a taller tensor."""
    if 0 < v.dim() < 3:
        return torch.cat([torch.full_like(v, 7.0), v])[len(v) :]
    if v.dim() == 4:
        return v.contiguous(memory_format=torch.channels_last)
    dims = tuple(reversed(range(v.dim())))
    return v.permute(dims).contiguous().permute(dims)


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "strided": strided,
    "a slice, as the backward of cat makes it": _slice,
    "permuted, or cut from memory that begins before it": _permuted_or_lower,
}


def _conjugated(v: Tensor) -> Tensor:
    """Return v as ``conj()`` makes it: in memory the sign of the imaginary part is another."""
    return v.conj().resolve_conj().conj()


def _run(case: Case) -> Iterator[Finding]:
    v, g = case.plain.cotangents, case.plain.grads
    if any(t.is_complex() for t in v):
        (got,) = case.vjps([[_conjugated(t) for t in v]])
        yield from _compare(
            case, got, g, "a lazy conjugate", "read from memory: resolve_conj first"
        )
    rows = [t[..., :1] if t.dim() else t for t in v]
    expanded = {
        "expanded, as sum().backward() makes it": [_first(t) for t in v],
        "expanded along the last dimension": rows,
    }
    several: list[list[Tensor]] = [[change(t) for t in v] for change in SAME.values()]
    for parts in expanded.values():
        stride_0 = [p.contiguous().expand(t.shape) for p, t in zip(parts, v, strict=True)]
        several += [stride_0, [t.contiguous() for t in stride_0]]
    grads = case.vjps(several)
    n = len(SAME)
    for layout, got in zip(SAME, grads[:n], strict=True):
        found = _compare(case, got, g, layout, "grad_output indexed as if contiguous")
        yield from found
        if found:
            return
    for layout, got, expected in zip(expanded, grads[n::2], grads[n + 1 :: 2], strict=True):
        found = _compare(case, got, expected, layout, "stride 0 of grad_output not respected")
        yield from found
        if found:
            return


def _compare(
    case: Case, got: Sequence[Tensor], expected: Sequence[Tensor], layout: str, cause: str
) -> list[Finding]:
    when = f" for a grad_output that is {layout}"
    return compare_all(NAME, case, got, expected, when=when, cause=cause)


def _first(t: Tensor) -> Tensor:
    return t.reshape(-1)[:1].reshape((1,) * t.dim()) if t.numel() else t.sum()


CHECK = Check(
    name=NAME,
    tests="the gradient does not depend on the strides of grad_output",
    run=_run,
    order=30,
)
