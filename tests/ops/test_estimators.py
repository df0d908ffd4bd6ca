"""The layers whose backward is not the derivative of their forward: the rule that each states."""

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import Case
from torchbp.ops._op import all_ops
from torchbp.verify import GradientError

ESTIMATORS = [op for op in all_ops().values() if op.estimator]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_declared_because_a_gradient_checker_objects(estimator):
    """The declaration is needed: finite differences find another gradient than the stated rule."""
    first = Case(estimator, 0)
    f, tensors = first.of_tensors(first.sample())
    with pytest.raises(GradientError):
        torchbp.gradcheck(f, tensors, skip=["compile"])


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5])
def test_gradient_scale_is_the_identity_with_a_scaled_gradient(scale):
    x, v = torch.randn(3, 4, requires_grad=True, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    y = F.gradient_scale(x, scale)
    assert torch.equal(y, x)
    y.backward(v)
    assert torch.equal(x.grad, scale * v)


def test_gradient_reversal_climbs_below_and_descends_above():
    x = torch.tensor([2.0], requires_grad=True, device=DEVICE)
    w = torch.tensor([3.0], requires_grad=True, device=DEVICE)
    (w * F.gradient_reversal(x, 0.1)).backward()
    assert w.grad.item() == 2.0
    assert x.grad.item() == pytest.approx(-0.3)


def test_surrogate_spike_pulses():
    """The three formulas, at numbers worked out by hand, with k = 2 at x = ±1/4: z = ±1/2."""
    wanted = {"fast_sigmoid": 2 / 2.25, "arctan": 2 / (1 + torch.pi**2 / 4), "triangle": 1.0}
    for surrogate, pulse in wanted.items():
        x = torch.tensor([-0.25, 0.25, 0.0], dtype=torch.float64, requires_grad=True, device=DEVICE)
        y = F.surrogate_spike(x, surrogate, 2.0)
        assert y.tolist() == [0.0, 1.0, 0.0]
        y.sum().backward()
        assert x.grad.tolist() == pytest.approx([pulse, pulse, 2.0])


def test_surrogate_spike_refuses_an_unknown_pulse():
    with pytest.raises(ValueError, match="surrogate_spike: expected surrogate to be one of"):
        F.surrogate_spike(torch.zeros(1, device=DEVICE), "gauss")


def clipped(v, **options):
    x = torch.zeros(v.shape, dtype=v.dtype, requires_grad=True, device=DEVICE)
    y = F.gradient_clip(x, **options)
    assert torch.equal(y, x)
    return torch.autograd.grad(y, x, v)[0]


def test_gradient_clip_by_hand():
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], device=DEVICE)
    wanted = torch.tensor([[0.35, 0.35], [0.3, 0.35], [0.0, 0.0]], device=DEVICE)
    torch.testing.assert_close(clipped(v, clip_value=0.35), wanted)
    rows = clipped(v, max_norm=1.0, dim=-1)
    torch.testing.assert_close(
        rows, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], device=DEVICE)
    )
    assert torch.equal(rows[1:], v[1:]), "what is within the norm passes bit for bit"
    torch.testing.assert_close(
        clipped(v, max_norm=0.8, norm_type=1, dim=(0, 1)).sum(), torch.tensor(0.8, device=DEVICE)
    )
    torch.testing.assert_close(clipped(v, max_norm=1.0, norm_type=torch.inf), v / 4)
    columns = clipped(v, max_norm=1.0, dim=0)
    torch.testing.assert_close(columns.norm(dim=0), torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, torch.inf])
def test_gradient_clip_of_an_explosion(dtype, p):
    """A norm whose squares overflow is clipped to the direction, not to 0; tiny ones don't vanish."""
    large = torch.finfo(dtype).max / 4
    v = torch.tensor([3.0, 0.0, -4.0], device=DEVICE).mul(large / 4).to(dtype)
    wanted = v.double() / torch.linalg.vector_norm(v.double(), p)
    found = clipped(v, max_norm=1.0, norm_type=p)
    # a norm, a quotient and a product: a rounding each
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    tiny = torch.full((2,), torch.finfo(dtype).tiny, dtype=dtype, device=DEVICE)
    assert torch.equal(clipped(tiny, max_norm=1.0, norm_type=p), tiny)


def test_gradient_clip_hides_nothing_broken():
    v = torch.tensor([[torch.inf, 1.0], [3.0, 4.0], [torch.nan, 0.0]], device=DEVICE)
    rows = clipped(v, max_norm=1.0, dim=1)
    assert rows.isnan().tolist() == [[True, True], [False, False], [True, True]]
    assert clipped(v, max_norm=1.0).isnan().all()
    values = clipped(v, clip_value=2.0)
    assert values[0].tolist() == [2.0, 1.0]
    assert values[2, 0].isnan()


