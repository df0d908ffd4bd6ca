"""Reference: values and gradients are those of a function that is trusted, at the sample and near it."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in, uniform
from torchbp.verify.tolerance import compare, compare_all, largest

NAME = "reference"
RELATIVE = 1e-9  # of two float64 formulas for the same thing


def _run(case: Case) -> Iterator[Finding]:
    reference = case.options["reference"]
    if reference is None:
        raise NotApplicable("no reference= given")
    generator = case.generator(NAME)

    def near(t: Tensor) -> Tensor:
        if not (t.is_floating_point() or t.is_complex()):
            return t
        return t * (1 + 0.5 * uniform(t.shape, generator)).to(t)

    try:
        case.call(case.fresh(), func=reference)
    except ForwardRaised as error:
        yield _refused(f"the reference raises {error}")
        return
    for where, other in (("", case), (" near the sample", case.variant(near))):
        found = _compare(other, reference, where)
        yield from found
        if found:
            return


def _compare(case: Case, reference: Callable[..., Any], where: str) -> list[Finding]:
    leaves = case.fresh()
    outputs = tensors_in(case.call(leaves, func=reference))
    chosen = [y for y in outputs if y.requires_grad]
    when = f", the reference's{where}"
    found = []
    if len(chosen) != len(case.plain.outputs):
        asked, given = len(case.plain.outputs), len(chosen)
        return [
            _refused(f"the reference has {given} outputs with a gradient, the function {asked}")
        ]
    relative = max(RELATIVE, 1e3 * case.epsilon)
    for i, (y, e) in enumerate(zip(case.plain.outputs, chosen, strict=True)):
        size = largest(e)
        wrong = compare(NAME, str(i), y, e, relative * size + 1e-300, what="output", when=when)
        found += [wrong] if wrong else []
    if not any(f.message.find("has shape") >= 0 for f in found):
        expected = case.backward(chosen, leaves, case.plain.cotangents)
        found += compare_all(NAME, case, case.plain.grads, expected, when=when, relative=relative)
    return found


def _refused(why: str) -> Finding:
    return Finding(
        check=NAME,
        severity="wrong",
        message=why,
        cause="not a function of the same arguments and outputs",
    )


CHECK = Check(
    name=NAME,
    tests="values and gradients are those of reference=",
    run=_run,
    order=14,
    needs=("no random numbers",),
)
