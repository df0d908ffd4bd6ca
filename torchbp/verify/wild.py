"""An index out of range, or a probability above 1, ends the process on a GPU, where on the CPU it raises.

Checks try a function at other sizes, with other indices and with other values, to see which ones it takes. Where these
are not the user's, nor values between 0 and 1 where the user's are, the function is called on copies on the CPU before.
Where integers are among the inputs whatever it says there counts; else what it says of an index (one of its own, which
it holds on the GPU, is told of, too) or of that range.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchbp.verify.raised import ForwardRaised, reason
from torchbp.verify.tensors import tensors_in

if TYPE_CHECKING:
    from torchbp.verify.sample import Sample

__all__ = ["refuse_wild"]

_ASSERTED = (
    "index",
    "out of",
    "target",
    "between 0 and 1",
)  # what is said of what a kernel asserts


def refuse_wild(sample: "Sample") -> None:
    """Raise :class:`ForwardRaised` where the function, on the CPU, does not take the sample; once found, remembered."""
    if "wild" not in sample.memo:
        sample.memo["wild"] = _refusal(sample) if _is_another(sample) else None
    if sample.memo["wild"] is not None:
        raise ForwardRaised(sample.memo["wild"])


def _is_another(sample: "Sample") -> bool:
    """Whether it is on a GPU, and of other sizes, integers or no probabilities, unlike the user's."""
    tensors = [x for x in sample.flat if isinstance(x, Tensor)]
    if all(t.device.type == "cpu" for t in tensors):
        return False
    pairs = zip(sample.name_at, sample.flat, strict=True)
    return any(not _alike(value, sample.origin.get(name)) for name, value in pairs)


def _counts(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def _alike(value: Any, origin: Any) -> bool:
    if not isinstance(value, Tensor):
        return value is origin or (type(value) is type(origin) and value == origin)
    if not isinstance(origin, Tensor) or value.shape != origin.shape:
        return False
    if _counts(value):
        return torch.equal(value, origin)
    return not _is_probability(origin) or _is_probability(value)


def _is_probability(t: Tensor) -> bool:
    return t.is_floating_point() and bool(((t >= 0) & (t <= 1)).all())


def _refusal(sample: "Sample") -> str | None:
    """Return what the function says on the CPU, if it raises there."""
    flat = [x.detach().cpu() if isinstance(x, Tensor) else x for x in sample.flat]
    for i in sample.where:
        flat[i].requires_grad_()
    asked = "on the CPU, where a wild index does no harm: "
    with torch.device("cpu"), torch.enable_grad():
        try:
            outputs = [y for y in tensors_in(sample.invoke(flat)) if y.requires_grad]
        except Exception as error:
            given = any(isinstance(x, Tensor) and _counts(x) for x in flat)
            return asked + reason(error) if given or _is_asserted(error) else None
        try:
            leaves = [flat[i] for i in sample.where]
            ones = [torch.ones_like(y) for y in outputs]
            torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
        except Exception as error:  # other faults are for the checks to find
            return asked + reason(error) if _is_asserted(error) else None
    return None


def _is_asserted(error: Exception) -> bool:
    told = str(error).lower()
    return isinstance(error, IndexError) or any(w in told for w in _ASSERTED)
