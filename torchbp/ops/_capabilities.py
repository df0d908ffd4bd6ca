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
from torchbp.ops._samples import EDGES, Make, Sample, one_tensor

__all__ = ["CAPABILITIES", "Capabilities", "kept_bytes", "measure"]


@dataclass(frozen=True)
class Capabilities:
    """What was found of one op.

    Attributes:
        kept: Bytes kept for backward an element of the first input, ``{dtype: (torch, torchbp)}``; torch's is ``None``
            where it has no such op.
        own: The same in float32, of what is neither input nor output, which live anyway.
        can: Capability -> whether it works; ``None`` where there is nothing to compare with: finite differences and a
            gradient that is, by definition, another; edges of what is no function of single elements; complex numbers
            that torch refuses.
    """

    kept: dict[torch.dtype, tuple[float | None, float]]
    own: tuple[float | None, float]
    can: dict[str, bool | None]


def kept_bytes(
    function: Callable[..., Tensor | tuple[Tensor, ...]], sample: Sample, own: bool = False
) -> int:
    """Return the bytes of the distinct storages that autograd keeps for the backward of one call.

    Args:
        function: What is called.
        sample: Its arguments.
        own: Whether to leave out storages of the arguments and of the output.
    """
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        output = function(*sample.args, **sample.kwargs)  # alive: its storage must not be another's
    if own:
        for t in (*sample.tensors(), *Sample((output,)).tensors()):
            kept.pop(t.untyped_storage()._cdata, None)
    del output
    return sum(kept.values())


class _Nothing(Exception):  # noqa: N818
    """There is nothing to compare with."""


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


def _gradcheck(op: Op) -> None:
    gradcheck(*_by_differences(op))


def _second_order(op: Op) -> None:
    gradgradcheck(*_by_differences(op))


def _forward_mode(op: Op) -> None:
    gradcheck(*_by_differences(op), check_forward_ad=True, check_backward_ad=False)


def _batched(op: Op) -> None:
    gradcheck(*_by_differences(op), check_batched_grad=True)


def _by_differences(op: Op) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    if op.estimator:
        raise _Nothing
    return _closed(op)


def _vmap(op: Op) -> None:
    f, x = _closed(op)
    batch = torch.stack([x[0].detach(), x[0].detach() + 1])
    vmap(grad(lambda t: f(t, *x[1:]).sum()), randomness="different")(batch)


def _compile(op: Op) -> None:
    f, x = _closed(op)
    torch._dynamo.reset()
    torch.compile(f, fullgraph=True, backend="aot_eager")(*x).sum().backward()


def _autocast(op: Op) -> None:
    f, x = _closed(op, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = f(*x)
    torch.autograd.grad(y.sum(), x)


def _layouts(op: Op) -> None:
    """Inputs and incoming gradients that lie otherwise in memory: transposed, every second element, expanded."""
    f, x = _closed(op)
    y = f(*x)
    v = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    for change in (
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        again = tuple(change(t.detach()).requires_grad_() for t in x)
        for upstream in (change(v), torch.ones((), dtype=y.dtype).expand_as(y)):
            found = torch.autograd.grad(f(*again), again, upstream)
            wanted = torch.autograd.grad(f(*x), x, upstream.contiguous())
            torch.testing.assert_close(found, wanted)


def _edges(op: Op) -> None:
    """Zeros, kinks, saturation, ±1e30, ±∞: in float32 the limit, which is torch's in float64 where that is a number."""
    if not op.elementwise or op.random or op.reference is None:
        raise _Nothing
    x = torch.tensor(EDGES, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    y, exact = one_tensor(op.function(x)), one_tensor(op.reference(wide))
    (found,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(exact.sum(), wide)
    exact = exact.detach()
    for at, (value, derivative) in op.limits.items():
        exact[wide == at], wanted[wide == at] = value, derivative
    number = ~x.isnan()
    torch.testing.assert_close(y[number].detach(), exact[number].float())
    torch.testing.assert_close(found[number], wanted[number].float())


def _complex(op: Op) -> None:
    """Values and gradients of complex numbers, where torch has both."""
    sample = next(iter(op.samples(Make()))).over_tensors(
        lambda t: (t.detach() * (1 + 0.5j)).requires_grad_() if t.is_floating_point() else t
    )
    live = [t for t in sample.tensors() if t.requires_grad]

    def result(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        y = one_tensor(function(*sample.args, **sample.kwargs))
        return y.detach(), *torch.autograd.grad(y, live, torch.ones_like(y))

    try:
        wanted = result(op.reference or op.function)
    except Exception:
        raise _Nothing from None
    torch.testing.assert_close(result(op.function), wanted)


CAPABILITIES: dict[str, Callable[[Op], None]] = {
    "gradcheck": _gradcheck,
    "second order": _second_order,
    "forward mode": _forward_mode,
    "batched": _batched,
    "vmap": _vmap,
    "compile": _compile,
    "autocast": _autocast,
    "layouts": _layouts,
    "edges": _edges,
    "complex": _complex,
}


def measure(op: Op) -> Capabilities:
    """Run ``op`` in every way of :data:`CAPABILITIES`, and count what it keeps."""
    can = {name: _attempt(attempt, op) for name, attempt in CAPABILITIES.items()}
    kept, theirs = {}, op.torchs
    sample = op.benchmark(Make(torch.float32), 1 << 14)
    n = sample.args[0].numel()
    own = tuple(
        None if f is None else kept_bytes(f, sample, own=True) / n for f in (theirs, op.function)
    )
    for dtype in (torch.float32, torch.bfloat16):
        sample = op.benchmark(Make(dtype), 1 << 14)
        try:
            torchs = None if theirs is None else kept_bytes(theirs, sample) / n
        except NotImplementedError:  # not in this dtype
            torchs = None
        kept[dtype] = (torchs, kept_bytes(op.function, sample) / n)
    return Capabilities(kept, (own[0], own[1] or 0.0), can)


def _attempt(attempt: Callable[[Op], None], op: Op) -> bool | None:
    try:
        attempt(op)
    except _Nothing:
        return None
    except Exception:  # whatever it raises, it cannot do this
        return False
    return True
