"""The record that every check file ends with, and the catalogue of all of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pkgutil import iter_modules
from typing import Literal

from torchbp.verify.cases import Case
from torchbp.verify.report import Finding

__all__ = ["Check", "Level", "Need", "NotApplicable", "NothingChecked", "Refused", "all_checks"]

Level = Literal["quick", "full"]  # of a run
# Of a backward that draws random numbers: others would compare what is drawn.
DRAWN = {"values", "determinism", "writes", "outputs", "random_state", "leaks"}
Need = Literal["same values", "no random numbers", "real numbers"]  # what a check takes for granted


class NotApplicable(Exception):  # noqa: N818  # an outcome, not an error
    """Says why a check has nothing to test in this function."""


class NothingChecked(ValueError):  # noqa: N818  # as NotApplicable
    """No check could be made: none applies, or the function refuses all of them."""


class Refused(Exception):  # noqa: N818  # an outcome, not an error
    """Says how the function refused, loudly, what a check asked of it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One property of a right backward pass.

    Attributes:
        name: What `checks=` and `skip=` call it.
        tests: What must hold, in one line.
        run: Yields what contradicts it. May raise :class:`NotApplicable` or :class:`Refused`. An exception of the
            function under test in its forward is a refusal, in its backward a finding; neither is caught here.
        order: Place in the report: where several checks see one fault, the first names it.
        level: "quick" checks run always, "full" ones at `level="full"`, "asked" ones only by name.
        differences: Whether it holds the gradient against the slope of forward, which a straight-through estimator
            fails by design; ``skip=["differences"]`` leaves out all that do.
        once: Whether its first finding is all it has to say: what it tries after that need not be tried.
        needs: Of the function: "same values" each time it is called under one seed, "no random numbers", "real
            numbers". The check does not apply to one that lacks any of them.
    """

    name: str
    tests: str
    run: Callable[[Case], Iterable[Finding]]
    order: int
    level: Literal["quick", "full", "asked"] = "quick"
    differences: bool = False
    once: bool = False
    needs: tuple[Need, ...] = ()

    def findings(self, case: Case) -> Iterable[Finding]:
        """Run the check on a function that has what it needs; raise :class:`NotApplicable` on others."""
        if self.level != "asked":
            # Before any other call, whichever checks run: of one that keeps state the order would decide.
            _ = case.plain
            if case.draws_back and self.name not in DRAWN:
                raise NotApplicable("backward draws random numbers, and forward none")
        for need in self.needs:
            has, why = _NEEDS[need]
            if not has(case):
                raise NotApplicable(why)
        found = self.run(case)
        return islice(found, 1) if self.once else found


_NEEDS: dict[Need, tuple[Callable[[Case], bool], str]] = {
    "same values": (lambda c: c.steady, "forward gives other values each time it is called"),
    "no random numbers": (lambda c: not c.draws, "forward draws random numbers"),
    "real numbers": (
        lambda c: not any(t.is_complex() for t in (*c.leaves, *c.plain.outputs)),
        "forward works with complex numbers",
    ),
}


@cache
def all_checks() -> dict[str, Check]:
    """Return every check by name, read from the files of `checks/`, in the order of the report."""
    from torchbp.verify import checks

    found = [
        import_module(f"{checks.__name__}.{m.name}").CHECK for m in iter_modules(checks.__path__)
    ]
    return {check.name: check for check in sorted(found, key=lambda c: (c.order, c.name))}
