"""What is special to activations: limits at infinity, in-place names, half precision, draws."""

import pytest
import torch
from torch.func import grad, vmap

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import HALF
from tests.ops.test_values import ENGINES
from torchbp.ops._function import formula_only
from torchbp.ops._invalid import at_hand, sound
from torchbp.ops._op import all_ops
from torchbp.ops.activations._infinities import known_finite, limited

INF = torch.inf
GATES = ["silu", "gelu", "mish", "hardswish", "quick_gelu"]


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_limits_at_infinity_on_every_way(name, dtype):
    """Formula, torch.func, and finite neighbours: the kernels' NaN at ±∞ is nowhere left."""
    f = getattr(F, name)
    x = torch.tensor(
        [INF, -INF, 1.5, -2000.0, 2000.0], dtype=dtype, requires_grad=True, device=DEVICE
    )
    y = f(x)
    limits = torch.tensor([INF, 0.0, 0.0, 0.0, 2000.0], dtype=dtype, device=DEVICE)
    slopes = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0], dtype=dtype, device=DEVICE)
    alone = x.detach()[2].requires_grad_()
    limits[2] = f(alone)
    (slopes[2],) = torch.autograd.grad(f(alone), alone)
    torch.testing.assert_close(y.detach(), limits)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], slopes)
    with formula_only():
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slopes)
    torch.testing.assert_close(vmap(f)(x.detach()), limits)
    torch.testing.assert_close(vmap(grad(f))(x.detach()), slopes)
    assert f(x.detach() * torch.nan).isnan().all()


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu"])
def test_gated_limits_at_infinity(name):
    x = torch.tensor(
        [-INF, INF, 1.0, 3.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True, device=DEVICE
    )
    y = getattr(F, name)(x)
    assert y[:2].tolist() == [0.0, INF]
    y.sum().backward()
    assert x.grad[:2].tolist() == [0.0, 2.0]
    assert x.grad[3:5].tolist() == [0.0, INF]


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    """How many: on one it is the processor that tells whether a kernel made a NaN."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.cpu("a flag of its processor")
def test_what_is_looked_at_is_never_taken_for_finite(threads):
    for bad in (INF, -INF, torch.nan):
        for dtype in (torch.float32, *HALF):
            many, some = (
                torch.zeros(5000, dtype=dtype, device=DEVICE),
                torch.zeros(100, dtype=dtype, device=DEVICE),
            )
            many[37] = some[37] = bad
            assert not known_finite(many)
            assert not known_finite(many.view(10, -1).T)
            for y in (some, some.view(10, -1).T):
                assert known_finite(y) is None
            for x in (some, some.view(10, -1).T, many):
                y = x * 0.0  # as a kernel makes it
                assert limited(y, x, None) is not y or (bad != bad and at_hand())
            assert known_finite(torch.randn(5000, device=DEVICE).to(dtype)) is (
                None if at_hand() else True
            )
    many[38] = -many[37]
    assert not known_finite(many)
    assert known_finite(torch.ones(5000, device=DEVICE), many=False) is (
        None if at_hand() else False
    )
    assert limited(many, many, False) is not many
    empty = torch.empty(0, device=DEVICE)
    assert limited(empty, empty, None) is empty


@pytest.mark.cpu("a flag of its processor")
def test_the_flag_of_an_invalid_operation_is_at_hand_on_one_thread(threads):
    """Where it is not, on another system, everything is looked at, and only time is lost."""
    assert at_hand() == (threads == 1)


@pytest.mark.cpu("a flag of its processor")
@pytest.mark.parametrize("n", [3, 5000])
def test_a_flag_that_another_operation_raised_is_cleared(threads, n):
    fine, bad = torch.ones(n, device=DEVICE), torch.full((n,), torch.nan, device=DEVICE)
    torch.full((n,), INF, device=DEVICE).mul_(0.0)  # raises it
    assert sound(fine)
    if at_hand():
        assert sound(bad)  # not made by an invalid operation: NaN that came in
        torch.full((n,), INF, device=DEVICE).mul_(0.0)
    assert not sound(bad)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("n", [8, 5000])
def test_limits_among_few_and_many(name, n, threads):
    """What is looked at is what the kernels gave: a whole tensor, by one way or another."""
    x = torch.ones(n, device=DEVICE)
    x[:3] = torch.tensor([INF, -INF, torch.nan], device=DEVICE)
    x.requires_grad_()
    y = getattr(F, name)(x)
    assert y[:2].tolist() == [INF, 0.0]
    (slopes,) = torch.autograd.grad(y.sum(), x)
    assert slopes[:2].tolist() == [1.0, 0.0]
    assert slopes[3:].isfinite().all()


@pytest.mark.parametrize("name", [*GATES, "swiglu", "geglu", "softsign"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_one_infinity_at_any_place_of_many(name, dtype, threads):
    """No vector and no rest of one escapes the look."""
    for n in (66, 2050):
        for place in (0, n // 4, n // 2 - 1):  # of a gate that is the first half
            for infinity in (INF, -INF):
                x = torch.ones(n, dtype=dtype, device=DEVICE)
                x[place] = infinity
                x.requires_grad_()
                y = getattr(F, name)(x)
                assert not y.isnan().any()
                (slopes,) = torch.autograd.grad(y.sum(), x)
                assert not slopes.isnan().any()


IN_PLACE = {
    "relu_": (),
    "elu_": (0.7,),
    "celu_": (0.7,),
    "selu_": (),
    "hardtanh_": (-0.5, 0.7),
    "leaky_relu_": (0.3,),
    "threshold_": (0.1, -0.2),
    "rrelu_": (0.1, 0.3),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_in_place_names(name, dtype):
    """F.elu_ and its like write into their argument, with torch's gradient."""
    leaf = torch.randn(5, 7, dtype=dtype, requires_grad=True, device=DEVICE)
    results = []
    for module in (F, torch.nn.functional):
        x = leaf * 1
        y = getattr(module, name)(x, *IN_PLACE[name])
        assert y.data_ptr() == x.data_ptr()
        results.append((y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
    (y, g), (z, h) = results
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(g, h)
    assert name == "leaky_relu_" or name == "relu_" or "torchbp" in getattr(F, name).__module__


def test_threshold_in_place_with_a_value_above_it():
    """There the output does not tell which values passed: the input is copied."""
    leaf = torch.randn(50, dtype=torch.float64, requires_grad=True, device=DEVICE)
    (ours,) = torch.autograd.grad(F.threshold(leaf * 1, 0.1, 0.5, True).sum(), leaf)
    assert torch.equal(ours, (leaf > 0.1).double())


@pytest.mark.parametrize("name", ["elu", "celu", "hardtanh"])
def test_in_place_keeps_its_sign_or_refuses(name):
    leaf = torch.randn(5, requires_grad=True, device=DEVICE)
    if name == "hardtanh":
        with pytest.raises(ValueError, match="hardtanh: expected min_val <= max_val"):
            F.hardtanh_(leaf * 1, 1.0, -1.0)
        return
    with pytest.raises(RuntimeError, match=f"{name}: expected alpha >= 0 with inplace=True"):
        getattr(F, name + "_")(leaf * 1, -0.5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["elu", "celu", "selu", "softsign", "softplus", "logsigmoid"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_gradients_do_not_die_by_rounding(name, dtype, inplace):
    """To half a unit in the last place wherever the true derivative is a normal number."""
    if inplace and name not in ("elu", "celu", "selu"):
        pytest.skip("no in-place form")
    f, kwargs = getattr(F, name), {"inplace": True} if inplace else {}
    x = torch.linspace(-9, 9, 2001, device=DEVICE).to(dtype).requires_grad_()
    f(x * 1, **kwargs).sum().backward()
    wide = x.detach().double().requires_grad_()
    getattr(torch.nn.functional, name)(wide).sum().backward()
    normal = wide.grad >= torch.finfo(dtype).smallest_normal
    error = ((x.grad.double() - wide.grad).abs() / wide.grad)[normal]
    assert error.max() <= 0.51 * torch.finfo(dtype).eps <= 0.005


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_hardtanh_bounds_between_half_precision_numbers(dtype, inplace):
    """0.7 in bfloat16 and 0.53 in float16 round towards 0: what is cut there must not pass a gradient."""
    bound = 0.7 if dtype == torch.bfloat16 else 0.53
    leaf = torch.tensor([3.0, -3.0, 0.2], dtype=dtype, requires_grad=True, device=DEVICE)
    F.hardtanh(leaf * 1, -bound, bound, inplace).sum().backward()
    assert leaf.grad.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 4, 2)], ids=str)
def test_softmax_without_dim_chooses_and_warns_as_torch(name, shape):
    x = torch.randn(shape, device=DEVICE)
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name}") as ours:
        y = getattr(F, name)(x)
    assert ours[0].filename == __file__
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        torch.testing.assert_close(y, getattr(torch.nn.functional, name)(x))


def test_softmax2d_refuses_what_is_no_image():
    with pytest.raises(ValueError, match=r"Softmax2d: expected input of shape \(N, C, H, W\)"):
        torchbp.nn.Softmax2d()(torch.randn(3, 4, device=DEVICE))


def test_softmax_of_minus_infinity():
    x = torch.tensor([[1.0, -INF, 2.0]], requires_grad=True, device=DEVICE)
    y = F.softmax(x, 1)
    y[0, 0].backward()
    assert y[0, 1] == 0
    assert x.grad[0, 1] == 0
    assert x.grad.isfinite().all()


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    x = torch.randn(200, 9, dtype=torch.float64, device=DEVICE)
    y = F.sparsemax(x)
    torch.testing.assert_close(y.sum(1), torch.ones(200, dtype=torch.float64, device=DEVICE))
    assert (y >= 0).all()
    assert 0 < (y == 0).double().mean() < 1
    # The condition of a projection on a convex set, against its corners: (x - y) · (corner - y) <= 0.
    along = (x - y) - ((x - y) * y).sum(1, keepdim=True)
    assert along.max() <= 1e-12


def test_sparsemax_far_from_zero():
    x = torch.tensor([1e8, 1e8 + 8, 0.0], device=DEVICE)
    assert F.sparsemax(x).tolist() == [0.0, 1.0, 0.0]
    assert F.sparsemax(torch.tensor([0.0, -INF, 0.0], device=DEVICE)).tolist() == [0.5, 0.0, 0.5]


def test_rrelu_draws_between_its_bounds():
    n = 100_000
    y = F.rrelu(-torch.ones(n, dtype=torch.float64, device=DEVICE), 0.2, 0.6, training=True)
    slopes = -y
    assert slopes.min() >= 0.2
    assert slopes.max() <= 0.6
    assert abs(slopes.mean().item() - 0.4) < 5 * 0.4 / (12 * n) ** 0.5
    assert slopes.unique().numel() > 0.99 * n
    assert torch.equal(
        F.rrelu(torch.ones(5, device=DEVICE), training=True), torch.ones(5, device=DEVICE)
    )


def test_gumbel_softmax_hard_is_one_hot_with_the_soft_gradient():
    x = torch.randn(20, 5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    grads = []
    v = torch.randn(20, 5, dtype=torch.float64, device=DEVICE)
    for hard in (False, True):
        torch.manual_seed(3)
        y = F.gumbel_softmax(x, 0.7, hard=hard)
        grads.append(torch.autograd.grad(y, x, v)[0])
    torch.testing.assert_close(y.sum(1), torch.ones(20, dtype=torch.float64, device=DEVICE))
    assert ((y - y.round()).abs() < 1e-12).all()
    torch.testing.assert_close(*grads)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.nn.functional.gumbel_softmax(x, 0.7, hard=True), y)


def test_gumbel_softmax_warns_of_eps():
    with pytest.warns(UserWarning, match="gumbel_softmax: expected no eps, got 0.1"):
        F.gumbel_softmax(torch.zeros(2, device=DEVICE), eps=0.1)


def test_torchs_own_derivatives_are_still_rounded():
    """The two records that name a reference of their own say why: torch's float64 gradient has a float32 constant."""
    for name, args in (("hardsigmoid", ()), ("celu", (1.7,))):
        x = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True, device=DEVICE)
        theirs = torch.autograd.grad(getattr(torch.nn.functional, name)(x, *args), x)[0]
        exact = torch.autograd.grad(all_ops()[name].reference(x, *args), x)[0]
        assert 1e-10 < abs(theirs / exact - 1).item() < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7])
