"""Which layers and parameters are watched. Holds nothing alive."""

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn

from torchbp.monitor._diagnosis import Layers

__all__ = ["Catalogue"]

# What wrappers put into names: torch.compile, DDP, activation checkpointing, FSDP1.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class Catalogue:
    """The layers of a model: the modules that own a trainable parameter themselves.

    Args:
        model: The model.
        patterns: Shell patterns of layer names; None for all.

    Attributes:
        parameters: Weak references, in the order of ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] | None) -> None:
        self._names: list[str] = []
        self._kinds: list[str] = []
        self._weighted: list[bool] = []
        self._places: dict[int, int] = {}
        self._modules: list[weakref.ref[nn.Module]] = []
        self._owner: list[int] = []
        self._parameter_names: list[str] = []
        self.parameters: list[weakref.ref[Tensor]] = []
        self._sizes: list[int] = []
        self._matrices: list[bool] = []
        self._ran: dict[int, None] = {}
        self._versions: dict[int, int] = {}
        self._patterns = patterns
        seen: set[int] = set()
        for path, name, module, own in _learning(model, patterns):
            place = len(self._names)
            self._names.append(name)
            self._kinds.append(type(module).__name__)
            self._weighted.append(any(p.ndim >= 2 for p in own.values()))
            self._modules.append(weakref.ref(module))
            self._places[id(module)] = place
            for key, parameter in own.items():
                if id(parameter) not in seen:  # tied weights count where they stand first
                    seen.add(id(parameter))
                    self._owner.append(place)
                    self._sizes.append(parameter.numel() * (1 + parameter.is_complex()))
                    self._matrices.append(parameter.ndim >= 2)
                    self._parameter_names.append(f"{path}.{key}".lstrip("."))
                    self.parameters.append(weakref.ref(parameter))
        if not self._names:
            said = "none" if patterns is None else f"none that matches {list(patterns)}"
            message = (
                f"watch: expected a model with trainable layers, got {said} in "
                f"{type(model).__name__}; set requires_grad, or give other layers"
            )
            raise ValueError(message)

    def __len__(self) -> int:
        return len(self._names)

    def alive(self) -> list[tuple[int, Tensor]]:
        """Return the parameters that still exist, with their indices."""
        return [(i, p) for i, ref in enumerate(self.parameters) if (p := ref()) is not None]

    def place(self, module: nn.Module) -> int | None:
        """Return the layer's index by registration; None for a module that is no layer."""
        place = self._places.get(id(module))
        return place if place is not None and self._modules[place]() is module else None

    def note_run(self, place: int) -> None:
        """Remember that the layer runs now."""
        self._ran.setdefault(place)

    def frozen(self) -> frozenset[int]:
        """Return the layers, by registration, that learn no more: none of their parameters requires grad."""
        learning = {self._owner[i] for i, parameter in self.alive() if parameter.requires_grad}
        return frozenset(self._owner) - learning

    def unowned(self, owned: Collection[int]) -> frozenset[int]:
        """Return the layers, by registration, whose parameters no optimizer has, as they were when first asked.

        Args:
            owned: Indices of the parameters that an optimizer has; without any nothing is known.
        """
        if not owned or len(owned) == len(self.parameters):
            return frozenset()
        learning = [(i, p) for i, p in self.alive() if p.requires_grad]
        others = {i: p._version for i, p in learning if i not in owned}  # noqa: SLF001
        still = {i for i, version in others.items() if self._versions.get(i) == version}
        self._versions = others | self._versions
        moving = {self._owner[i] for i, _ in learning if i not in still}
        return frozenset(self._owner[i] for i in still) - moving

    def missing(self, model: nn.Module) -> list[str]:
        """Return the names of layers that have parameters that require grad since."""
        known = {id(parameter) for _, parameter in self.alive()}
        layers = _learning(model, self._patterns)
        return [name for _, name, _, own in layers if any(id(p) not in known for p in own.values())]

    def layers(self) -> tuple[Layers, np.ndarray, np.ndarray]:
        """Return the layers as they ran, and the orders of layers and of parameters.

        A layer that has not run is put behind the one registered before it.
        """
        order = list(self._ran)
        for place in range(len(self._names)):
            if place not in self._ran:
                order.insert(order.index(place - 1) + 1 if place else 0, place)
        rank = np.argsort(order)
        owners = rank[np.array(self._owner, np.int64)]
        columns = np.argsort(owners, kind="stable")
        layers = Layers(
            names=tuple(self._names[i] for i in order),
            kinds=tuple(self._kinds[i] for i in order),
            weighted=np.array([self._weighted[i] for i in order]),
            parameters=tuple(self._parameter_names[i] for i in columns),
            owner=owners[columns],
            sizes=np.array(self._sizes, np.float64)[columns],
            matrices=np.array(self._matrices)[columns],
        )
        return layers, np.array(order), columns


def _learning(
    model: nn.Module, patterns: Sequence[str] | None
) -> Iterator[tuple[str, str, nn.Module, Mapping[str, Tensor]]]:
    """Yield the layers to watch: path without wrappers, name, module, and the parameters that require grad."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    for path, module in model.named_modules():
        own = {k: p for k, p in module.named_parameters(recurse=False) if p.requires_grad}
        plain = _plain(path, wrapped)
        name = plain or type(module).__name__
        if own and _matches(name, patterns):
            yield plain, name, module, own


def _plain(path: str, wrapped: bool) -> str:
    parts = path.split(".")
    if wrapped and parts[0] == "module":
        parts = parts[1:]
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
