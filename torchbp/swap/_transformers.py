"""Twins of the layers that Hugging Face's transformers writes itself: its activations, and its RMS norms.

Nothing here imports transformers: a layer is known by its class's name and module. There are dozens of copies of
``LlamaRMSNorm``, one a model, and a name promises nothing: a layer is converted only where, on a trial, its own
forward and torchbp's give the same numbers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.ops.activations.gelu import gelu
from torchbp.ops.activations.mish import mish
from torchbp.ops.activations.quick_gelu import quick_gelu
from torchbp.ops.activations.silu import silu
from torchbp.ops.activations.squared_relu import squared_relu
from torchbp.ops.normalization.rms_norm import rms_norm

__all__ = ["original", "twin", "twin_of"]


def _gelu(_: Any, x: Tensor) -> Tensor:
    return gelu(x)


def _gelu_tanh(_: Any, x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _mish(_: Any, x: Tensor) -> Tensor:
    return mish(x)


def _quick_gelu(_: Any, x: Tensor) -> Tensor:
    return quick_gelu(x)


def _silu(_: Any, x: Tensor) -> Tensor:
    return silu(x)


def _squared_relu(_: Any, x: Tensor) -> Tensor:
    return squared_relu(x)


def _llama_norm(norm: Any, x: Tensor) -> Tensor:
    """Scale by the weight what was normalized in float32 and rounded to the input's dtype."""
    if x.dtype == norm.weight.dtype:
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return norm.weight * rms_norm(x, norm.weight.shape, None, norm.variance_epsilon)


def _gemma_norm(norm: Any, x: Tensor) -> Tensor:
    """Scale by 1 + the weight, which starts at 0, and round once."""
    scale = 1.0 + norm.weight.float()
    return rms_norm(x.float(), scale.shape, scale, norm.eps).type_as(x)


_FORMULAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "FastGELUActivation": _gelu_tanh,
    "GELUActivation": _gelu,
    "GELUTanh": _gelu_tanh,
    "MishActivation": _mish,
    "NewGELUActivation": _gelu_tanh,
    "QuickGELUActivation": _quick_gelu,
    "ReLUSquaredActivation": _squared_relu,
    "SiLUActivation": _silu,
}


def twin(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that computes what ``module``, of transformers, does; None where there is none."""
    kind = type(module)
    if kind.__module__.partition(".")[0] != "transformers":
        return None
    formula = _formula(module)
    return None if formula is None or not _agree(module, formula) else twin_of(kind, formula)


def original(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of transformers that a twin came from; None where ``module`` is no twin."""
    return type(module).__mro__[2] if isinstance(module, _Twin) else None


class _Twin:
    """What all twins share: which formula they compute, and how they are pickled."""

    formula: Callable[[Any, Tensor], Tensor]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return type(self).formula(self, hidden_states)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kind = type(self)
        return _blank, (kind.__mro__[2], kind.formula), self.__dict__


@cache
def twin_of(kind: type[nn.Module], formula: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """Return the subclass of ``kind`` whose forward is ``formula(module, input)``, a function that can be pickled."""
    members = {"formula": staticmethod(formula), "__module__": "torchbp.swap"}
    return type(kind.__name__, (_Twin, kind), members)


def _blank(kind: type[nn.Module], formula: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Make an empty twin, which unpickling fills."""
    made = twin_of(kind, formula)
    return made.__new__(made)


def _formula(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    name = type(module).__name__
    if name in _FORMULAS:
        return _FORMULAS[name]
    if not name.endswith(("RMSNorm", "T5LayerNorm")) or [
        n for n, _ in module.named_parameters()
    ] != ["weight"]:
        return None
    if hasattr(module, "variance_epsilon"):
        return _llama_norm
    return _gemma_norm if hasattr(module, "eps") else None


def _agree(module: nn.Module, formula: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether the layer's own forward and the formula give the same numbers, to rounding, on a trial."""
    weight = next(module.parameters(), torch.zeros(64))
    if weight.is_meta:
        return False
    count = 3 * weight.numel()
    x = (6 * torch.linspace(-1, 1, count, device=weight.device).sin()).to(weight.dtype)
    x = x.view(3, *weight.shape)
    with torch.no_grad():
        own, ours = module(x), formula(module, x)
    return own.dtype == ours.dtype and torch.allclose(
        own.double(), ours.double(), rtol=4 * torch.finfo(own.dtype).eps, atol=1e-6
    )
