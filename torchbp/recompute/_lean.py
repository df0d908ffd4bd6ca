"""lean(), lean_scope(), revert(): what a model's forward saves for backward is kept as recipes where it can be.

The model's forward runs between two hooks of its own, which put saved-tensor hooks around it. Nothing of the model
changes but that and the classes of its layers: it is copied, pickled, sharded and saved as before.
"""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchbp import swap
from torchbp.ops import _recipe
from torchbp.ops._errors import wrong
from torchbp.recompute import _graph
from torchbp.recompute._budget import Forward, Plan
from torchbp.recompute._graph import kept_or_share
from torchbp.recompute._kept import Kept, Share
from torchbp.recompute._leaves import open_scope
from torchbp.swap._hooks import remove_hooks

__all__ = ["lean", "lean_scope", "revert"]

M = TypeVar("M", bound=nn.Module)

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]


def lean(model: M, budget: float | None = None) -> M:
    """Make ``model`` keep far fewer bytes for backward; every gradient stays the same to the last bit.

    Its torch layers are converted (:func:`torchbp.convert`). In each forward, what an op wants to keep is let go where
    an activation, a normalization, a dropout, a gate, a residual sum or another cheap op made it, and is made again in
    backward. Convolutions, Linear, attention and user code need not know.

    It is inert under ``torch.no_grad``, ``torch.compile``, ``torch.func``, ``torch.jit.trace``, and inside others'
    saved-tensor hooks (a checkpoint, ``save_on_cpu``). :func:`torchbp.revert` undoes it.

    With a ``budget`` outputs of Linear, convolution and attention are let go too, the cheapest to make again for each
    byte first, until what is kept is within it. The first forward measures; the second is within the budget. Sharded
    models (FSDP) let go what is cheap alone.

    Args:
        model: Any module. Before ``fully_shard``, ``DistributedDataParallel`` and ``torch.compile``.
        budget: What may be kept: a share, up to 1, of what torch keeps, or bytes; ``None`` for what comes for free,
            about 0.6. Parameters, which stay anyway, don't count.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``budget`` is not positive.
        RuntimeError: ``model`` is sharded already.

    Warns:
        UserWarning: The budget can't be met; as much as possible is let go.

    Example:
        >>> import torch, torchbp
        >>> from torch import nn
        >>> model = torchbp.lean(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
        >>> model(torch.randn(256, 64)).sum().backward()
    """
    if budget is not None and not budget > 0:
        rule, advice = "a positive budget", "a share of what torch keeps, or bytes"
        raise ValueError(wrong("lean", rule, budget, advice))
    swap.convert(model)
    plan = None if budget is None else Plan(budget)
    hooks = _hooks_of(model)
    if hooks is not None:
        hooks.plan = plan
    else:
        hooks = _Hooks(plan)
        model.register_forward_pre_hook(hooks.enter, prepend=True)
        model.register_forward_hook(hooks.leave, always_call=True)
    return model


def revert(model: M) -> M:
    """Undo :func:`lean` and :func:`convert`: every torchbp layer of ``model`` becomes torch's again, in place.

    Layers that were built as torchbp's become torch's too.

    Args:
        model: Any module.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: ``model`` is sharded already.

    Example:
        >>> import torch, torchbp
        >>> type(torchbp.revert(torchbp.lean(torch.nn.Linear(4, 3))))
        <class 'torch.nn.modules.linear.Linear'>
    """
    swap.revert(model)
    remove_hooks(model, _is_ours)
    return model


@contextmanager
def lean_scope() -> Iterator[None]:
    """Keep recipes instead of tensors in whatever runs inside: forward, loss, and backward if you like.

    For what is not in a model's forward, or for a model that is lean in some steps only. The layers must be torchbp's:
    those of torch have no recipe, but for the cheapest.

    Warns:
        UserWarning: Tensors were kept, and none of them by a recipe.

    Example:
        >>> import torch, torchbp
        >>> import torchbp.functional as F
        >>> x, w = torch.randn(256, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
        >>> with torchbp.lean_scope():
        ...     loss = F.linear(F.gelu(x), w).sum()
        >>> loss.backward()
    """
    pack = _open(None, dist.is_available() and dist.is_initialized())
    try:
        yield
    finally:
        if pack is not None:
            _close(pack)
    if pack is not None and pack.kept and not pack.shared:
        rule = "outputs of torchbp's layers"
        advice = "convert the model first: torchbp.lean(model), or torchbp.convert(model)"
        if pack.small and not pack.large:
            rule = f"outputs of {_graph.small >> 10} KiB or more"
            advice = "smaller ones are kept: a recipe would weigh more than they do"
        rule += " among what is kept for backward"
        message = wrong("lean_scope", rule, f"none in {pack.kept} tensors", advice)
        warnings.warn(message, UserWarning, stacklevel=3)


class _Pack:
    """The pack hook of one scope, which counts what it gives, and whether it met outputs that are small, or large."""

    def __init__(self, plan: Plan | None, outer: "_Pack | None") -> None:
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
    pack: _Pack | None

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


def _open(plan: Plan | None, sharded: bool) -> _Pack | None:
    """Put our hooks on the innermost place; ``None`` where they would be refused, useless, or in somebody's way."""
    if torch.compiler.is_compiling():
        return None
    while _thread.running and _thread.running[-1].is_over():
        if (left := _thread.running.pop().pack) is not None:
            _close(left)
    if (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or not _autograd._saved_tensors_hooks_is_enabled()
    ):
        return None
    outer, _ = _autograd._top_saved_tensors_default_hooks(False) or (None, None)
    if outer is None:
        open_scope()
    elif type(outer) is not _Pack or outer.plan is not None or plan is None:
        return (
            None  # others' come first; of ours the outermost, but for a budget inside what has none
        )
    pack = _Pack(plan, outer)
    _autograd._push_saved_tensors_default_hooks(pack, _unpack)
    with _count:
        _recipe.asked += 1
    _recipe.sharded = sharded
    return pack


def _close(pack: _Pack, whole: bool = False) -> None:
    """Take our hooks off; ``whole``: what ran under them came to its end."""
    _autograd._pop_saved_tensors_default_hooks()
    with _count:
        _recipe.asked -= 1
    if pack.outer is not None:
        pack.outer.kept += pack.kept
        pack.outer.shared += pack.shared
    if whole and pack.forward is not None and torch.is_grad_enabled():
        pack.forward.end()


class _Hooks:
    """The two hooks around a model's forward. They hold nothing of it, so they are copied and pickled with it."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan

    def enter(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        sharded = False
        if dist.is_available() and dist.is_initialized():
            sharded = any(isinstance(m, FSDPModule) for m in module.modules())
        pack = _open(self.plan, sharded)
        _thread.running.append(_Running(id(module), sys._getframe(1), pack))

    def leave(self, module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        if torch.compiler.is_compiling() or all(r.module != id(module) for r in _thread.running):
            return
        while True:  # what it ran inside, and was left without a word, is over too
            its, _, pack = _thread.running.pop()
            if pack is not None:
                _close(pack, whole=output is not None)
            if its == id(module):
                return


def _is_ours(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), _Hooks)


def _hooks_of(model: nn.Module) -> Any:
    """Return the hooks that lean has put on ``model`` itself, if any."""
    found = (h for h in model._forward_pre_hooks.values() if _is_ours(h))
    return next((getattr(h, "__self__", None) for h in found), None)
