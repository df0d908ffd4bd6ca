"""Inputs that ops are tested, documented and benchmarked on."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "EDGES",
    "Make",
    "Sample",
    "against_bits",
    "against_classes",
    "against_signs",
    "against_values",
    "along_dims",
    "along_dims_errors",
    "along_rows",
    "elementwise",
    "elementwise_errors",
    "halved",
    "halved_errors",
    "one_tensor",
    "over_tensors",
    "pairs",
    "pairs_errors",
    "square",
    "stored",
    "with_dtype",
]

# Zeros of both signs, kinks and saturation of the usual activations, overflow, and what is not a number.
EDGES = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 3.47, -6.25, 20.0, -20.0, 88.0, -88.0),
    *(1e-30, -1e-30, 1e30, -1e30, math.inf, -math.inf, math.nan),
)


@dataclass(frozen=True)
class Sample:
    """The arguments of one call, with a name for the test's id."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors among the arguments, nested ones too."""
        found: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            found.append(t)
            return t

        over_tensors(note, (self.args, self.kwargs))
        yield from found

    def over_tensors(self, change: Callable[[Tensor], Any]) -> "Sample":
        """Return the sample with ``change`` applied to each of its tensors."""
        args, kwargs = over_tensors(change, (self.args, self.kwargs))
        return Sample(args, kwargs, self.name)


def over_tensors(change: Callable[[Tensor], Any], values: Any) -> Any:
    """Return ``values``, tuples (named ones, such as a PackedSequence), lists and dicts, with their tensors changed."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {k: over_tensors(change, v) for k, v in values.items()}
    if isinstance(values, (tuple, list)):
        changed = [over_tensors(change, v) for v in values]
        return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)
    return values


def one_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output of an op as one tensor: several of one shape stand side by side."""
    return output if isinstance(output, Tensor) else torch.cat(output, -1)


class Make:
    """Makes the tensors of a sample: seeded, of one dtype and device, so that a sample can be made twice.

    Random values are rounded to what bfloat16 holds, so that they are the same in every dtype; not where ``fine``.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        seed: int = 0,
        *,
        fine: bool = False,
    ) -> None:
        self.dtype, self.device, self.fine = dtype, device, fine
        self._generator = torch.Generator().manual_seed(seed)

    def _place(self, values: Tensor, requires_grad: bool) -> Tensor:
        return values.to(self.device, self.dtype).requires_grad_(requires_grad)

    def _coarse(self, values: Tensor) -> Tensor:
        return values if self.fine else values.bfloat16().double()

    def normal(self, *shape: int, requires_grad: bool = True) -> Tensor:
        """Standard normal values, none nearer than 0.05 to 0 (the usual kink)."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        values = torch.where(values.abs() < 0.05, values + 0.1, values)
        return self._place(self._coarse(values), requires_grad)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, requires_grad: bool = False
    ) -> Tensor:
        """Uniform values in ``[low, high)``."""
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return self._place(self._coarse(low + (high - low) * values), requires_grad)

    def labels(self, *shape: int, classes: int) -> Tensor:
        """Class indices, int64."""
        return torch.randint(classes, shape, generator=self._generator).to(self.device)

    def integers(self, values: Any) -> Tensor:
        """The integers given, int64."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def probabilities(self, *shape: int, dim: int, requires_grad: bool = False) -> Tensor:
        """Values that sum to 1 along ``dim``."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64).softmax(dim)
        return self._place(values, requires_grad)


def elementwise(make: Make) -> Iterator[Sample]:
    """Yield tensors of several shapes for a function of one tensor."""
    for shape in ((3, 4), (), (1,), (0,), (2, 0, 3), (2, 3, 2)):
        yield Sample((make.normal(*shape),), name="x".join(map(str, shape)) or "scalar")


def elementwise_errors(make: Make) -> Iterator[Sample]:
    """Yield what no function of one tensor takes."""
    yield Sample(("text",), name="text")
    yield Sample((), name="nothing")
    yield Sample((make.normal(2), 1, 2, 3, 4, 5, 6, 7), name="too-many")


