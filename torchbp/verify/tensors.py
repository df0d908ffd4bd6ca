"""Tensors in and around the function under test: found, named, drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "Directions",
    "counts",
    "double",
    "flatten",
    "graph",
    "half",
    "like",
    "like_mask",
    "name_of",
    "real",
    "scale_of",
    "signed_like",
    "tensors_in",
    "uniform",
]

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}

Directions = dict[int, Tensor]  # of each leaf that moves, flat


def counts(t: Tensor) -> bool:
    """Whether a tensor holds integers."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def double(t: Tensor) -> Tensor:
    """Return a floating-point or complex tensor in double precision."""
    return t.to(_DOUBLE.get(t.dtype, t.dtype))


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return float64 values in [0, 1), drawn on the CPU whatever the default device is."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")


def signed_like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Return values of both signs, none near 0: |v| is in [0.5, 1.5). They hide nothing by being small."""

    def draw() -> Tensor:
        r = uniform(t.shape, generator)
        sign = torch.randint(2, t.shape, generator=generator, device="cpu") * 2 - 1
        return sign * (r + 0.5)

    value = torch.complex(draw(), draw()) if t.is_complex() else draw()
    return value.to(device=t.device, dtype=t.dtype)


def scale_of(leaf: Tensor) -> Tensor:
    """Return the size of a step of 1 for each element: its magnitude, no less than a tenth of the typical one."""
    x = real(leaf).abs().double()
    x = torch.where(x.isfinite(), x, 1.0)
    typical = float(x.median()) if x.numel() else 1.0
    return x.clamp(min=0.1 * typical if typical > 0 else 1.0)


def real(t: Tensor) -> Tensor:
    """Return the real numbers of ``t``, flat, in float64."""
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.reshape(-1).double()


def half(directions: Directions) -> Directions:
    """Return the first half of the elements that are moved."""
    count = sum(int((d != 0).sum()) for d in directions.values()) // 2
    part = {}
    for i, d in directions.items():
        at = d.nonzero().flatten()[:count]
        part[i] = torch.zeros_like(d)
        part[i][at] = d[at]
        count -= at.numel()
        if count <= 0:
            break
    return part


def like(flat: Tensor, t: Tensor) -> Tensor:
    """Undo :func:`real`: give flat real numbers the shape of ``t``, complex where it is."""
    if t.is_complex():
        return torch.view_as_complex(flat.view(*t.shape, 2).contiguous())
    return flat.view(t.shape)


def like_mask(flat: Tensor, t: Tensor) -> Tensor:
    """Give a flat mask of real numbers the shape of ``t``."""
    return flat.view(*t.shape, 2).any(-1) if t.is_complex() else flat.view(t.shape)


def tensors_in(structure: object) -> list[Tensor]:
    """Return the tensors of a nested structure, in order."""
    return [x for x in pytree.tree_leaves(structure) if isinstance(x, Tensor)]


def flatten(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Return arguments with a name each, ``input 1['w']`` or ``argument scale``, and how to put them back."""
    paths, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    return [(_path(keys), x) for keys, x in paths], spec


def _path(keys: Sequence[Any]) -> str:
    part, first, *rest = keys
    tail = pytree.keystr(tuple(rest))
    if getattr(part, "idx", 0) == 1:
        return f"argument {getattr(first, 'key', first)}{tail}"
    return f"input {getattr(first, 'idx', first)}{tail}"


def graph(outputs: Sequence[Tensor]) -> list[Any]:
    """Return the nodes of the autograd graph behind ``outputs``."""
    found: dict[Any, None] = {}
    queue: list[Any] = [y.grad_fn for y in outputs]
    while queue:
        node = queue.pop()
        if node is not None and node not in found:
            found[node] = None
            queue += [before for before, _ in node.next_functions]
    return list(found)


def name_of(func: object) -> str:
    """Return how a person would call ``func``."""
    owner = getattr(func, "__self__", None)  # Function.apply is a bound method of the class
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.{getattr(func, '__name__', 'apply')}"
    name = getattr(func, "__qualname__", None) or type(func).__name__
    return name.rpartition("<locals>.")[2].removeprefix("_VariableFunctionsClass.")
