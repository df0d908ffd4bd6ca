"""Which memory is alive: every storage that an op makes is noted as it is made, and forgotten as it is freed.

Storages are counted, not tensors: views share one. What is not made by an op of torch's (a kernel's own workspace) is
not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Live", "Storage", "storages"]


@dataclass(frozen=True)
class Storage:
    """A storage that an op made.

    Attributes:
        layer: What :class:`Live`'s ``where`` said as it was made.
        op: Name of the op, ``addmm`` say.
        nbytes: Its size.
    """

    layer: str
    op: str
    nbytes: int


class Live(TorchDispatchMode):
    """Notes the storages that ops make while it is entered.

    Args:
        where: Says which layer is running.
        apart: Tensors whose storages do not count: parameters and inputs.

    Attributes:
        now: Bytes alive.
        peak: The most bytes that were alive at once.
        flops: Floating-point operations of matrix products, convolutions and attention.
    """

    only_watches = True  # torchbp runs under it as without

    def __init__(self, where: Callable[[], str], apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._where, self._found = where, dict[int, Storage]()
        self._ends: dict[int, weakref.finalize[..., Any]] = {}
        self._apart = {key for t in apart for key, _ in storages(t)}

    def alive(self) -> list[tuple[int, Storage]]:
        """Return what is alive, oldest first, with each storage's address."""
        return list(self._found.items())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run the op, and note its outputs."""
        given = {key for key, _ in _storages_of((args, kwargs))}  # an output may be a view of them
        output = func(*args, **(kwargs or {}))
        # Not by torch's FlopCounterMode: its hooks on modules forbid autograd.grad.
        formula = _FLOPS.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        for key, storage in _storages_of(output):
            if not (key in given or key in self._found or key in self._apart):
                self._note(key, storage, func)
        self.peak = max(self.peak, self.now)
        return output

    def _note(self, key: int, storage: Any, func: Any) -> None:
        op = getattr(func, "overloadpacket", func).__name__
        found = Storage(self._where(), op, storage.nbytes())
        self._found[key] = found
        self.now += found.nbytes
        self._ends[key] = weakref.finalize(storage, self._forget, key)
        self._ends[key].atexit = False

    def _forget(self, key: int) -> None:
        del self._ends[key]
        self.now -= self._found.pop(key).nbytes

    def __exit__(self, *error: Any) -> None:
        """Stop, and stop waiting for what is alive still: a storage that stays would hold this, and ``where``."""
        super().__exit__(*error)
        for end in self._ends.values():
            end.detach()
        self._ends.clear()


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # which torch's formulas leave out
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    getattr(torch.ops.aten, _ON_CPU): _attention_forward,
    getattr(torch.ops.aten, f"{_ON_CPU}_backward"): _attention_backward,
}


def _storages_of(values: object) -> Iterator[tuple[int, Any]]:
    for t in tree_iter(values):
        if isinstance(t, Tensor):
            yield from storages(t)


def storages(t: Tensor) -> list[tuple[int, Any]]:
    """Return the storages of a tensor with their addresses: one, or those of its parts, or none."""
    try:
        if hasattr(t, "__tensor_flatten__"):
            names, _ = t.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            return [pair for name in names for pair in storages(getattr(t, name))]
        storage = t.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse, opaque
        return []
    return [(storage._cdata, storage)]
