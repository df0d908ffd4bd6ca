"""Tensors that pretend to be on a GPU, with their values: an operation on two devices raises, and a wait is noted.

They are ordinary tensors of the CPU, known by their storage. Torch's own zeros, made deep inside a backward or forward
mode, are taken for the CPU's: what is run here should do without.
"""

import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["Pretending", "moved", "pretend"]

GPU = torch.device("cuda:0")
_there: dict[int, weakref.finalize] = {}
_READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select"}
_TAKES_BOTH = {"index", "index_put", "index_put_", "_index_put_impl_", "copy_", "_to_copy"}


def _is_there(t: object) -> bool:
    return isinstance(t, Tensor) and t.untyped_storage()._cdata in _there


def _place(t: Tensor, there: bool = True) -> Tensor:
    storage = t.untyped_storage()
    key = storage._cdata
    if there and key not in _there:
        _there[key] = weakref.finalize(storage, _there.pop, key, None)
        _there[key].atexit = False
    elif not there and key in _there:
        _there.pop(key).detach()
    return t


def moved(values):
    """Return a nested structure with copies of its tensors that are there; leaves stay leaves."""

    def move(t):
        return _place(t.detach().clone()).requires_grad_(t.requires_grad)

    return tree_map(lambda t: move(t) if isinstance(t, Tensor) else t, values)


class _Dispatch(TorchDispatchMode):
    only_watches = True  # torchbp runs under it as without

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if _is_there(t)]
        here = [t for t in tensors if t.dim() and not _is_there(t)]
        if there and here and name not in _TAKES_BOTH:
            message = f"Expected all tensors to be on the same device, found two in {name}"
            raise RuntimeError(message)
        if there and (name in _READS or (name == "index" and here)):
            self.waits.append(f"{name} in {_caller()}")
        out = func(*args, **(kwargs or {}))
        if there and name != "copy_":
            for t in tree_iter(out):
                if isinstance(t, Tensor):
                    _place(t)
        return out


def _caller() -> str:
    frames = [f for f in traceback.extract_stack() if "/torchbp/" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1])


class Pretending(TorchFunctionMode):
    """What is asked of a tensor's device, and what moves it. It is off in hooks of a backward: enter it there, too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        t = args[0] if args and isinstance(args[0], Tensor) else None
        there = _is_there(t)
        if name == "__get__" and there:
            said = {"device": GPU, "is_cuda": True, "is_cpu": False}
            asked = getattr(getattr(func, "__self__", None), "__name__", "")
            return said[asked] if asked in said else func(*args, **kwargs)
        if name == "numpy" and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in {"cpu", "cuda"} and t is not None:
            return self._sent(t, t, name == "cuda")
        if name == "to" and t is not None:
            return self._to(func, t, *args[1:], **kwargs)
        target = kwargs.get("device")
        if target is None or torch.device(target).type not in {"cpu", "cuda"}:
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return self._sent(t, func(*args, **kwargs), torch.device(target).type == "cuda")

    def _to(self, func, t, *args, **kwargs):
        target, rest = kwargs.pop("device", None), []
        for value in (*args, *([kwargs.pop("other")] if "other" in kwargs else [])):
            if isinstance(value, (str, torch.device)):
                target = value
            elif isinstance(value, Tensor):
                target = GPU if _is_there(value) else "cpu"
                rest.append(value.dtype)
            else:
                rest.append(value)
        if target is not None and torch.device(target).type == "meta":
            return func(t, "meta", *rest, **kwargs)
        out = func(t, *rest, **kwargs) if rest or kwargs else t
        there = _is_there(t) if target is None else torch.device(target).type == "cuda"
        return self._sent(t, out, there)

    def _sent(self, t, out, there):
        if not isinstance(out, Tensor) or _is_there(out) == there:
            return out
        shares = t is not None and out.untyped_storage()._cdata == t.untyped_storage()._cdata
        return _place(out.clone() if shares else out, there)


@contextmanager
def pretend() -> Iterator[list[str]]:
    """Pretend inside; yields what was waited for, and where."""
    waits: list[str] = []
    with _Dispatch(waits), Pretending():
        yield waits
