"""Default dtype: neither an output nor what backward makes has torch's default dtype in the place of the inputs'.

``torch.zeros(n)`` is float32 whatever the inputs are: what is written there loses half of its digits, and so does a
number that backward makes a tensor of. Fewer bits than the inputs' may be meant; those that follow
:func:`torch.set_default_dtype` are not. Outputs in the inputs' dtype that move with it are noted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in
from torchbp.verify.tolerance import largest

NAME = "default_dtype"
# Of a gradient: more than the one is rounding to float32, more than the other another draw of random numbers.
LOST, DRAWN = 1e-11, 1e-3


def _run(case: Case) -> Iterator[Finding]:
    default = torch.get_default_dtype()
    if default == torch.float64 or any(leaf.dtype != torch.float64 for leaf in case.leaves):
        raise NotApplicable("inputs are not float64, or that is torch's default dtype")
    like = [k for k, y in enumerate(case.all_outputs) if y.dtype == default]
    if like:
        yield from _of_outputs(case, like, default)
    elif case.runs_again:
        yield from _of_gradients(case, default)


def _of_outputs(case: Case, like: list[int], default: torch.dtype) -> Iterator[Finding]:
    """Yield an output that follows the default dtype."""
    others = _outputs_in_float64(case)
    for k in like:
        if others[k].dtype == torch.float64:
            yield Finding(
                check=NAME,
                severity="wrong",
                message=f"output {k} is {default} for float64 inputs, and float64 where that is torch's default dtype",
                cause="a tensor made without a dtype: take that of an input, as new_zeros does",
            )
            return


def _of_gradients(case: Case, default: torch.dtype) -> Iterator[Finding]:
    """Yield a gradient that follows the default dtype, where outputs do not."""
    with _float64_by_default():
        (others,) = case.vjps([case.plain.cotangents])
    for name, g, e in zip(case.names, others, case.plain.grads, strict=True):
        size, off = largest(e), largest(g - e)
        if not LOST * size < off < DRAWN * size:
            continue
        when = f"where float64 is torch's default dtype, not {default}"
        outputs = zip(_outputs_in_float64(case), case.all_outputs, strict=True)
        moved = [(k, largest(y - x), largest(x)) for k, (y, x) in enumerate(outputs)]
        moved = [(k, by, most) for k, by, most in moved if by > LOST * most]
        if not moved:
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} moves by {off:.2g} {when}",
                cause="backward makes a tensor without a dtype: take that of an input, as new_tensor does",
            )
            return
        # The gradient is that of what forward computes.
        for k, by, most in moved[:1]:
            if by < DRAWN * most:
                yield Finding(
                    check=NAME,
                    severity="note",
                    message=f"output {k} moves by {by:.2g} {when}",
                    cause="forward makes a tensor without a dtype: take that of an input, as new_tensor does",
                )
        return


def _outputs_in_float64(case: Case) -> list[Tensor]:
    with _float64_by_default():
        return [y.detach() for y in tensors_in(case.call(case.fresh()))]


@contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CHECK = Check(
    name=NAME,
    tests="neither an output nor a gradient has torch's default dtype instead of the inputs'",
    run=_run,
    order=21,
)
