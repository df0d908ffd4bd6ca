"""Complex inputs: a function that is sampled with real inputs and means to take complex ones is right there as well.

A derivative is conjugated, which changes nothing in real numbers. Most functions take complex inputs by chance, for
nothing stops them; these are meant to where the code of the autograd.Function, or of the function that was given, names
complex numbers, which its comments may do for another reason. Not where it speaks of imaginary parts, and nothing in it
is done to complex numbers: it is given those apart.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.source import does, speaks
from torchbp.verify.tangents import forward_mode
from torchbp.verify.tensors import signed_like

NAME = "complex_inputs"
NAMES = re.compile(r"complex|\bconj\b|\.m?H\b|torch\.adjoint\b")
APART = re.compile(r"imaginary|\bimag\b")
DONE = re.compile(
    r"\bconj\b|\.m?H\b|\.(?:real|imag)\b|torch\.adjoint\b|complex(?:64|128|32)|(?:is|as)_complex|torch\.complex\b"
)


def _run(case: Case) -> Iterator[Finding]:
    if any(t.is_complex() for _, t in case.arguments):
        raise NotApplicable("the sample is complex")
    if not does(case, NAMES) or (speaks(case, APART) and not does(case, DONE)):
        raise NotApplicable("complex inputs are not named")
    generator = case.generator(NAME)

    def off(i: int, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        other = t.to(torch.complex128)
        return other + 0.5j * signed_like(t, generator).to(other) if i in case.where else other

    other = case.edited(off, parameters=True)
    if not accepts(other) or not other.steady:
        raise NotApplicable("forward takes real inputs only")
    found = check_lines(other, NAME, " for complex inputs", number=2)
    found = found or forward_mode(other, NAME, " for complex inputs")
    if found:
        yield found


CHECK = Check(
    name=NAME,
    tests="the gradient is right for complex inputs, where the source means to take them",
    run=_run,
    order=19,
    differences=True,
)
