"""An index out of range, or a probability above 1, ends the process on a GPU, where on the CPU it raises.

Checks try a function at other sizes, with other indices and with other values, to see which ones it takes. Where these
are not the user's, nor values between 0 and 1 where the user's are, the function is called on copies on the CPU before.
Where integers are among the inputs whatever it says there counts; else what it says of an index (one of its own, which
it holds on the GPU, is told of, too) or of that range.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from torchbp.verify.raised import ForwardRaised, reason
from torchbp.verify.tensors import counts, tensors_in

if TYPE_CHECKING:
    from torchbp.verify.sample import Sample

__all__ = ["refuse_wild"]

# What is said of what a kernel asserts.
_ASSERTED = ("index", "out of", "target", "between 0 and 1")


def refuse_wild(sample: "Sample", leaves: Sequence[Tensor]) -> None:
    """Raise :class:`ForwardRaised` where the function, on the CPU, does not take the sample, or its leaves moved there.

    What the CPU says of the sample is remembered.
    """
    if all(t.device.type == "cpu" for t in sample.flat if isinstance(t, Tensor)):
        return
    if "wild" not in sample.memo:
        sample.memo["wild"] = _refusal(sample, sample.leaves) if _is_another(sample) else None
    refusal = sample.memo["wild"]
    if refusal is None and _leaves_the_probabilities(sample, leaves):
        refusal = _refusal(sample, leaves)
    if refusal is not None:
        raise ForwardRaised(refusal)


def _is_another(sample: "Sample") -> bool:
    """Whether it is of other sizes, integers or no probabilities, unlike the user's."""
    pairs = zip(sample.name_at, sample.flat, strict=True)
    return any(not _alike(value, sample.origin.get(name)) for name, value in pairs)


def _leaves_the_probabilities(sample: "Sample", leaves: Sequence[Tensor]) -> bool:
    """Whether a step beyond 1, or below 0, was taken from a sample of probabilities."""
    if any(map(is_functorch_wrapped_tensor, leaves)):
        return False  # whose values are not to be seen
    return any(
        _is_probability(old) and not _is_probability(new)
        for old, new in zip(sample.leaves, leaves, strict=True)
    )


def _alike(value: Any, origin: Any) -> bool:
    if not isinstance(value, Tensor):
        return value is origin or (type(value) is type(origin) and value == origin)
    if not isinstance(origin, Tensor) or value.shape != origin.shape:
        return False
    if counts(value):
        return torch.equal(value, origin)
    return not _is_probability(origin) or _is_probability(value)


def _is_probability(t: Tensor) -> bool:
    return t.is_floating_point() and bool(((t >= 0) & (t <= 1)).all())


def _refusal(sample: "Sample", leaves: Sequence[Tensor]) -> str | None:
    """Return what the function says on the CPU, if it raises there."""
    flat = [x.detach().cpu() if isinstance(x, Tensor) else x for x in sample.flat]
    for i, leaf in zip(sample.where, leaves, strict=True):
        flat[i] = leaf.detach().cpu().requires_grad_()
    asked = "on the CPU, where that does no harm: "
    with torch.device("cpu"), torch.enable_grad():
        try:
            outputs = [y for y in tensors_in(sample.invoke(flat)) if y.requires_grad]
        except Exception as error:
            given = any(isinstance(x, Tensor) and counts(x) for x in flat)
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