def test_bounds_are_not_rounded_before_they_are_compared(bound, dtype, engine):
    """Half precision, at the number next to the bound: the derivative is that of torch's kernel."""
    near = torch.tensor([bound, -bound, 0.99 * bound, 1.01 * bound], dtype=dtype, device=DEVICE)
    for name, settings in (("threshold", (bound, 9.0)), ("hardtanh", (-bound, bound))):
        grads = []
        for functional in (F, torch.nn.functional):
            x = near.clone().requires_grad_()
            with ENGINES[engine]():
                getattr(functional, name)(x, *settings).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads), name


@pytest.mark.cpu("oneDNN")
def test_tanh_of_many_elements():
    """Where oneDNN computes it: near the truth, right at the edges, and the same bits wherever an element stands."""
    edges = torch.tensor(
        [0.0, -0.0, INF, -INF, torch.nan, 1e-40, -1e-30, 1e30, 9.5], device=DEVICE
    ).repeat(64)
    x = torch.cat(
        [edges, torch.randn(1 << 15, device=DEVICE), torch.logspace(-30, 1, 1 << 10, device=DEVICE)]
    )
    y, truth = F.tanh(x), x.double().tanh()
    torch.testing.assert_close(y.double(), truth, rtol=3e-7, atol=0, equal_nan=True)
    assert torch.equal(y.signbit(), x.signbit() & ~x.isnan() | y.signbit() & x.isnan())
    part = F.tanh(x[7 : 7 + (1 << 14)])
    assert torch.equal(part.nan_to_num(5), y[7 : 7 + (1 << 14)].nan_to_num(5))
