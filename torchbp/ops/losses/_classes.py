"""Class dimension, class weights and class indices, for the losses of ``(N, C, *)`` inputs."""

import torch
from torch import Tensor

from torchbp.ops._function import is_half, visible

__all__ = ["all_count", "along_classes", "class_dim", "counted", "positions"]


def class_dim(x: Tensor) -> int:
    """Return the dimension of the classes: 1 of ``(N, C, *)``, 0 of ``(C,)``."""
    return 1 if x.dim() > 1 else 0


def positions(x: Tensor) -> int:
    """Return the number of positions in ``x``, each with one value a class."""
    return x.numel() // max(1, x.shape[class_dim(x)])


def along_classes(w: Tensor, x: Tensor) -> Tensor:
    """Return w ``(C,)`` as ``(C, 1, ...)``, which meets ``x`` in its class dimension."""
    return w.view(-1, *(1 for _ in x.shape[class_dim(x) + 1 :]))


def all_count(target: Tensor, ignored: int) -> bool:
    """Whether no position is ignored, looked at where that neither waits for a device nor breaks a trace."""
    return visible(target) and not (target == ignored).any()


def counted(
    like: Tensor, target: Tensor, w: Tensor | None, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, of the shape of ``target``: a safe index, and w_t or 0 where ignored; and the sum of the latter.

    The weights have the dtype of ``like``, in half precision float32.
    """
    counts = target != ignored
    index = (target * counts).long()
    dtype = torch.float32 if is_half(like) else like.dtype
    w_t = counts.to(dtype) if w is None else torch.where(counts, w[index].to(dtype), 0)
    return index, w_t, w_t.sum()