def square(make: Make, n: int) -> Sample:
    """Return one tensor of about ``n`` elements, rows of an even length, no longer than 1024."""
    width = min(1024, max(8, math.isqrt(n) // 2 * 2))
    return Sample((make.normal(max(1, n // width), width),))


def against_values(make: Make, n: int) -> Sample:
    """Return :func:`square` and a target of real numbers."""
    (x,) = square(make, n).args
    return Sample((x, make.normal(*x.shape, requires_grad=False)))


def against_signs(make: Make, n: int) -> Sample:
    """Return :func:`square` and a target of 1 and -1."""
    (x,) = square(make, n).args
    return Sample((x, make.normal(*x.shape, requires_grad=False).sign()))


def against_classes(make: Make, n: int) -> Sample:
    """Return :func:`square` and a class for each row."""
    (x,) = square(make, n).args
    return Sample((x, make.labels(x.shape[0], classes=x.shape[1])))


def against_bits(make: Make, n: int) -> Sample:
    """Return :func:`square` and a target of 0 and 1."""
    (x,) = square(make, n).args
    return Sample((x, make.uniform(*x.shape).round()))


def along_rows(make: Make, n: int) -> Sample:
    """Return :func:`square` and its last dimension's number."""
    return Sample((*square(make, n).args, -1))


def along_dims(make: Make) -> Iterator[Sample]:
    """Yield tensors of several shapes, with a dimension, for a function along that dimension."""
    shapes = {(3, 4): 1, (): 0, (1,): 0, (5,): -1, (0,): 0, (2, 0, 3): 2, (2, 3, 2): -2}
    for shape, dim in shapes.items():
        name = "x".join(map(str, shape)) or "scalar"
        yield Sample((make.normal(*shape), dim), name=f"{name}-dim{dim}")
    yield Sample((make.normal(2, 3),), {"dim": 0}, name="keyword")


def along_dims_errors(make: Make) -> Iterator[Sample]:
    """Yield what no function along a dimension takes."""
    yield Sample((make.normal(2, 3), 2), name="no-such-dim")
    yield Sample((make.labels(2, 3, classes=5), 0), name="integers")
    yield Sample((make.normal(2), "first"), name="text")


def with_dtype(make: Make) -> Iterator[Sample]:
    """Yield :func:`along_dims`, and one with ``dtype=``."""
    yield from along_dims(make)
    yield Sample((make.normal(3, 4), 1), {"dtype": torch.float64}, name="dtype")


def halved(make: Make) -> Iterator[Sample]:
    """Yield tensors for a function of the two halves of one tensor along a dimension."""
    for shape in ((3, 4), (2, 40), (2,), (0, 2), (2, 3, 4)):
        yield Sample((make.normal(*shape),), name="x".join(map(str, shape)))
    yield Sample((make.normal(4, 3), 0), name="dim0")
    yield Sample((make.normal(2, 4, 3),), {"dim": -2}, name="keyword")


def halved_errors(make: Make) -> Iterator[Sample]:
    """Yield what has no two halves."""
    yield Sample((make.normal(2, 3),), name="odd")
    yield Sample((make.normal(),), name="scalar")
    yield Sample((make.normal(2, 4), 2), name="no-such-dim")
    yield Sample((make.labels(2, 4, classes=5),), name="integers")
    yield Sample(("text",), name="text")


def pairs(
    inputs: Callable[..., Tensor], targets: Callable[..., Tensor], **kwargs: object
) -> Iterator[Sample]:
    """Yield inputs and targets of one shape, in every reduction, for a loss of two tensors.

    Args:
        inputs: Makes a tensor of a shape, as ``Make.normal`` does.
        targets: The same, for the targets.
        kwargs: More arguments of the loss.
    """
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, **kwargs}
        yield Sample((inputs(3, 4), targets(3, 4)), options, reduction)
    yield Sample((inputs(), targets()), {"reduction": "sum", **kwargs}, "scalar")
    yield Sample((inputs(0, 3), targets(0, 3)), {"reduction": "sum", **kwargs}, "empty-sum")
    yield Sample((inputs(3, 4), targets(3, 4).detach()), dict(kwargs), "data-target")


def pairs_errors(make: Make) -> Iterator[Sample]:
    """Yield what no loss of two tensors takes."""
    x = make.normal(3, 4)
    yield Sample((x, x), {"reduction": "average"}, name="reduction")
    yield Sample((x, make.normal(5)), name="shape")


def stored(*values: object) -> int:
    """Return the bytes of the tensors among ``values``."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
