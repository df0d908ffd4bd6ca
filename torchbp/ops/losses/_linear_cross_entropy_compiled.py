"""Linear and cross entropy as one op that torch.compile does not look into: traced as a formula, all logits are kept.

The numbers are those of linear_cross_entropy.py. The op makes the gradients in the forward, chunk by chunk, and the
backward scales them. A backward that is differentiated again (there is none of compiled code but where the backend is
"eager") runs the formula.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.ops.losses._linear_cross_entropy import (
    Settings,
    by_chunks,
    gradient_of_logits,
    of_products,
    wide,
)

__all__ = ["opaque"]


@torch.library.custom_op("torchbp::linear_cross_entropy", mutates_args=())
def opaque(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    w: Tensor | None,
    reduction: str,
    ignored: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
    rows: int,
    early: Sequence[bool],
    tokens: bool,
) -> list[Tensor]:
    """Return what the Function's forward does, whose arguments these are, without the group."""
    options = (reduction, ignored, smoothing, z_loss, softcap, rows)
    given = Settings(*options, (early[0], early[1], early[2]), tokens, None)
    one = torch.ones((), dtype=wide(x), device=x.device)
    made, loss, values = by_chunks(x, weight, bias, target, w, given, one, given.early)
    extras = (values.clone(), made.predictions) if tokens else ()
    return [t for t in (loss, *extras, made.x, made.weight, made.bias) if t is not None]


@opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> list[Tensor]:
    *_, early, tokens = others
    dtype = wide(x)
    made = [x.new_empty((), dtype=dtype)]
    if tokens:
        made += [x.new_empty(x.shape[:1], dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.int64)]
    for t, wanted in zip((x, weight, bias), early, strict=True):
        if wanted and t is not None:
            made.append(t.new_empty(t.shape, dtype=dtype))
    return made


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, settings = inputs[:5], inputs[5:]
    ctx.given = Settings._make((*settings, None))
    made = output[3:] if ctx.given.tokens else output[1:]
    ctx.save_for_backward(*tensors, *made)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, bias, target, w, *made = ctx.saved_tensors
    given, grad = ctx.given, grads[0]
    others = (None,) * (len(Settings._fields) + 1)
    if grad is None:
        return None, None, None, *others
    if torch.is_grad_enabled():
        g = gradient_of_logits(x, weight, bias, target, w, grad, given)
        low = g.to(of_products(x))
        gradients = iter((low @ weight.to(low.dtype), low.mT @ x.to(low.dtype), g.sum(0)))
        all_of = [next(gradients) for _ in given.early]
    else:
        scaled = iter(made)
        all_of = [next(scaled) * grad if early else None for early in given.early]
    found = [g if early else None for g, early in zip(all_of, given.early, strict=True)]
    typed = (
        None if g is None else g.to(t.dtype) for g, t in zip(found, (x, weight, bias), strict=True)
    )
    return *typed, *others


opaque.register_autograd(_backward, setup_context=_setup_context)
