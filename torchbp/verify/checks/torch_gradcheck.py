"""torch.autograd.gradcheck itself, with its own arguments: what `checks="torch"` asks for."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.gradcheck import GradcheckError

from torchbp.verify._check import Check
from torchbp.verify.cases import Case
from torchbp.verify.raised import reason
from torchbp.verify.report import Finding
from torchbp.verify.tensors import tensors_in

NAME = "torch"
DEFAULTS = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}
FLAGS = (
    "nondet_tol",
    "check_undefined_grad",
    "check_grad_dtypes",
    "check_batched_grad",
    "check_batched_forward_grad",
    "check_forward_ad",
    "check_backward_ad",
    "fast_mode",
    "masked",
)


def _run(case: Case) -> Iterator[Finding]:
    given = case.given
    arguments: dict[str, Any] = {
        n: d if case.options[n] is None else case.options[n] for n, d in DEFAULTS.items()
    }
    arguments |= {n: case.options[n] for n in FLAGS}

    def function(*leaves: torch.Tensor) -> Any:
        return tuple(tensors_in(given.call(leaves)))

    try:
        torch.autograd.gradcheck(function, tuple(given.fresh()), **arguments)
    except GradcheckError as error:
        yield Finding(check=NAME, severity="wrong", message=str(error).strip())
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        yield Finding(
            check=NAME, severity="wrong", message=f"torch.autograd.gradcheck raises {reason(error)}"
        )


CHECK = Check(
    name=NAME,
    tests="torch.autograd.gradcheck passes",
    run=_run,
    order=99,
    level="asked",
)