def test_gradient_clip_clips_what_all_uses_sum_to():
    x = torch.zeros(2, requires_grad=True, device=DEVICE)
    y = F.gradient_clip(x, max_norm=1.0)
    (y.sum() * 3 + (y * torch.tensor([0.0, 1.0], device=DEVICE)).sum()).backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.6, 0.8], device=DEVICE))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "expected one of max_norm and clip_value, got max_norm=None"),
        ({"max_norm": 1, "clip_value": 1}, ValueError, "expected one of max_norm and clip_value"),
        ({"max_norm": 0.0}, ValueError, r"expected max_norm > 0, got 0\.0"),
        ({"clip_value": float("nan")}, ValueError, "expected clip_value > 0, got nan"),
        ({"max_norm": 1.0, "norm_type": -2}, ValueError, "expected norm_type > 0, got -2"),
        (
            {"max_norm": 1.0, "dim": (0, 2)},
            IndexError,
            r"dim to be one of the 2 of \(2, 3\), got 2",
        ),
    ],
)
def test_gradient_clip_refuses(options, error, message):
    with pytest.raises(error, match=message):
        F.gradient_clip(torch.zeros(2, 3, device=DEVICE), **options)
    if error is ValueError:
        with pytest.raises(error, match=message):
            torchbp.nn.GradientClip(**options)


def test_gradient_clip_by_value_refuses_complex_numbers():
    with pytest.raises(TypeError, match="expected a real input to clip by value"):
        F.gradient_clip(torch.zeros(2, dtype=torch.complex64, device=DEVICE), clip_value=1.0)


def passed(x, *args, **options):
    """The values, and where a gradient of ones passes."""
    x = torch.tensor(x, requires_grad=True, device=DEVICE)
    y = F.straight_through(x, *args, **options)
    return y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()


def test_straight_through_by_hand():
    x = [-2.0, -1.0, -0.5, 0.0, 1.0, 1.5]
    assert passed(x) == ([-2, -1, 0, 0, 1, 2], [1] * 6), "round: halves to even, all passes"
    assert passed(x, "sign") == ([-1, -1, -1, 1, 1, 1], [1] * 6)
    assert passed(x, "sign", window=(-1, 1)) == ([-1, -1, -1, 1, 1, 1], [0, 1, 1, 1, 1, 0])
    assert passed(x, "clamp", min=-1, max=1) == ([-1, -1, -0.5, 0, 1, 1], [1] * 6)
    assert passed(x, "clamp", max=0.0)[0] == [-2, -1, -0.5, 0, 0, 0]
    assert passed(x, torch.floor, min=-1) == ([-1, -1, -1, 0, 1, 1], [1] * 6)


def test_straight_through_sign_with_its_window_has_the_derivative_of_hardtanh():
    x = torch.linspace(-2, 2, 42, device=DEVICE)  # off the kinks
    of_hardtanh = torch.func.grad(lambda x: torch.nn.functional.hardtanh(x).sum())(x)
    ours = torch.func.grad(lambda x: F.straight_through(x, "sign", window=(-1, 1)).sum())(x)
    assert torch.equal(ours, of_hardtanh)


def test_straight_through_keeps_nan():
    for name, options in (("round", {}), ("sign", {}), ("clamp", {"min": 0.0})):
        y, grad = passed([float("nan")], name, **options)
        assert y[0] != y[0]
        assert grad == [1.0]
    assert passed([float("nan")], "sign", window=(-9e9, 9e9))[1] == [0.0]


def test_straight_through_runs_the_quantizer_without_autograd():
    step = torch.tensor(0.5, requires_grad=True, device=DEVICE)
    x = torch.tensor([0.3], requires_grad=True, device=DEVICE)
    y = F.straight_through(x, lambda x: (x / step).round() * step)
    assert torch.autograd.grad(y.sum(), [x, step], allow_unused=True) == (
        torch.ones(1, device=DEVICE),
        None,
    )


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (("floor",), {}, ValueError, "expected quantizer to be one of round, sign, clamp, or"),
        (("clamp",), {}, ValueError, "expected a bound for clamp, got none"),
        (("sign",), {"window": (1, -1)}, ValueError, r"expected a window \(l, u\) with l ≤ u"),
        ((lambda x: x[0],), {}, ValueError, r"expected quantizer to return the input's shape \(2,"),
        ((lambda x: x.long(),), {}, TypeError, r"a tensor of dtype torch.float32, got torch.int64"),
        ((lambda x: 1.0,), {}, TypeError, r"a tensor of dtype torch.float32, got float"),
    ],
)
def test_straight_through_refuses(args, options, error, message):
    with pytest.raises(error, match=message):
        F.straight_through(torch.zeros(2, 3, device=DEVICE), *args, **options)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, torch.inf])
@pytest.mark.parametrize("dim", [None, -1, (0, 1)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_gradient_clip_from_the_norm_on(p, dim, scale):
    """Just within the norm a gradient passes bit for bit; just beyond, it comes out with the norm."""
    v = torch.randn(6, 50, device=DEVICE) * scale
    norms = torch.linalg.vector_norm(v.double(), p, dim)
    assert torch.equal(clipped(v, max_norm=norms.max().item() * 1.01, norm_type=p, dim=dim), v)
    limit = norms.min().item() * 0.99
    found = clipped(v, max_norm=limit, norm_type=p, dim=dim).double()
    torch.testing.assert_close(
        torch.linalg.vector_norm(found, p, dim), torch.full_like(norms, limit), rtol=1e-5, atol=0
    )
