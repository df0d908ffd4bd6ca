"""A Module under test: a copy of it, and what a call of it may leave behind."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchbp.verify.generators import is_generator
from torchbp.verify.held import held
from torchbp.verify.tensors import is_dense

__all__ = ["LEAVES", "copied", "leaves_among", "left_alone"]

LEAVES = "leaves that the function holds, with a name each"  # in the memo of a case


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy, of what was computed from parameters and is kept as an attribute too; generators are shared.

    `torch.nn.utils.weight_norm` keeps the weight of the last call so, which ``deepcopy`` refuses.

    Raises:
        TypeError: The Module cannot be called with tensors in the place of its parameters.
    """
    if isinstance(module, (torch.jit.ScriptModule, nn.DataParallel, DistributedDataParallel)):
        wraps = not isinstance(module, torch.jit.ScriptModule)
        raise TypeError(
            f"gradcheck: expected a Module whose parameters can be replaced, got {type(module).__name__}; "
            + ("pass its .module" if wraps else "pass the Module that it was made of")
        )
    parts = list(module.modules())
    if any(torch.nn.parameter.is_lazy(p) for m in parts for p in _state_of(m)):
        raise ValueError(
            "gradcheck: expected initialized parameters, got a lazy Module; call it once before"
        )
    attributes = (x for part in parts for x in vars(part).values() if isinstance(x, Tensor))
    memo: dict[int, Any] = {id(x): x for x in held(module) if is_generator(x)}
    memo |= {id(x): x.detach().clone() for x in attributes if x.grad_fn is not None}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"gradcheck: expected a Module that copy.deepcopy takes, got {type(module).__name__} "
            f"({type(error).__name__}: {error}); pass a function of its tensors"
        ) from error


def _state_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def leaves_among(reached: Iterable[Any]) -> list[tuple[str, Tensor]]:
    """Return the parameters of Modules among these, and what else a gradient may be added to."""
    reached = list(reached)
    found: dict[int, tuple[str, Tensor]] = {}
    for x in reached:
        for name, p in x.named_parameters() if isinstance(x, nn.Module) else ():
            found.setdefault(id(p), (f"parameter {name} of {type(x).__name__}", p))
    for x in reached:
        if isinstance(x, Tensor) and x.is_leaf:
            found.setdefault(id(x), ("a tensor that the function holds", x))
    return list(found.values())


@contextmanager
def left_alone(reached: Iterable[Any]) -> Iterator[None]:
    """Put the buffers and modes of Modules among these back as they were: of a BatchNorm in a lambda.

    So is every ``.grad``, of parameters and of other tensors among these.
    """
    reached = list(reached)
    parts = {part: None for x in reached if isinstance(x, nn.Module) for part in x.modules()}
    was = [(part, part.training, dict(part._buffers)) for part in parts]  # noqa: SLF001
    kept = [b for _, _, buffers in was for b in buffers.values() if b is not None]
    dense = [b for b in kept if not torch.nn.parameter.is_lazy(b) and is_dense(b) and not b.is_meta]
    leaves = [(p, p.grad) for _, p in leaves_among(reached)]
    dense += [g for _, g in leaves if g is not None and is_dense(g) and not g.is_meta]
    values = [(b, b.detach().clone()) for b in dense]
    try:
        yield
    finally:
        for part, training, buffers in was:
            part.training = training
            part._buffers.update(buffers)  # noqa: SLF001
        for p, grad in leaves:
            p.grad = grad
        with torch.no_grad():
            for buffer, value in values:  # batch_norm writes without a new version
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
