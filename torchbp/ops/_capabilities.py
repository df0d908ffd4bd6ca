"""What an op can do, found by running it: the columns of docs/ops.md. Nothing here is declared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample, one_tensor

__all__ = ["CAPABILITIES", "Capabilities", "kept_bytes", "measure"]


@dataclass(frozen=True)
class Capabilities:
    """What was found of one op.

    Attributes:
        kept: Bytes kept for backward an element of the first input, ``{dtype: (torch, torchbp)}``; torch's is ``None``
            where it has no such op.
        can: Capability -> whether it works; ``None`` where finite differences would have to be equal to a gradient
            that is, by definition, another.
    """

    kept: dict[torch.dtype, tuple[float | None, float]]
    can: dict[str, bool | None]


def kept_bytes(function: Callable[..., Tensor | tuple[Tensor, ...]], sample: Sample) -> int:
    """Return the bytes of the distinct storages that autograd keeps for the backward of one call."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        output = function(*sample.args, **sample.kwargs)  # alive: its storage must not be another's
    del output
    return sum(kept.values())


def _closed(
    op: Op, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return the op on its first sample as a function of its differentiable tensors alone, drawing alike each time."""
    sample = next(iter(op.samples(Make(dtype))))
    leaves, structure = tree_flatten(sample.args)
    slots = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.requires_grad]

    def f(*tensors: Tensor) -> Tensor:
        filled: list[Any] = list(leaves)
        for i, t in zip(slots, tensors, strict=True):
            filled[i] = t
        args = tree_unflatten(filled, structure)
        if op.random and not torch.compiler.is_compiling():
            torch.manual_seed(0)
        return one_tensor(op.function(*args, **sample.kwargs))

    return f, tuple(leaves[i] for i in slots)


def _forward_mode(f: Callable[..., Tensor], x: tuple[Tensor, ...]) -> None:
    gradcheck(f, x, check_forward_ad=True, check_backward_ad=False)


def _batched(f: Callable[..., Tensor], x: tuple[Tensor, ...]) -> None:
    gradcheck(f, x, check_batched_grad=True)


def _vmap(f: Callable[..., Tensor], x: tuple[Tensor, ...]) -> None:
    batch = torch.stack([x[0].detach(), x[0].detach() + 1])
    vmap(grad(lambda t: f(t, *x[1:]).sum()), randomness="different")(batch)


def _compile(f: Callable[..., Tensor], x: tuple[Tensor, ...]) -> None:
    torch._dynamo.reset()
    torch.compile(f, fullgraph=True, backend="aot_eager")(*x).sum().backward()


def _autocast(f: Callable[..., Tensor], x: tuple[Tensor, ...]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = f(*x)
    torch.autograd.grad(y.sum(), x)


CAPABILITIES: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], object]] = {
    "gradcheck": gradcheck,
    "second order": gradgradcheck,
    "forward mode": _forward_mode,
    "batched": _batched,
    "vmap": _vmap,
    "compile": _compile,
    "autocast": _autocast,
}


_BY_DIFFERENCES = ("gradcheck", "second order", "forward mode", "batched")


def measure(op: Op) -> Capabilities:
    """Run ``op`` in every way of :data:`CAPABILITIES`, and count what it keeps."""
    can: dict[str, bool | None] = {}
    for name, attempt in CAPABILITIES.items():
        if op.estimator and name in _BY_DIFFERENCES:
            can[name] = None
            continue
        f, x = _closed(op, torch.float32 if name == "autocast" else torch.float64)
        try:
            attempt(f, x)
        except Exception:  # whatever it raises, it cannot do this
            can[name] = False
        else:
            can[name] = True
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        sample = op.benchmark(Make(dtype), 1 << 14)
        n = sample.args[0].numel()
        theirs = op.torchs
        try:
            torchs = None if theirs is None else kept_bytes(theirs, sample) / n
        except NotImplementedError:  # not in this dtype
            torchs = None
        kept[dtype] = (torchs, kept_bytes(op.function, sample) / n)
    return Capabilities(kept, can)
