"""Random state: backward does not reseed the generators that everybody draws from, and draws where forward does."""

from collections.abc import Iterator, Sequence
from typing import Any

from torchbp import _random
from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.report import Finding

NAME = "random_state"


def _run(case: Case) -> Iterator[Finding]:
    if case.draws_back:
        yield Finding(
            check=NAME,
            severity="wrong",
            message="backward draws from a global generator, of which forward draws nothing",
            cause="what is drawn next depends on whether backward ran: use a torch.Generator of your own",
        )
        return
    found = {"forward": _after_forward(case), "backward": []}
    for seed in (case.seed + 1, case.seed + 2) if case.runs_again else ():
        leaves, outputs = case.kept
        _random.seed(seed)
        case.backward(outputs, leaves, case.plain.cotangents, retain_graph=True)
        found["backward"].append(_random.states())
    for phase, (one, other) in ((p, s) for p, s in found.items() if s):
        if any(_random.equal(one, other)):
            yield Finding(
                check=NAME,
                severity="wrong"
                if phase == "backward"
                else "note",  # it may be for the checks' sake
                message=f"{phase} reseeds a global generator: two states went in, one comes out",
                cause="a fixed seed without putting the state back, as torch.random.fork_rng does",
            )


def _after_forward(case: Case) -> list[Sequence[Any]]:
    """Return the states that two forwards under two seeds leave."""
    if not case.draws:
        return [case.first_states, case.again.states]
    case.call(case.fresh(), seed=case.seed + 1)
    return [case.first_states, case.states_after]


CHECK = Check(
    name=NAME,
    tests="backward does not reseed the global random generators, nor draws from them alone",
    run=_run,
    order=60,
)
