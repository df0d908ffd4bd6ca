"""Complex plane: a complex input whose sample lies on the real line is tested off it too.

There conj() changes nothing, and a backward that forgets it looks right.
"""

from collections.abc import Iterator

from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts
from torchbp.verify.tensors import signed_like

NAME = "complex_plane"


def _run(case: Case) -> Iterator[Finding]:
    if not any(leaf.is_complex() and not bool(leaf.imag.any()) for leaf in case.leaves):
        raise NotApplicable("no complex input on the real line")
    generator = case.generator(NAME)

    def off(t: Tensor) -> Tensor:
        if not t.is_complex() or bool(t.imag.any()):
            return t
        return t + 0.5j * signed_like(t.real, generator).to(t)

    other = case.variant(off, parameters=True)
    if not accepts(other) or not other.steady:
        raise NotApplicable("forward takes the real line only")
    found = check_lines(other, NAME, " off the real line", number=2)
    if found:
        yield found


CHECK = Check(
    name=NAME,
    tests="the gradient of a complex input is right off the real line too",
    run=_run,
    order=18,
    differences=True,
)
