"""The public function: runs the checks and gathers what they find."""

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchbp._random import all_forked
from torchbp.verify._check import Check, Level, NotApplicable, NothingChecked, Refused, all_checks
from torchbp.verify.cases import Case
from torchbp.verify.definite import keep_definite
from torchbp.verify.generators import generators_among, put_back
from torchbp.verify.held import held
from torchbp.verify.lost import lost
from torchbp.verify.modules import LEAVES, leaves_among, left_alone
from torchbp.verify.raised import (
    BackwardRaised,
    ForwardRaised,
    PastDeadline,
    is_deliberate,
    reason,
)
from torchbp.verify.report import Capability, Finding, GradientError, Report, Status
from torchbp.verify.request import chosen, expect
from torchbp.verify.resize import runs
from torchbp.verify.tensors import double, expression_of, is_dense

__all__ = ["gradcheck"]

# Of torch's arguments; one that is another stands in the line that repeats a finding.
DEFAULTS = {
    "eps": None,
    "atol": None,
    "rtol": None,
    "nondet_tol": 0.0,
    "check_undefined_grad": True,
    "check_grad_dtypes": False,
    "check_batched_grad": False,
    "check_batched_forward_grad": False,
    "check_forward_ad": False,
    "check_backward_ad": True,
    "fast_mode": False,
    "masked": None,
}


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    reference: Callable[..., Any] | None = None,
    level: Level = "full",
    checks: str | Collection[str] | None = None,
    skip: str | Collection[str] = (),
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    deadline: float | None = None,
    repeat: str | None = None,
    raise_exception: bool = True,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    check_batched_grad: bool = False,
    check_batched_forward_grad: bool = False,
    check_forward_ad: bool = False,
    check_backward_ad: bool = True,
    fast_mode: bool = False,
    masked: bool | None = None,
) -> Report:
    """Check that the gradient of ``func`` is right, in all the ways in which it will be used.

    Takes the call of :func:`torch.autograd.gradcheck`. Inputs in lower precision are checked in float64 copies.

    Args:
        func: A Function's ``apply``, any callable of tensors, or a Module, whose parameters are checked too.
        inputs: A tensor, or a tuple of positional arguments: tensors, nested structures of them, anything else. Those
            that require grad are checked.
        reference: A trusted function of the same arguments; its values and gradients are compared too.
        level: "quick" for the cheap checks, "full" for all.
        checks: Names of the checks to run; ``"torch"`` runs exactly torch's own gradcheck.
        skip: Names of checks to leave out; ``"differences"`` for all that hold the gradient against the slope of
            ``func``, for a straight-through estimator, a gradient reversal or the like.
        seed: Of every random number drawn here.
        kwargs: Keyword arguments of ``func``.
        deadline: Seconds after which no further call of ``func`` is made: the checks that are left are not run.
        repeat: The line to paste that repeats a finding, with ``{check}`` in the place of the check's name; by default
            a call of this function.
        raise_exception: Raise :class:`GradientError` where a gradient is wrong; otherwise only return the report.
        eps: First step of finite differences, relative to the size of the input; by default fitted to the precision.
        atol: Absolute tolerance of values; by default derived from the measured error of the differences.
        rtol: Relative tolerance of values; by default 3e-9 for a function that computes in float64.
        nondet_tol: Largest difference allowed between two runs of the same backward.
        check_undefined_grad: ``False`` leaves out the check with an output that is not used.
        check_grad_dtypes: Accepted; the dtype that backward returns is always checked.
        check_batched_grad: ``True``: a refusal under ``vmap`` over backward counts as wrong.
        check_batched_forward_grad: ``True``: a refusal under ``vmap`` over forward mode counts as wrong.
        check_forward_ad: ``True``: a refusal in forward mode counts as wrong.
        check_backward_ad: ``False`` leaves out all that needs a backward pass: forward mode alone is checked.
        fast_mode: Accepted; the number of calls never grows with the size of the inputs.
        masked: Handed on to torch's own; sparse gradients are not checked here.

    Returns:
        The report, falsy exactly when something is wrong.

    Raises:
        GradientError: A gradient is wrong (also a torch ``GradcheckError``); the exception carries the report.
        ValueError: There is nothing to check: no input requires grad, no output changes with those that do, or no such
            check.
        Exception: Whatever ``func`` raises on ``inputs`` as given.

    Example:
        >>> import torch, torchbp
        >>> x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        >>> bool(torchbp.gradcheck(torch.tanh, (x,), level="quick"))
        True
    """
    options = {
        "repeat": repeat,
        "deadline": deadline,
        "kwargs": kwargs,
        "skip": (skip,) if isinstance(skip, str) else tuple(skip),
        "reference": reference,
        "eps": eps,
        "atol": atol,
        "rtol": rtol,
        "nondet_tol": nondet_tol,
        "check_undefined_grad": check_undefined_grad,
        "check_grad_dtypes": check_grad_dtypes,
        "check_batched_grad": check_batched_grad,
        "check_batched_forward_grad": check_batched_forward_grad,
        "check_forward_ad": check_forward_ad,
        "check_backward_ad": check_backward_ad,
        "fast_mode": fast_mode,
        "masked": masked,
    }
    if not check_backward_ad and checks is None:
        checks = "forward_mode"
    expect(func, kwargs, reference, seed, options)
    report = _run_all(func, inputs, kwargs, chosen(level, checks, skip), seed, deadline, options)
    if raise_exception and not report:
        raise GradientError(report)
    return report


