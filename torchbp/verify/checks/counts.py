"""Counts: the gradient is right for one tensor more, where the function takes any number of them."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from torchbp.verify._check import Check, NotApplicable
from torchbp.verify.cases import Case
from torchbp.verify.elsewhere import check_lines
from torchbp.verify.report import Finding
from torchbp.verify.resize import accepts

NAME = "counts"
MANY = 8  # tensors more still, which only one that takes any number takes
PAIR = 2  # a scale and a shift for each layer


def _run(case: Case) -> Iterator[Finding]:
    if isinstance(case.func, nn.Module):
        raise NotApplicable("a Module")
    tested = False
    args, kwargs = case.structure()
    for more in _longer(case, args, kwargs):
        other = case.of(more, kwargs)
        if accepts(other):
            tested = True
            found = check_lines(other, NAME, " with more tensors")
            if found:
                yield found
                return
    if not tested:
        raise NotApplicable("takes no list of tensors, or of that number only")


def _longer(case: Case, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments with each list of tensors one longer, and one longer themselves where that may be."""
    for k, arg in enumerate(args):
        if type(arg) in (list, tuple) and arg and all(isinstance(t, Tensor) for t in arg):
            yield (*args[:k], type(arg)([*arg, _another(arg[-1])]), *args[k + 1 :])
    owner = getattr(case.func, "__self__", None)
    function = owner if isinstance(owner, type) and issubclass(owner, Function) else None
    func = function.forward if function else case.func
    try:
        kinds = [p.kind for p in inspect.signature(func).parameters.values()]
    except (TypeError, ValueError):
        return
    if inspect.Parameter.VAR_POSITIONAL in kinds and args and isinstance(args[-1], Tensor):
        another = _another(args[-1])
        # One that hands on what it is given, as a decorator does, takes as many as what is behind it.
        for more in (1, PAIR):
            many = case.of((*args, *[another] * (MANY + more)), kwargs)
            if accepts(many):
                yield (*args, *[another] * more)
            if accepts(many) or "positional argument" in many.refusal:
                return


def _another(t: Tensor) -> Tensor:
    other = t.detach() * 1.25 if t.is_floating_point() or t.is_complex() else t.clone()
    return other.requires_grad_(t.requires_grad)


CHECK = Check(
    name=NAME,
    tests="the gradient is right for one tensor more, where there may be any number",
    run=_run,
    order=83,
    needs=("same values",),
    level="full",
    differences=True,
)
