"""The operations that a call makes: where they are from, and the dtypes that they give."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchbp.verify.tensors import tensors_in

__all__ = ["Operations"]


class Operations(TorchDispatchMode):
    """Collects the namespaces of the operations called under it, and the dtypes of their results."""

    only_watches = True  # torchbp runs under it as without

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.namespaces.add(func.namespace)
        self.dtypes.update(t.dtype for t in tensors_in(result))
        return result
