"""Where the hooks stand under which tensors are packed: put in place, and taken off, whatever happens in between.

They are a thread's own. Others' saved-tensor hooks come first. Of ours, one inside the other, the outermost has all,
but that a budget is kept inside what has none.
"""

import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchbp.ops import _recipe
from torchbp.recompute import _graph
from torchbp.recompute._budget import Forward, Plan
from torchbp.recompute._graph import kept_or_share
from torchbp.recompute._kept import Kept, Share
from torchbp.recompute._leaves import note_versions

__all__ = ["Hooks", "Pack", "close_pack", "open_pack"]

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


class Pack:
    """The pack hook of one scope, which counts what it gives, and whether it met outputs that are small, or large."""

    def __init__(self, plan: Plan | None, outer: "Pack | None") -> None:
        self.plan, self.outer = plan, outer
        self.forward = None if plan is None else Forward(plan)
        self.kept = self.shared = 0
        self.small = self.large = False

    def __call__(self, t: Tensor) -> Kept | Share:
        item = kept_or_share(t, self.forward)
        if type(item) is Share:
            self.shared += 1
        else:
            self.kept += 1
            if not self.large and type(t) is Tensor and t.grad_fn is not None:
                self.large = t.numel() * t.element_size() >= _graph.small
                self.small = not self.large
        return item


def _unpack(item: Kept | Share) -> Tensor:
    return item.open()


class _Running(NamedTuple):
    """A forward that was entered.

    Attributes:
        module: Whose, by identity.
        frame: That runs it.
        pack: What was put in place for it; ``None`` where nothing was.
    """

    module: int
    frame: FrameType
    pack: Pack | None

    def is_over(self) -> bool:
        """Whether it was left without a word, as by Ctrl-C: torch calls no hook then."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is None


class _Thread(threading.local):
    """Of this thread: the forwards that run, outermost first."""

    def __init__(self) -> None:
        self.running: list[_Running] = []


_thread = _Thread()
_count = threading.Lock()


def open_pack(plan: Plan | None, sharded: bool) -> Pack | None:
    """Put our hooks on the innermost place; ``None`` where they would be refused, useless, or in somebody's way.

    Args:
        plan: Of a budget.
        sharded: Whether parameters may be freed between forward and backward.
    """
    if torch.compiler.is_compiling():
        return None
    while _thread.running and _thread.running[-1].is_over():
        if (left := _thread.running.pop().pack) is not None:
            close_pack(left)
    if (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or not _autograd._saved_tensors_hooks_is_enabled()
    ):
        return None
    outer, _ = _autograd._top_saved_tensors_default_hooks(False) or (None, None)
    if outer is None:
        note_versions()
        _recipe.sharded = sharded
    elif type(outer) is not Pack or outer.plan is not None or plan is None:
        return None
    pack = Pack(plan, outer)
    _autograd._push_saved_tensors_default_hooks(pack, _unpack)
    with _count:
        _recipe.asked += 1
    return pack


def close_pack(pack: Pack, whole: bool = False) -> None:
    """Take our hooks off.

    Args:
        pack: Of which :func:`open_pack` was the last.
        whole: Whether what ran under them came to its end.
    """
    _autograd._pop_saved_tensors_default_hooks()
    with _count:
        _recipe.asked -= 1
    if pack.outer is not None:
        pack.outer.kept += pack.kept
        pack.outer.shared += pack.shared
    if whole and pack.forward is not None and torch.is_grad_enabled():
        pack.forward.end()


class Hooks:
    """The two hooks around a model's forward. They hold nothing of it, so they are copied and pickled with it.

    Args:
        plan: Of a budget.
    """

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan

    def enter(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Open, before the forward."""
        if torch.compiler.is_compiling():
            return
        sharded = False
        if dist.is_available() and dist.is_initialized():
            sharded = any(isinstance(m, FSDPModule) for m in module.modules())
        pack = open_pack(self.plan, sharded)
        _thread.running.append(_Running(id(module), sys._getframe(1), pack))

    def leave(self, module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        """Close, behind it; no output: it failed."""
        if torch.compiler.is_compiling() or all(r.module != id(module) for r in _thread.running):
            return
        while True:  # what it ran inside, and was left without a word, is over too
            its, _, pack = _thread.running.pop()
            if pack is not None:
                close_pack(pack, whole=output is not None)
            if its == id(module):
                return