def _build(
    func: Callable[..., Any],
    inputs: object,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    generators: Sequence[Any] = (),
) -> tuple[Case, Case]:
    """Return the case to check, in float64 where the function accepts that, and the case as given."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, (tuple, list)):
        inputs = (inputs,)
    given = Case(func, inputs, kwargs, seed=seed, options=options, generators=generators)
    case = given.variant(double, parameters=True)
    if all(a.dtype == b.dtype for a, b in zip(case.leaves, given.leaves, strict=True)):
        return given, given
    # Where float64 is refused, whatever it says, the sample as given decides; not where backward raises there too.
    if runs(case) or ("first" in case.__dict__ and not runs(given)):
        return case, given
    return given, given


def _run_all(
    func: Callable[..., Any],
    inputs: Any,
    kwargs: Mapping[str, Any] | None,
    wanted: list[Check],
    seed: int,
    deadline: float | None,
    options: Mapping[str, Any],
) -> Report:
    start = time.perf_counter()
    findings: list[Finding] = []
    capabilities: dict[str, Capability] = {}
    reached = list(held(func, *pytree.tree_leaves((inputs, kwargs))))
    own = generators_among(reached)
    # Of a Module a copy is called.
    modules = [] if isinstance(func, nn.Module) else reached
    with _plainly(), left_alone(modules), put_back(own):
        torch.manual_seed(seed)  # of a GPU, too, that the function is the first to use
        case, case.given = _build(func, inputs, kwargs, seed=seed, options=options, generators=own)
        case.memo[LEAVES] = leaves_among(modules)
        try:
            differentiable = case.differentiable
        except ForwardRaised as error:
            raise (error.__cause__ or error) from None
        for k, y in enumerate(case.first[1]):
            if not is_dense(y):
                layout = "a nested tensor" if y.is_nested else str(y.layout)
                raise TypeError(
                    f"gradcheck: expected strided outputs, got {layout} in output {k} of {case.name}; "
                    "make it dense inside of the function"
                )
        if not differentiable:
            return _without_gradient(case)
        if deadline is not None:
            case.calls.until = start + deadline
        broken = ""
        for check in wanted:
            begun = time.perf_counter()
            if broken:
                capabilities[check.name] = Capability(
                    status="not run", seconds=0.0, detail=broken, tests=check.tests
                )
                continue
            found, status, detail = _noted(check, case, *_run_one(check, case))
            findings += found
            if status in ("wrong", "refuses") and "plain" not in case.__dict__:
                broken = f"there is no gradient to compare with: {detail}"
            capabilities[check.name] = Capability(
                status=status, seconds=time.perf_counter() - begun, detail=detail, tests=check.tests
            )
    if not any(c.status in ("ok", "wrong") for c in capabilities.values()):
        first = next(iter(capabilities.values()))
        late = deadline is not None and any("deadline" in c.detail for c in capabilities.values())
        raise NothingChecked(
            f"gradcheck: expected a check that can be made of {case.name}, got none: {first.detail}; "
            f"{'give it more time' if late else 'choose other checks'}"
        )
    calls = case.calls
    return Report(case.name, tuple(findings), capabilities, calls.forward, calls.backward)


def _without_gradient(case: Case) -> Report:
    """Return the report on a function that no gradient goes through; raise ValueError where none is due."""
    check = all_checks()["outputs"]
    found = [replace(f, repeat=_repeat(check, case)) for f in lost(case, check.name, "wrong")]
    if not found:
        kinds = f" ({case.kinds})" if case.kinds else ""
        raise ValueError(
            f"gradcheck: expected an output of {case.name} that requires grad, got none{kinds}; "
            "there is nothing to check"
        )
    told = Capability(status="wrong", seconds=0.0, detail=found[0].message, tests=check.tests)
    return Report(case.name, tuple(found), {check.name: told}, case.calls.forward, 0)


@contextmanager
def _plainly() -> Iterator[None]:
    """Run as where nothing is set: with gradients, without autocast, anomaly mode or warnings.

    A check that wants one of these sets it; torch's anomaly mode raises at a NaN that is due. The random state is put
    back at the end.
    """
    with ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            all_forked(),
            torch.enable_grad(),
            torch.autograd.set_detect_anomaly(False),
            warnings.catch_warnings(),
        ):
            stack.enter_context(context)
        for kind in {"cpu", "cuda", *_accelerator()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        warnings.simplefilter("ignore")
        yield


def _accelerator() -> list[str]:
    kind = torch.accelerator.current_accelerator()
    return [kind.type] if kind else []


def _run_one(check: Check, case: Case) -> tuple[list[Finding], Status, str]:
    found: list[Finding] = []
    status: Status = "ok"
    detail = ""
    try:
        for finding in check.findings(case):
            found.append(finding)  # noqa: PERF402  # what was found before an exception counts
    except NotApplicable as why:
        status, detail = "not applicable", str(why)
    except Refused as why:
        status, detail = "refuses", str(why)
    except BackwardRaised as error:
        cause = error.__cause__ or error
        if is_deliberate(cause):
            status, detail = "refuses", reason(cause)
        else:
            found.append(
                Finding(
                    check=check.name,
                    severity="wrong",
                    message=f"backward raised {reason(cause)}",
                    cause="backward fails where forward does not",
                )
            )
    except ForwardRaised as error:
        status, detail = "refuses", str(error)
    except PastDeadline:
        status, detail = "not run", f"past the deadline of {case.options['deadline']:g} s"
    except Exception as error:  # ours: said, but never a false alarm
        status, detail = "not run", f"the check itself failed: {reason(error)}"
    found = [replace(f, repeat=f.repeat or _repeat(check, case)) for f in found]
    if any(f.severity == "wrong" for f in found):
        status, detail = "wrong", found[0].message
    return found, status, detail


def _noted(
    check: Check, case: Case, found: list[Finding], status: Status, detail: str
) -> tuple[list[Finding], Status, str]:
    """Make notes of what is wrong only where matrices are no longer positive definite, as the sample's are."""
    if status == "wrong" and not case.wrong_here:
        keep = keep_definite({i: t for i, t in case.arguments if i in case.where})
        if keep:
            other = case.variant(lambda t: t)
            other.keep = keep
            if _run_one(check, other)[1] != "wrong":
                why = "; not so where matrices stay positive definite, as the sample's are"
                notes = [replace(f, severity="note", message=f.message + why) for f in found]
                return notes, "ok", ""
    return found, status, detail


def _repeat(check: Check, case: Case) -> str:
    line = case.options["repeat"]
    if line:
        return line.replace("{check}", check.name)
    options = case.options
    given = [f"{n}={n}" for n in ("kwargs", "reference") if options[n]]
    given += [f"{n}={options[n]!r}" for n, x in DEFAULTS.items() if options[n] != x]
    given += ["skip=['differences']"] if "differences" in options["skip"] else []
    arguments = ", ".join(["inputs", *given, f"checks={check.name!r}", f"seed={case.seed}"])
    return f"torchbp.gradcheck({expression_of(case.func)}, {arguments})"
