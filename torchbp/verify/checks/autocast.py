"""Autocast: under torch.autocast a backward that forward let begin does not fail, and is right to bfloat16's precision.

The sample is taken in float32, as autocast leaves float64 alone. How far bfloat16 may be off is measured: by how much
the float64 gradient moves when inputs and grad_output are rounded to bfloat16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, Refused
from torchbp.verify.cases import Case
from torchbp.verify.conditioning import in_single, rounded_norm_error, spread, terms
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.report import Finding

NAME = "autocast"
LOW = torch.bfloat16


def _run(case: Case) -> Iterator[Finding]:
    single, _ = in_single(case)
    try:
        exact = single.plain
    except ForwardRaised as error:
        raise Refused(f"in float32: {error}") from error
    device = case.leaves[0].device.type
    leaves = single.fresh()
    try:
        with torch.autocast(device, dtype=LOW):
            outputs = single.forward(leaves)
    except ForwardRaised as error:
        raise Refused(f"under autocast: {error}") from error
    v = [t.to(y.dtype) for t, y in zip(exact.cotangents, outputs, strict=True)]
    got = single.backward(outputs, leaves, v)
    if not any(_low(y) for y in outputs):
        return  # autocast changed nothing that shows
    for which, (name, g, e) in enumerate(zip(case.names, got, exact.grads, strict=True)):
        error = rounded_norm_error(g, e, terms(case))
        if error <= 0.25:
            continue
        limit = spread(case, LOW)[which]  # asked for only here: it costs calls
        if error > 0.25 + 32 * limit:
            yield Finding(
                check=NAME,
                severity="wrong",
                input=name,
                message=f"grad of {name} under torch.autocast is off by {error:.2g} of its norm; "
                f"rounding to {str(LOW)[6:]} explains {limit:.2g}",
                got=error,
                expected=limit,
                cause="low-precision and float32 tensors mixed in backward",
            )


def _low(y: Tensor) -> bool:
    return y.dtype in (torch.bfloat16, torch.float16)


CHECK = Check(
    name=NAME,
    tests="backward works under torch.autocast, to bfloat16's precision",
    run=_run,
    order=86,
    needs=("no random numbers", "same values", "real numbers"),
    level="full",
)
