"""Random state: backward does not reseed the generator that everybody draws from."""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import BackwardRaised
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in

NAME = "random_state"


def _run(case: Case) -> Iterator[Finding]:
    leaves = case.fresh()
    outputs = tensors_in(case.call(leaves, seed=case.seed + 11))
    after = {"forward": [case.first_state, case.state_after], "backward": []}
    chosen = [outputs[i] for i in case.differentiable]
    for seed in (case.seed + 11, case.seed + 12):
        torch.manual_seed(seed)
        try:
            case.backward(chosen, leaves, case.plain.cotangents, retain_graph=True)
        except BackwardRaised:  # a graph that can be run once only
            break
        after["backward"].append(torch.get_rng_state())
    for phase, states in after.items():
        if len(states) == 2 and torch.equal(*states):
            yield Finding(
                check=NAME,
                severity="wrong" if phase == "backward" else "note",
                message=f"{phase} reseeds torch's global generator: two states went in, one comes out",
                cause="torch.manual_seed without torch.random.fork_rng",
            )


CHECK = Check(
    name=NAME,
    tests="backward does not reseed the global random generator",
    run=_run,
    order=60,
)
