"""Which layer of a model runs, and its buffers put back behind it: for memory(), which leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["RunningLayer"]


class RunningLayer:
    """Which module is running: its name in the model, or where there is none, its class's.

    Args:
        model: Whose modules have names; ``None`` for a function.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._names = {} if model is None else {id(m): n for n, m in model.named_modules()}
        self._stack: list[str] = []
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        self._seen: set[nn.Module] = set()

    def name(self) -> str:
        """Return the name of the innermost module that is running, or ``""``."""
        return self._stack[-1] if self._stack else ""

    def _enter(self, module: nn.Module, _args: object) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))
        if module not in self._seen:
            self._seen.add(module)
            with _disable_current_modes():
                self._buffers += [
                    (module._buffers, name, b, b.detach().clone())
                    for name, b in module.named_buffers(recurse=False)
                ]

    def _leave(self, _module: nn.Module, _args: object, _output: object) -> None:
        self._stack.pop()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note which modules run inside; put their buffers (running statistics, say) back behind it."""
        handles = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for buffers, name, buffer, before in self._buffers:
                buffers[name] = buffer
                if not torch.equal(buffer, before):
                    buffer.data.copy_(before)
