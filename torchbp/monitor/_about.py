"""What a run was made with, so that runs can be told apart: model, optimizer, activation, ..."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["about"]

_ACTIVATIONS = tuple(
    kind
    for name in nn.modules.activation.__all__
    if (kind := getattr(nn, name)) not in {nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax}
)
# Of an optimizer's settings those that runs are compared by; a group's own are those of the first.
_SETTINGS = ("lr", "momentum", "weight_decay", "betas", "eps")


def about(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, bool | float | str]:
    """Return it by name.

    Args:
        model: The model. Its activation is the commonest of its modules'; one that is called as a
            function is not known.
        optimizers: The optimizers; numbers are those of the first group of the first.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
        >>> about(model, [torch.optim.SGD(model.parameters(), lr=0.1)])["activation"]
        'Tanh'
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    found: dict[str, bool | float | str] = {
        "model": type(inner).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    kinds = Counter(type(m).__name__ for m in model.modules() if isinstance(m, _ACTIVATIONS))
    if kinds:
        found["activation"] = kinds.most_common(1)[0][0]
    if optimizers:
        found["optimizer"] = ", ".join(type(o).__name__ for o in optimizers)
        group = optimizers[0].param_groups[0]
        for name in _SETTINGS:
            value = group.get(name)
            if isinstance(value, tuple):
                found[name] = ", ".join(f"{v:g}" for v in value)
            elif isinstance(value, int | float | torch.Tensor) and value is not None:
                found[name] = float(value)
    return found
