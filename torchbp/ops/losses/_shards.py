"""A vocabulary that is sharded over the processes of a group: rank r holds the classes behind those of rank r - 1."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Shard"]


class Shard:
    """The classes that this process holds; without a group, all of them.

    Attributes:
        group: The processes that share the vocabulary.
        classes: How many classes are here.
        first: The first of them.
        all_classes: How many there are in all.
    """

    def __init__(self, classes: int, group: "ProcessGroup | None", device: torch.device) -> None:
        self.group, self.classes, self.first, self.all_classes = group, classes, 0, classes
        if group is not None:
            from torch import distributed

            sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
            sizes[group.rank()] = classes
            distributed.all_reduce(sizes, group=group)
            self.first = int(sizes[: group.rank()].sum())
            self.all_classes = int(sizes.sum())

    def sum(self, t: Tensor) -> Tensor:
        """Return the sum of ``t`` over the group; it may be written into ``t``."""
        return self._reduced(t, "SUM")

    def _reduced(self, t: Tensor, how: str) -> Tensor:
        if self.group is not None:
            from torch import distributed

            distributed.all_reduce(t, getattr(distributed.ReduceOp, how), group=self.group)
        return t

    def total_weight(self, w: Tensor | None) -> Tensor | int:
        """Return Σ_c w_c over all classes."""
        return self.all_classes if w is None else self.sum(w.sum())

    def where_largest(self, largest: Tensor, index: Tensor) -> Tensor:
        """Return the class of the largest logit of all, from the largest here and its index here."""
        if self.group is None:
            return index
        of_all = self._reduced(largest.clone(), "MAX")
        known = (index + self.first).masked_fill(largest != of_all, self.all_classes)
        return self._reduced(known, "MIN")

    def combine(self, log_partition: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return log Σ exp over all classes, and the sum of the scores, from those of the classes here."""
        if self.group is None:
            return log_partition, score
        largest = self._reduced(log_partition.clone(), "MAX")
        sums = self.sum(torch.stack([(log_partition - largest).exp_(), score]))
        return largest + sums[0].log_(), sums[1]
