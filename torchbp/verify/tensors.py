"""Tensors in and around the function under test: found, named, drawn."""

import copy
import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "Directions",
    "apart",
    "counts",
    "double",
    "expression_of",
    "flatten",
    "graph",
    "half",
    "has_both_signs",
    "is_dense",
    "is_square",
    "kinds_in",
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


def is_dense(t: Tensor) -> bool:
    """Whether a tensor has its elements one by one in memory: it is not sparse, nested or quantized."""
    return t.layout == torch.strided and not t.is_nested and not t.is_quantized


def apart(x: Tensor) -> Tensor:
    """Return a copy with the strides of ``x``, rows that are one and the same memory included."""
    if x.numel() and 0 in x.stride():
        once = x[tuple(slice(1) if s == 0 else slice(None) for s in x.stride())]
        return once.detach().clone().expand_as(x)
    return x.detach().clone()


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


def has_both_signs(t: Tensor) -> bool:
    """Whether ``t`` has elements on both sides of 0; complex numbers have."""
    return t.is_complex() or bool((t < 0).any() and (t > 0).any())


def is_square(t: Tensor) -> bool:
    """Whether ``t`` holds square matrices of two rows or more."""
    return t.dim() > 1 and t.shape[-1] == t.shape[-2] > 1


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
    """Return the tensors of a nested structure, dataclasses and mappings of any kind too, in order."""
    found: list[Tensor] = []
    for x in pytree.tree_leaves(structure):
        if isinstance(x, Tensor):
            found.append(x)
        else:
            for part in _parts(x).values():
                found += tensors_in(part)
    return found


def flatten(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Return arguments with a name each, ``input 1['w']`` or ``argument scale``, and how to put them back."""
    opened = pytree.tree_map(_open, (tuple(args), dict(kwargs)))
    paths, spec = pytree.tree_flatten_with_path(opened)
    return [(_path(keys), x) for keys, x in paths], spec


def kinds_in(structure: object) -> str:
    """Return the names of the types in it that nothing is looked for in."""
    known = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
    left = (x for x in pytree.tree_leaves(structure) if not isinstance(x, known) and not _parts(x))
    names = dict.fromkeys(type(x).__name__ for x in left)
    return f"nothing is looked for in {', '.join(names)}" if names else ""


def _parts(x: object) -> Mapping[str, Any]:
    """Return what a dataclass, or a mapping that torch's pytree takes for a leaf, is made of."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return dict(x) if isinstance(x, Mapping) else {}


class _Opened:
    """A dataclass or a mapping on its way through a pytree."""

    def __init__(self, whole: Any, parts: Mapping[str, Any]) -> None:
        self.whole, self.parts = whole, parts

    def closed(self) -> Any:
        """Return one like the whole, of these parts; the class's constructor may ask for others."""
        made = copy.copy(self.whole)
        for name, x in self.parts.items():
            if not dataclasses.is_dataclass(made):
                made[name] = x
            elif made.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                object.__setattr__(made, name, x)
            else:
                setattr(made, name, x)
        return made


def _open(x: Any) -> Any:
    """Return what a pytree takes for a leaf with the tensors in it as leaves."""
    if isinstance(x, (Tensor, nn.Module)) or not tensors_in(x):
        return x
    return _Opened(x, pytree.tree_map(_open, dict(_parts(x))))


def _keys(x: _Opened) -> Iterator[Any]:
    """Return how each part is reached."""
    key = pytree.GetAttrKey if dataclasses.is_dataclass(x.whole) else pytree.MappingKey
    return map(key, x.parts)


pytree.register_pytree_node(
    _Opened,
    lambda x: (list(x.parts.values()), (x.whole, tuple(x.parts))),
    lambda parts, how: _Opened(how[0], dict(zip(how[1], parts, strict=True))).closed(),
    flatten_with_keys_fn=lambda x: (
        list(zip(_keys(x), x.parts.values(), strict=True)),
        (x.whole, tuple(x.parts)),
    ),
)


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
    if isinstance(func, functools.partial):
        return f"partial({name_of(func.func)})"
    operator = getattr(func, "_qualname", None) or getattr(func, "_qualified_op_name", None)
    if isinstance(operator, str) and "::" in operator:  # of torch.library
        return f"torch.ops.{operator.replace('::', '.')}"
    owner = getattr(func, "__self__", None)  # Function.apply is a bound method of the class
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.{getattr(func, '__name__', 'apply')}"
    name = getattr(func, "__qualname__", None) or type(func).__name__
    if name.startswith("pybind11_"):  # a record of its own stands in front
        return name.rpartition(".")[2]
    return name.rpartition("<locals>.")[2].removeprefix("_VariableFunctionsClass.")


def expression_of(func: object) -> str:
    """Return what stands for ``func`` in a line to paste: its name where that may be one, as ``inputs`` else."""
    name = name_of(func)
    if isinstance(func, nn.Module):
        return "module"
    bound = isinstance(func, types.MethodType) and not isinstance(func.__self__, type)
    is_name = isinstance(func, (types.FunctionType, types.BuiltinFunctionType, types.MethodType))
    if name.startswith("torch.ops.") or (is_name and not bound and "<" not in name):
        return name
    return "func"
