"""The record that every op file ends with, and the catalogue of all of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import torch
from torch import Tensor, nn

from torchbp import ops
from torchbp.ops._autocast import autocasts
from torchbp.ops._function import is_half, leaf
from torchbp.ops._samples import Make, Sample

__all__ = ["Op", "all_ops", "rounded_once"]


@dataclass(frozen=True, kw_only=True)
class Op:
    """What an op declares about itself; tests, benchmarks, docs and the command line read it.

    Attributes:
        function: The public function; the cell's, where torch has none for the whole recurrent layer. Of an output of
            several tensors the tests make one, side by side.
        modules: The Module forms. The record makes leaves of ``torch.fx`` of them, as torch's are.
        reference: A function of the same signature that ``function`` must equal: torch's own, or where torch has none
            of that name (or not the exact derivative), a plain composition of torch's ops.
        samples: Right inputs, in every way the op can be called.
        module_samples: Constructor arguments of each Module worth a test, with an input for it.
        errors: Wrong inputs: ``function`` must raise what ``reference`` raises on them.
        saved_bytes: Bytes that backward keeps (distinct storages, inputs and outputs counted) for these arguments.
        benchmark: One input of about ``n`` elements.
        elementwise: Whether output element i depends on input element i of the first argument only; edge values are
            then tested one by one.
        own_value: Whether the value, too, is computed by a formula of its own, which is as good as torch's, but not
            equal to the last bit.
        limits: x -> (y, dy/dx) where torch gives NaN in one of the two although mathematics has a limit.
        estimator: Whether the backward is, by definition, not the derivative of the forward. ``reference`` states its
            rule by ``detach``; tests against finite differences leave the op out.
        random: Whether it draws random numbers. ``reference`` then draws the same after the same seed; where it is
            ``None``, the test makes one from the drawn mask.
        other_gradient: Why torch's gradient is not the derivative, where it is not; a test of its own compares then.
        fused: What runs the backward in plain eager mode: ``""`` for the formula, else the fused kernel's name.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    modules: tuple[type[nn.Module], ...]
    reference: Callable[..., Tensor | tuple[Tensor, ...]] | None
    samples: Callable[[Make], Iterable[Sample]]
    module_samples: Callable[[Make], Iterable[tuple[type[nn.Module], Sample, Sample]]]
    saved_bytes: Callable[..., int]
    benchmark: Callable[[Make, int], Sample]
    errors: Callable[[Make], Iterable[Sample]] = field(default=lambda make: ())  # noqa: ARG005
    elementwise: bool = False
    own_value: bool = False
    limits: Mapping[float, tuple[float, float]] = field(default_factory=dict)
    estimator: bool = False
    random: bool = False
    fused: str = ""
    other_gradient: str = ""

    def __post_init__(self) -> None:
        """Make the Modules leaves of ``torch.fx``: here, once for all of them."""
        for module in self.modules:
            module.forward = leaf(module.forward)

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.function.__name__

    @property
    def torchs(self) -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
        """Torch's function of the name, of ``torch.nn.functional`` or of ``torch``; ``None`` where it has none."""
        return getattr(torch.nn.functional, self.name, None) or getattr(torch, self.name, None)

    def __repr__(self) -> str:
        return f"Op({self.name})"


def rounded_once(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``reference`` in float32 for half precision, rounded at the end.

    For ops that torch does not have in half precision, or where it loses more than a rounding by rounding each step.
    """

    @wraps(reference)
    def function(*args: Any, **kwargs: Any) -> Tensor:
        if not is_half(args[0]):
            return reference(*args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) and is_half(a) else a for a in args]
        kwargs = {
            k: a.float() if isinstance(a, Tensor) and is_half(a) else a for k, a in kwargs.items()
        }
        y = reference(*wide, **kwargs)
        return y if autocasts(y.device.type) else y.to(args[0].dtype)

    return function


@cache
def all_ops() -> dict[str, Op]:
    """Return every op by name, read from the folder's files; sorted by folder and name.

    A file ends with one record ``OP``, or with several, ``OPS``, of functions that share all but their name.
    """
    found: dict[str, Op] = {}
    for info in walk_packages(ops.__path__, f"{ops.__name__}."):
        if any(part.startswith("_") for part in info.name.split(".")) or ".kernels" in info.name:
            continue
        module: Any = import_module(info.name)
        ops_of_file = getattr(module, "OPS", None) or (getattr(module, "OP", None),)
        found.update((op.name, op) for op in ops_of_file if op is not None)
    return found
