"""Values and gradients, first order, of every op on every sample: against torch, and in every dtype against float64."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE
from tests.ops.conftest import HALF, Case, drawn, make, with_args
from torchbp.ops._function import formula_only
from torchbp.ops._samples import EDGES

FLOAT32 = torch.finfo(torch.float32)
ENGINES = {"fused": nullcontext, "formula": formula_only}  # what may run a backward


def gradients(function, tensors) -> list[Tensor | None]:
    y = function(*tensors)
    v = drawn(y.shape, y.dtype)
    return list(torch.autograd.grad(y, tensors, v, allow_unused=True)) if tensors else []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_forward_equals_torch(case, dtype):
    """Torch's values; in half precision those of float64, to two roundings or to what torch itself loses there."""
    ours, theirs = case.call(case.sample(dtype)), case.call_reference(case.sample(dtype))
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    if dtype in HALF:
        exact = with_args(case.sample(dtype), lambda t: widened(t) if t.is_floating_point() else t)
        exact = case.call_reference(exact)
        two_units = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5, "equal_nan": True}
        near = torch.isclose(ours, exact.to(ours.dtype), **two_units)
        if case.op.random:  # in float64 it may draw other numbers
            near |= torch.isclose(ours, theirs, **two_units)
        no_worse = (ours.double() - exact).abs() <= (theirs.double() - exact).abs()
        assert (near | no_worse).all()
    else:
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_equals_torch(case, engine):
    sample = case.sample()
    f, tensors = case.of_tensors(sample)
    g, _ = case.of_tensors(sample, case.reference)
    with ENGINES[engine]():
        ours = gradients(f, tensors)
    for a, b in zip(ours, gradients(g, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_the_default_dtype_is(case, dtype):
    """What is made on the way has a dtype of its own, or that of an input."""
    f, tensors = case.of_tensors(case.sample(dtype))
    want = [f(*tensors), *gradients(f, tensors)]
    before = torch.get_default_dtype()
    two_roundings = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6, "equal_nan": True}
    for default in (torch.float64, *HALF):
        torch.set_default_dtype(default)
        try:
            got = [f(*tensors), *gradients(f, tensors)]
        finally:
            torch.set_default_dtype(before)
        torch.testing.assert_close(got, want, **two_roundings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradient_against_float64(case, dtype, engine):
    """In every precision: the gradient is that of float64 on the same (rounded) numbers, to a few roundings."""
    sample = case.sample(dtype)
    f, tensors = case.of_tensors(sample)
    with ENGINES[engine]():
        ours = gradients(f, tensors)
    exact = with_args(sample, lambda t: widened(t) if t.is_floating_point() else t)
    g, wide = case.of_tensors(exact, case.reference)
    unit = torch.finfo(dtype).eps
    h, again = case.of_tensors(
        case.sample(torch.float32 if dtype in HALF else dtype), case.reference
    )
    stirred = [(t.detach() * (1 + FLOAT32.eps * sign(t))).requires_grad_() for t in wide]
    columns = (ours, gradients(g, wide), gradients(h, again), gradients(g, stirred))
    for a, b, torchs, moved in zip(*columns, strict=True):
        assert a.dtype == dtype
        # On a GPU rsqrt, exp and tanh are themselves within two ulps (CUDA C++ programming guide), not one.
        few = 4 if DEVICE == "cpu" else 8
        # A few roundings, of v, of the result and of the formula; where terms cancel, what torch loses itself, or what
        # four roundings of the inputs do to the exact gradient (no more than 1e-6: at a kink it would be all).
        scale = b.abs().max().item() if b.numel() else 0.0
        cancelled = (torchs.double() - b).abs().max().item() if b.numel() else 0.0
        cancelled += min(1e-6, 4 * (moved - b).abs().max().item()) if b.numel() else 0.0
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=2 * unit,
            atol=few * unit * scale + cancelled + 1e-12,
            equal_nan=True,
        )


def sign(t: Tensor) -> Tensor:
    """Return 1 or -1 for each element, by chance."""
    generator = torch.Generator().manual_seed(5)
    return (torch.randint(2, t.shape, generator=generator) * 2.0 - 1).to(t.device)


def widened(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad)


def test_complex_and_integer_inputs_as_in_torch(first):
    """What torch takes is taken, with equal values and gradients; what it refuses is refused with the same type."""
    sample = first.sample()

    def to_complex(t: Tensor) -> Tensor:
        return (t.detach() * (1 + 0.5j)).requires_grad_(t.requires_grad)

    for change in (lambda t: (t.detach() * 4).round().long(), to_complex):
        changed = with_args(sample, lambda t, c=change: c(t) if t.is_floating_point() else t)
        try:
            theirs = first.call_reference(changed)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            try:
                first.call(changed)
            except type(error):
                continue
            gaps = ("does not support automatic differentiation", "not implemented for")
            assert any(gap in str(error) for gap in gaps)  # noqa: PT017
            f, tensors = first.of_tensors(changed)
            if not tensors:
                continue
            assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True)
            continue
        torch.testing.assert_close(first.call(changed), theirs)
        if theirs.is_complex():
            f, tensors = first.of_tensors(changed)
            g, _ = first.of_tensors(changed, first.reference)
            v = torch.randn_like(theirs)
            try:
                want = torch.autograd.grad(g(*tensors), tensors, v)
            except RuntimeError:  # torch has the value, but no gradient
                continue
            for engine in ENGINES.values():
                with engine():
                    ours = torch.autograd.grad(f(*tensors), tensors, v)
                for a, b in zip(ours, want, strict=True):
                    torch.testing.assert_close(a, b)
            if not first.op.estimator:
                assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True)
                assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_edge_values(op, dtype, engine):
    """Elementwise ops: forward as torch's, and the derivative as torch's in float64 wherever that is a number."""
    if not op.elementwise or op.random:
        pytest.skip("not a function of single elements")
    x = torch.tensor(EDGES, dtype=dtype, requires_grad=True, device=DEVICE)
    wide = x.detach().double().requires_grad_()
    y, exact, torchs = op.function(x), op.reference(wide), op.reference(x).detach()
    with ENGINES[engine]():
        y.backward(torch.ones_like(y))
    exact.backward(torch.ones_like(exact))
    for at, (value, derivative) in op.limits.items():
        here = wide.detach() == at  # 1e30 too, where it overflows
        known = torchs[here].double() + wide.grad[here]
        assert (known.isnan() | (torchs[here] == value)).all(), "torch has another limit"
        assert wide.grad[here].isnan().any() or known.isnan().any(), (
            "torch has mended it: take it out of the record"
        )
        torchs[here], wide.grad[here] = value, derivative
    limits = torch.finfo(dtype)
    rtol = 4 * limits.eps if op.own_value else 0.0
    if op.own_value:  # nearer the truth than torch's, in a tail where that cancels
        right = torch.isclose(y.detach().double(), exact.detach(), rtol=limits.eps, atol=0)
        torchs[right] = y.detach()[right]
    torch.testing.assert_close(y.detach(), torchs, equal_nan=True, rtol=rtol, atol=0)
    normal = (wide.grad.abs() >= limits.smallest_normal) | wide.grad.isnan()
    # float32 and wider may see the derivative from the output, to an absolute error; half precision rounds once.
    # In float64 the yardstick itself is off: torch's x · (1 - σ(x)) loses |x| roundings.
    half = dtype in HALF
    torch.testing.assert_close(
        x.grad.double()[normal],
        wide.grad[normal],
        rtol=(0.51 if half else 1.0) * limits.eps,
        atol=0.0 if half else limits.eps * (32 if dtype == torch.float64 else 1),
        equal_nan=True,
    )
    # 1 - y² in float64 is 0 where the derivative is below its rounding
    bound = max(limits.smallest_normal, torch.finfo(torch.float64).eps)
    assert (x.grad[~normal].abs() <= bound).all()


