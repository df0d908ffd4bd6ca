"""lean(), lean_scope(), revert(): what a model's forward saves for backward is kept as recipes where it can be.

The model's forward runs between two hooks of its own, which put saved-tensor hooks around it (_scope.py). Nothing of
the model changes but that and the classes of its layers: it is copied, pickled, sharded and saved as before.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from torchbp import swap
from torchbp.ops._errors import wrong
from torchbp.recompute import _graph
from torchbp.recompute._budget import Plan
from torchbp.recompute._scope import Hooks, close_pack, open_pack
from torchbp.swap._hooks import remove_hooks

__all__ = ["lean", "lean_scope", "revert"]

M = TypeVar("M", bound=nn.Module)


def lean(model: M, budget: float | None = None) -> M:
    """Make ``model`` keep far fewer bytes for backward; every gradient stays the same to the last bit.

    Its torch layers are converted (:func:`torchbp.convert`). In each forward, what an op wants to keep is let go where
    an activation, a normalization, a dropout, a gate, a residual sum or another cheap op made it, and is made again in
    backward. Convolutions, Linear, attention and user code need not know.

    It is inert under ``torch.no_grad``, ``torch.compile``, ``torch.func``, ``torch.jit.trace``, and inside others'
    saved-tensor hooks (a checkpoint, ``save_on_cpu``). :func:`torchbp.revert` undoes it.

    With a ``budget`` outputs of Linear, convolution and attention are let go too, the cheapest to make again for each
    byte first, until what is kept is within it. The first forward measures; the second is within the budget,
    under autocast perhaps only the fourth. Sharded
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
        hooks = Hooks(plan)
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
    pack = open_pack(None, dist.is_available() and dist.is_initialized())
    try:
        yield
    finally:
        if pack is not None:
            close_pack(pack)
    if pack is not None and pack.kept and not pack.shared:
        rule = "outputs of torchbp's layers"
        advice = "convert the model first: torchbp.lean(model), or torchbp.convert(model)"
        if pack.small and not pack.large:
            rule = f"outputs of {_graph.small >> 10} KiB or more"
            advice = "smaller ones are kept: a recipe would weigh more than they do"
        rule += " among what is kept for backward"
        message = wrong("lean_scope", rule, f"none in {pack.kept} tensors", advice)
        warnings.warn(message, UserWarning, stacklevel=3)


def _is_ours(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), Hooks)


def _hooks_of(model: nn.Module) -> Any:
    """Return the hooks that lean has put on ``model`` itself, if any."""
    found = (h for h in model._forward_pre_hooks.values() if _is_ours(h))
    return next((getattr(h, "__self__", None) for h in found), None)
