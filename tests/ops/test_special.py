"""What is special to one op: rules of the mathematics or of torch that no generic test can know."""

import pytest
import torch
from torch import Tensor

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import HALF
from tests.ops.test_values import ENGINES
from torchbp.ops.losses.cross_entropy import cross_entropy


@pytest.mark.cpu("the kernels differ by device")
def test_triplets_of_short_rows_round_as_often_as_torchs():
    torch.manual_seed(0)
    rows = [torch.randn(64, 8) for _ in range(3)]

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in rows]
        return torch.cat(torch.autograd.grad(function(*leaves, reduction="sum"), leaves))

    torchs = torch.nn.functional.triplet_margin_loss
    truth = gradients(torchs, torch.float64)
    ours, theirs = (
        (gradients(f, torch.float32) - truth).abs().mean() for f in (F.triplet_margin_loss, torchs)
    )
    assert ours < 1.02 * theirs


@pytest.mark.cpu("the kernels differ by device")
@pytest.mark.parametrize(
    # of many, by torch's kernel, which sums in float32: 0.7 there
    ("dims", "share"),
    [((4, 8, 64), 0.5), ((16, 8, 32, 32), 0.8)],
    ids=["few", "many"],
)
def test_instance_norm_far_from_zero(dims, share):
    """The mean of what the rounding of μ leaves is seen in Σ s · x̂, unless it is taken out."""
    torch.manual_seed(0)
    x, g, w = torch.randn(dims) + 10, torch.randn(dims), torch.randn(dims[1])

    def gradients(function, dtype):
        x_, w_ = (t.to(dtype).requires_grad_() for t in (x, w))
        return torch.autograd.grad(function(x_, weight=w_), (x_, w_), g.to(dtype))

    truth = gradients(torch.nn.functional.instance_norm, torch.float64)
    ours, theirs = (
        [(a - b).abs().mean() for a, b in zip(gradients(f, torch.float32), truth, strict=True)]
        for f in (F.instance_norm, torch.nn.functional.instance_norm)
    )
    assert ours[0] < 1.3 * theirs[0]  # by 1/σ, which torch has from sums in float64
    assert ours[1] < share * theirs[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_layer_norm_sums_in_float32(dtype, threads, engine):
    """8192 rows of ones give a bias gradient of 8192, where a sum in bfloat16 stops at 256."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(8192, 16, device=DEVICE).to(dtype).requires_grad_()
        w = torch.ones(16, dtype=dtype, requires_grad=True, device=DEVICE)
        b = torch.zeros(16, dtype=dtype, requires_grad=True, device=DEVICE)
        with ENGINES[engine]():
            F.layer_norm(x, (16,), w, b).backward(torch.ones(8192, 16, dtype=dtype, device=DEVICE))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(b.grad, torch.full_like(b, 8192))
    exact = torch.nn.functional.layer_norm(x.detach().double(), (16,)).sum(0)
    torch.testing.assert_close(
        w.grad.double(), exact, rtol=torch.finfo(dtype).eps, atol=exact.abs().max().item() * 1e-5
    )


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_saturated_gradients_do_not_die_by_rounding(name, dtype):
    """Wherever the true derivative is a normal number, it is there to half a unit in the last place."""
    x = torch.linspace(-9, 9, 2001, device=DEVICE).to(dtype).requires_grad_()
    getattr(F, name)(x).sum().backward()
    wide = x.detach().double()
    s = wide.sigmoid() * (-wide).sigmoid()
    exact = s if name == "sigmoid" else 4 * (2 * wide).sigmoid() * (-2 * wide).sigmoid()
    normal = exact >= torch.finfo(dtype).smallest_normal
    error = ((x.grad.double() - exact).abs() / exact)[normal]
    assert error.max() <= 0.51 * torch.finfo(dtype).eps <= 0.005


def test_bce_gradient_keeps_its_tail():
    """In float32 σ(x) - 1 is 0 at x = 20; the gradient is not."""
    x = torch.tensor([20.0], requires_grad=True, device=DEVICE)
    F.binary_cross_entropy_with_logits(x, torch.ones(1, device=DEVICE)).backward()
    torch.testing.assert_close(
        x.grad, torch.tensor([-2.0611537e-09], device=DEVICE), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n", [0, 5], ids=["empty", "all-ignored"])
def test_cross_entropy_of_nothing(n, smoothing):
    """The mean over no position is NaN and its gradient 0, as in torch."""
    x = torch.randn(n, 4, requires_grad=True, device=DEVICE)
    loss = cross_entropy(x, torch.full((n,), -100, device=DEVICE), label_smoothing=smoothing)
    assert loss.isnan()
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_cross_entropy_of_minus_infinity():
    """A class ruled out by -inf has probability 0 and gradient 0."""
    x = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True, device=DEVICE)
    cross_entropy(x, torch.tensor([0], device=DEVICE)).backward()
    assert x.grad[0, 1] == 0
    torch.testing.assert_close(x.grad.sum(), torch.tensor(0.0, device=DEVICE))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9, 1e-4])
def test_dropout_draws_with_probability_p(p):
    n = 2_000_000
    dropped = (F.dropout(torch.ones(n, device=DEVICE), p) == 0).double().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_dropout_draws_neighbours_independently():
    """One 64-bit draw serves two elements: they must not know of each other, nor odd sizes of their padding."""
    m = (F.dropout(torch.ones(1_000_001, device=DEVICE), 0.5) == 0).double() - 0.5
    for lag in (1, 2, 3):
        assert abs((m[:-lag] * m[lag:]).mean().item() * 4) < 5e-3


def test_dropout_is_reproducible_and_drawn_anew():
    x = torch.ones(1000, device=DEVICE)
    torch.manual_seed(3)
    a, b = F.dropout(x), F.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(x), a)
    assert torch.equal(F.dropout(x), b)
    assert not torch.equal(a, b)


def test_dropout_leaves_alone_what_it_does_not_drop():
    x = torch.randn(5, device=DEVICE)
    assert F.dropout(x, 0.0) is x
    assert F.dropout(x, 0.5, training=False) is x
    assert torch.equal(F.dropout(x, 1.0), torch.zeros(5, device=DEVICE))


@pytest.mark.cpu("a GPU draws bytes of any number")
@pytest.mark.parametrize(("n", "each"), [(4095, 4), (4096, 1)], ids=["few", "many"])
def test_dropout_scales_what_it_keeps_by_number_or_byte(n, each):
    """Few elements keep their factors, many a byte: what is kept is scaled once, there and back."""
    from tests.ops.test_autograd import kept_storages, storage_bytes

    x, grad_y = torch.randn(n, requires_grad=True), torch.randn(n)
    y, kept = kept_storages(lambda x: F.dropout(x, 0.3), (x,))
    assert storage_bytes(kept) == n * each
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    factor = (y != 0) * (1 / (1 - 0.3))
    assert 0.6 < (y != 0).float().mean() < 0.8
    assert torch.equal(y, x * factor)
    assert torch.equal(grad_x, grad_y * factor)


def test_linear_keeps_only_what_a_gradient_needs():
    from tests.ops.test_autograd import kept_storages

    x, w = torch.randn(4, 3, requires_grad=True, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    _, kept = kept_storages(lambda x: F.linear(x, w), (x,))
    assert [t.data_ptr() for t in kept] == [w.data_ptr()], "a frozen weight needs no input"
    w.requires_grad_()
    _, kept = kept_storages(lambda w: F.linear(x.detach(), w), (w,))
    assert [t.data_ptr() for t in kept] == [x.data_ptr()], "data needs no weight"


def test_messages_say_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"linear: expected input of shape \(\*, 3\).*got \(4, 2\); "
    ):
        F.linear(torch.ones(4, 2, device=DEVICE), torch.ones(5, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"dropout: expected p in \[0, 1\], got 1\.5; "):
        F.dropout(torch.ones(1, device=DEVICE), 1.5)
    with pytest.warns(
        UserWarning, match=r"mse_loss: expected target of the input's shape \(3, 4\), got \(4,\)"
    ):
        F.mse_loss(torch.ones(3, 4, device=DEVICE), torch.ones(4, device=DEVICE))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["relu", "gelu", "linear", "layer_norm"])
def test_nested_tensors_are_torchs_own(name, layout):
    """A nested batch, as in a padded-free transformer, trains as with torch's functions."""
    w, b = torch.randn(4, 4, requires_grad=True, device=DEVICE), torch.randn(4, device=DEVICE)
    rest = {"linear": (w, b), "layer_norm": ((4,), b + 3, b)}.get(name, ())
    grads = []
    for functional in (F, torch.nn.functional):
        rows = [
            torch.ones(2, 4, requires_grad=True, device=DEVICE),
            torch.ones(3, 4, requires_grad=True, device=DEVICE),
        ]
        x = torch.nested.as_nested_tensor([2 * r for r in rows], layout=layout)
        getattr(functional, name)(x, *rest).to_padded_tensor(0.0).sin().sum().backward()
        grads.append([r.grad for r in rows])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sparse_tensors_are_torchs_own():
    x = torch.eye(3, device=DEVICE).to_sparse().requires_grad_()
    F.relu(x).to_dense().sum().backward()
    assert torch.equal(x.grad.to_dense(), torch.eye(3, device=DEVICE))
    w = torch.randn(2, 3, requires_grad=True, device=DEVICE)
    F.linear(torch.eye(3, device=DEVICE).to_sparse(), w).sum().backward()
    assert torch.equal(w.grad, torch.ones(2, 3, device=DEVICE))


class Quantized(Tensor):
    """As torchao's are: its ``__torch_function__`` knows a few of torch's functions, and what else comes it refuses."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, w, bias = args  # by place, as the layer passes them
            return x @ w.as_subclass(Tensor).T + bias + 1
        return NotImplemented


def test_a_class_that_answers_for_torchs_functions():
    x, w = torch.randn(2, 3, device=DEVICE), torch.randn(4, 3, device=DEVICE)
    layer = torchbp.nn.Linear(3, 4, device=DEVICE)
    layer.weight.requires_grad_(False)
    layer._parameters["weight"] = w.as_subclass(Quantized)  # as a Module's swapped weight
    torch.testing.assert_close(layer(x), x @ w.T + layer.bias + 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@pytest.mark.parametrize("name", ["softsign", "poisson_nll_loss", "gaussian_nll_loss"])
def test_masked_tensors_are_torchs_own(name):
    x = torch.rand(3, 4, device=DEVICE)
    rest = [torch.ones(3, 4, device=DEVICE)] * {"softsign": 0, "poisson_nll_loss": 1}.get(name, 2)
    masked = torch.masked.masked_tensor(x, x > 0.5)
    ours, theirs = (getattr(f, name)(masked, *rest) for f in (F, torch.nn.functional))
    torch.testing.assert_close(ours.to_tensor(0.0), theirs.to_tensor(0.0))


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "leaky_relu"])
def test_keeps_its_output_which_the_next_layer_keeps_anyway(name):
    from tests.ops.test_autograd import kept_storages

    x = torch.randn(4, 3, requires_grad=True, device=DEVICE)
    y, kept = kept_storages(getattr(F, name), (x,))
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.75)])
def test_local_response_norm_where_the_divisor_is_constant(alpha, beta):
    """It may be 0 to the power of 0 then: the function is x, and its gradient no NaN."""
    k = 0.0 if beta == 0 else 1.0
    x = torch.randn(1, 3, 4, dtype=torch.float64, device=DEVICE)
    x[0, 1] = 0
    x.requires_grad_()
    y = F.local_response_norm(x, 3, alpha, beta, k)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    _, tangent = torch.func.jvp(
        lambda t: F.local_response_norm(t, 3, alpha, beta, k), (x.detach(),), (torch.ones_like(x),)
    )
    assert torch.equal(tangent, torch.ones_like(x))
