"""What the ranks of a spread model have in common: the sums over them."""

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._governor import Vote
from torchbp.monitor._harvest import Sums, reduced

__all__ = ["Shared"]


class Shared:
    """What ranks have in common.

    Attributes:
        ranks: Whether the model is spread over several, by DDP or as DTensors.
    """

    def __init__(self, model: nn.Module, catalogue: Catalogue) -> None:
        parameters = [p for _, p in catalogue.alive()]
        sharded = [isinstance(p, DTensor) for p in parameters]
        spread = isinstance(model, DistributedDataParallel) or any(sharded)
        self.ranks = spread and torch.distributed.get_world_size() > 1
        if not self.ranks:
            return
        self._whole = not any(sharded)
        first = torch.distributed.get_rank() == 0
        self._mine = np.array([_adds(p) if isinstance(p, DTensor) else first for p in parameters])
        backend = torch.distributed.get_backend()
        self._device = parameters[0].device if "nccl" in backend else torch.device("cpu")

    def add(self, rows: list[Sums], layers: int, vote: Vote) -> Vote:
        """Sum over the ranks, but for what a rank has logged alone; return the sum of their votes."""
        read = [sums for sums in rows if sums.rows[0].backwards]
        if not read:  # on no rank
            return vote
        return Vote(*reduced(read, self._mine, layers, self._device, vote))

    @property
    def count(self) -> int:
        """How many vote."""
        return torch.distributed.get_world_size() if self.ranks else 1

    def without_shards(self, rows: list[Sums]) -> list[Sums]:
        """Drop what this rank has only a part of."""
        for sums in rows:
            sums.layers.clear()
            sums.host.pop("local_square", None)
            if not self._whole:
                sums.parameters.clear()
        return rows


def _adds(parameter: DTensor) -> bool:
    """Whether this rank adds its shard: of replicas only the first does."""
    coordinate = parameter.device_mesh.get_coordinate()
    places = zip(parameter.placements, coordinate or (), strict=False)
    return all(at == 0 for placement, at in places if isinstance(placement, Replicate))