REFUSES_MIXES = {
    "lstm_cell"
}  # a state c of another dtype: a mistake, of which torch's composition says nothing
MIXES = (
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.int64),
    (torch.float32, torch.bool),
)


@pytest.mark.filterwarnings("ignore")  # of kl_div's mean, in both
@pytest.mark.parametrize(("dtype", "other"), MIXES, ids=str)
def test_mixed_dtypes_as_in_torch(op, dtype, other):
    """Where torch takes tensors of two dtypes, as a bfloat16 model with float32 targets: its dtypes and values."""
    if op.torchs is None or op.random or op.other_gradient:
        pytest.skip("nothing to compare with")
    compared = 0
    for reduction in ("mean", "none"):
        sample = next(iter(op.samples(make())))
        if "reduction" in sample.kwargs:
            sample.kwargs["reduction"] = reduction
        first, *others = [t for t in sample.tensors() if t.is_floating_point()]
        for changed in others:

            def cast(t, changed=changed, first=first):
                if t is first or not t.is_floating_point():
                    return (
                        t.detach().to(dtype if t is first else t.dtype).requires_grad_(t is first)
                    )
                value = (t.detach() > 0) if other in (torch.int64, torch.bool) else t.detach()
                value = value.to(other) if t is changed else t.detach().to(dtype)
                return value.requires_grad_(t.requires_grad and value.is_floating_point())

            given = with_args(sample, cast)
            results = []
            for function in (op.torchs, op.function):
                case = Case(op, 0)
                f, tensors = case.of_tensors(given, function)
                try:
                    y = f(*tensors)
                    v = torch.linspace(0.5, 1, y.numel(), dtype=torch.float64, device=DEVICE).view(
                        y.shape
                    )
                    grads = torch.autograd.grad(y, tensors, v.to(y.dtype), allow_unused=True)
                except (RuntimeError, NotImplementedError, ValueError, IndexError):
                    if not results:
                        break
                    if op.name not in REFUSES_MIXES:
                        raise
                    pytest.skip("refuses, as declared")
                results.append((y, *grads))
            else:
                compared += 1
                tolerance = 2e-2 if {dtype, other} & set(HALF) else 1e-4
                for a, b in zip(results[1], results[0], strict=True):
                    if a is not None and b is not None:
                        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if not compared:
        pytest.skip("torch refuses, or one tensor only")


@pytest.mark.parametrize("which", ["first", "others"])
def test_contiguous_where_torchs_result_is(case, which):
    """Of inputs in another layout, too: the result can be viewed in any shape where torch's can."""
    sample = case.sample()
    first = sample.args[0]

    def laid_out(t: Tensor) -> Tensor:
        if t.dim() < 2 or (t is first) != (which == "first"):
            return t
        last = t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() == 4 else None
        return t.mT.contiguous().mT if last is None else last

    theirs = case.call_reference(with_args(sample, laid_out))
    if theirs.is_contiguous():
        assert case.call(with_args(sample, laid_out)).is_contiguous()
