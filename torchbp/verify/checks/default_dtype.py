"""Default dtype: an output does not have torch's default dtype in the place of the inputs'.

``torch.zeros(n)`` is float32 whatever the inputs are: what is written there loses half of its digits. Outputs of fewer
bits than the inputs may be meant; those that follow :func:`torch.set_default_dtype` are not.
"""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in

NAME = "default_dtype"


def _run(case: Case) -> Iterator[Finding]:
    default, outputs = torch.get_default_dtype(), case.all_outputs
    like = [k for k, y in enumerate(outputs) if y.dtype == default != torch.float64]
    if not like or any(leaf.dtype != torch.float64 for leaf in case.leaves):
        raise NotApplicable("no output has torch's default dtype where inputs are float64")
    torch.set_default_dtype(torch.float64)
    try:
        others = tensors_in(case.call(case.fresh()))
    finally:
        torch.set_default_dtype(default)
    for k in like:
        if others[k].dtype == torch.float64:
            yield Finding(
                check=NAME,
                severity="wrong",
                message=f"output {k} is {default} for float64 inputs, and float64 where that is torch's default dtype",
                cause="a tensor made without a dtype: take that of an input, as new_zeros does",
            )
            return


CHECK = Check(
    name=NAME,
    tests="an output does not have torch's default dtype instead of the inputs'",
    run=_run,
    order=21,
)
