"""Measures what the quantities of parameters ask for, of all parameters at once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._norms import norms
from torchbp.monitor._quantity import Quantity
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Pieces, Row

__all__ = ["Group", "Meter", "local"]

# Indices of parameters on one device, and what is measured of them.
Group = tuple[tuple[int, ...], Bundle]


class Meter:
    """Puts into rows what is measured of gradients, parameters and updates.

    Args:
        catalogue: The parameters.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._measures = {
            at: [q for q in all_quantities().values() if q.at == at]
            for at in ("gradient", "stepped", "weight", "update")
        }
        self._like: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Bundle] = {}

    def gradients(self, members: Iterable[int] | None = None) -> list[Group]:
        """Return the gradients that are there, by device; of ``members`` only, if given."""
        found = [
            (index, gradient)
            for index, reference in enumerate(self._catalogue.parameters)
            if (parameter := reference()) is not None and (gradient := parameter.grad) is not None
        ]
        if members is not None:
            chosen = set(members)
            found = [(index, gradient) for index, gradient in found if index in chosen]
        indices, tensors = [index for index, _ in found], [gradient for _, gradient in found]
        return self._groups(indices, tensors)

    def parameters(self, members: set[int]) -> list[Group]:
        """Return the parameters whose ids are ``members``, by device."""
        alive = [(i, p) for i, p in self._catalogue.alive() if id(p) in members]
        return self._groups([i for i, _ in alive], [p for _, p in alive])

    def _groups(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> list[Group]:
        if not tensors:
            return []
        key = tuple(indices), tensors[0].dtype, tensors[0].device
        like = self._like.get(key)
        if like is not None:  # small dense ones on the CPU, as last time
            return [(key[0], Bundle(tensors, like))]
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for index, tensor in zip(indices, map(local, tensors), strict=True):
            if tensor.numel():  # a rank's shard may be empty
                by_device.setdefault(tensor.device, []).append((index, tensor))
        groups = [
            (tuple(i for i, _ in found), Bundle([t for _, t in found]))
            for found in by_device.values()
        ]
        if len(groups) == 1 and groups[0][1].starts is not None and all(map(_is_plain, tensors)):
            self._like[key] = Bundle([], groups[0][1])
        return groups

    def norms(self) -> Pieces:
        """Return the norms of the gradients as they are."""
        with torch.no_grad():
            return [(indices, norms(bundle)) for indices, bundle in self.gradients()]

    def measure(self, row: Row, at: str, groups: list[Group]) -> None:
        """Measure what is measured at ``at``, beside what another optimizer of the step has left."""
        with torch.no_grad():
            for quantity in self._measures[at]:
                if _is_due(quantity, row):
                    assert quantity.measure is not None
                    pieces = row.parameters.setdefault(quantity.name, [])
                    pieces += [(i, quantity.measure(bundle)) for i, bundle in groups]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, and the values of a sparse gradient."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    return tensor.detach()


def _is_plain(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) and tensor.layout == torch.strided


def _is_due(quantity: Quantity, row: Row) -> bool:
    return {"every step": True, "sampled": row.sampled, "rarely": row.rare}[quantity.often]
