"""Takes hooks off a model by who put them there, not by handles: handles are lost in a copy or a pickle."""

from collections.abc import Callable

from torch import nn

__all__ = ["remove_hooks"]


def remove_hooks(model: nn.Module, ours: Callable[[object], bool]) -> None:
    """Remove the hooks before and after the forward of ``model`` and its parts for which ``ours`` is true."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for key in [k for k, hook in hooks.items() if ours(hook)]:
                del hooks[key]
                flags.pop(key, None)
