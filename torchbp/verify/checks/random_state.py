"""Random state: backward does not reseed the generator that everybody draws from."""

from collections.abc import Iterator

import torch

from torchbp.verify._check import Check
from torchbp.verify.cases import Case, tensors_in
from torchbp.verify.report import Finding

NAME = "random_state"


def _run(case: Case) -> Iterator[Finding]:
    after: dict[str, list[torch.Tensor]] = {"forward": [], "backward": []}
    for seed in (case.seed + 11, case.seed + 12):
        torch.manual_seed(seed)
        leaves = case.fresh()
        outputs = [o for o in tensors_in(case.call(leaves, seeded=False)) if o.requires_grad]
        after["forward"].append(torch.get_rng_state())
        v = case.cotangents(outputs, NAME)
        torch.manual_seed(seed)
        case.backward(outputs, leaves, v)
        after["backward"].append(torch.get_rng_state())
    for phase, (one, other) in after.items():
        if torch.equal(one, other):
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
