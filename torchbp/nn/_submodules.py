"""Makes ``torchbp.nn.utils.rnn`` and its like importable: each is the module of that name below ``torch.nn``.

Without this, ``import torchbp.nn.utils.rnn`` would run torch's file a second time, under a second name, with classes
that are not torch's. ``torchbp.nn.functional`` is ``torchbp.functional``.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__: list[str] = []

_OURS, _TORCHS = "torchbp.nn.", "torch.nn."
_REPLACED = {"torchbp.nn.functional": "torchbp.functional"}


class _Alias(Loader):
    """Loads nothing: hands over the module that is there already, and leaves its own spec on it."""

    def __init__(self, name: str) -> None:
        self._module = import_module(name)
        self._spec = self._module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Submodules(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_OURS) or fullname.startswith(f"{_OURS}_"):
            return None
        original = _REPLACED.get(fullname, _TORCHS + fullname.removeprefix(_OURS))
        try:
            return ModuleSpec(fullname, _Alias(original)) if find_spec(original) else None
        except ModuleNotFoundError:  # of a parent
            return None


sys.meta_path.insert(0, _Submodules())
