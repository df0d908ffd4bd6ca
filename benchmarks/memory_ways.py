"""The ways of keeping less that memory.py holds against each other: each changes a model, which trains as before."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import LanguageModel, LlamaBlock, ResidualBlock, TransformerBlock, UNet
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torchbp
import torchbp.functional as bp

__all__ = ["COMPILED", "WAYS", "WORDS_WAYS"]

Way = Callable[[Any], nn.Module]
BUDGETS = (0.5, 0.4, 0.3, 0.2, 0.1)
COMPILED = "torch.compile"
aten = torch.ops.aten

# What a selective checkpoint keeps: the outputs that are dear to make again.
_KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
    aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
}


def _policy(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(model: nn.Module, selective: bool) -> nn.Module:
    """Put a checkpoint around each block of ``model``."""
    more: dict[str, Any] = {}
    if selective:
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    blocks = [
        m
        for m in model.modules()
        if isinstance(m, (TransformerBlock, LlamaBlock, ResidualBlock, nn.LSTM))
    ]
    if isinstance(model, UNet):
        blocks += [*model.down, *model.merge]
    for block in blocks:
        run: Any = partial(checkpoint, block.forward, use_reentrant=False, **more)
        block.forward = run
    return model


def compiled(model: nn.Module) -> nn.Module:
    """Compile ``model`` with torch's default backend, Inductor."""
    model.compile()
    return model


WAYS: dict[str, Way] = {
    "torch": lambda m: m,
    "torch checkpoint": partial(checkpointed, selective=False),
    "torch selective checkpoint": partial(checkpointed, selective=True),
    COMPILED: compiled,
    "torchbp": torchbp.convert,
    "lean": torchbp.lean,
    **{f"lean {b}": partial(torchbp.lean, budget=b) for b in BUDGETS},
}


def _chunked(*args: Any) -> torch.Tensor:
    return F.linear_cross_entropy(
        *args, options=nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio")
    )


def _with(criterion: Callable[..., torch.Tensor], way: Way) -> Way:
    def put(model: LanguageModel) -> nn.Module:
        model.criterion = criterion
        return way(model)

    return put


# Of a language model of many words. Torch's own picks its chunks by a rule for GPUs unless told otherwise.
WORDS_WAYS: dict[str, Way] = {
    "torch": WAYS["torch"],
    "torch, linear_cross_entropy": _with(_chunked, WAYS["torch"]),
    "torchbp": WAYS["torchbp"],
    "torchbp, linear_cross_entropy": _with(bp.linear_cross_entropy, WAYS["torchbp"]),
    "lean": WAYS["lean"],
    "lean, linear_cross_entropy": _with(bp.linear_cross_entropy, WAYS["lean"]),
    "lean 0.2, linear_cross_entropy": _with(bp.linear_cross_entropy, WAYS["lean 0.2"]),
}
if not hasattr(nn, "LinearCrossEntropyOptions"):  # before torch 2.13
    del WORDS_WAYS["torch, linear_cross_entropy"]
