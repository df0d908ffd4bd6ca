"""What is special about single losses: limits, warnings, bytes, and where torch's own values are not the reference."""

import inspect
import math
from functools import partial

import pytest
import torch

import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import HALF, make, with_args
from torchbp import nn
from torchbp.ops import _pieces
from torchbp.ops._op import all_ops
from torchbp.ops.losses import _index_cross_entropy

LOSSES = [
    op
    for op in all_ops().values()
    if ".losses." in inspect.getmodule(inspect.unwrap(op.function)).__name__
]

INF = math.inf


def gradient(function, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    x = x.detach().requires_grad_()
    function(x, *args, **kwargs).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("large", [op for op in LOSSES if not op.other_gradient], ids=repr)
def test_many_elements(large, monkeypatch):
    """Above the size from which values are summed by pieces: value and gradients of torch's loss in float64."""
    monkeypatch.setattr(_pieces, "_LARGE", 1 << 17)
    monkeypatch.setattr(_index_cross_entropy, "_PIECE", 1 << 11)
    results = []
    for function, dtype in ((large.function, torch.float32), (large.reference, torch.float64)):
        sample = large.benchmark(make(dtype), 300_000)
        if function is large.reference:  # on the CPU: one of torch's kernels for a GPU races
            sample = with_args(sample, lambda t: t.detach().cpu().requires_grad_(t.requires_grad))
        live = [t for t in sample.args if isinstance(t, torch.Tensor) and t.requires_grad]
        loss = function(*sample.args, **sample.kwargs)
        grads = torch.autograd.grad(loss, live)
        results.append([t.detach().cpu().double() for t in (loss, *grads)])
    (ours, *gradients), (exact, *wanted) = results
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"])
def test_broadcast_targets_warn_as_in_torch(name):
    x, t = torch.randn(3, 4, device=DEVICE), torch.randn(4, device=DEVICE)
    with pytest.warns(UserWarning, match=f"{name}: expected target of the input's shape"):
        ours = getattr(F, name)(x, t)
    with pytest.warns(UserWarning, match="Using a target size"):
        theirs = getattr(torch.nn.functional, name)(x, t)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("n", [6, 5000])
def test_a_sum_of_bytes_does_not_overflow(n):
    """The distance of two pictures: torch sums integers in int64."""
    x, target = torch.full((2, n), 200, dtype=torch.uint8, device=DEVICE)
    target = target - 150
    loss = F.l1_loss(x, target, reduction="sum")
    assert (loss.dtype, loss.item()) == (torch.int64, 150 * n)


def test_kl_div_mean_warns_as_in_torch():
    x, t = torch.randn(3, 4, device=DEVICE).log_softmax(1), torch.rand(3, 4, device=DEVICE)
    with pytest.warns(UserWarning, match="batchmean"):
        ours = F.kl_div(x, t)
    with pytest.warns(UserWarning, match="batchmean"):
        theirs = torch.nn.functional.kl_div(x, t)
    torch.testing.assert_close(ours, theirs)


def test_kl_div_of_an_impossible_class():
    """t = 0: no loss, no gradient for x, and the limit -∞ (torch: NaN) for t."""
    x, t = torch.tensor([-1.0, -2.0], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    torch.testing.assert_close(
        F.kl_div(x, t, reduction="none"), torch.tensor([0.0, 2.0], device=DEVICE)
    )
    assert gradient(F.kl_div, x, t, reduction="sum").tolist() == [0.0, -1.0]
    of_target = gradient(lambda t: F.kl_div(x, t, reduction="sum"), t)
    assert of_target[0] == -INF


def test_binary_cross_entropy_at_zero_and_one():
    """Where x = t is 0 or 1 the slope is ±1, not torch's 0; at the wrong end both are as in torch."""
    x, t = (
        torch.tensor([0.0, 1.0, 0.0, 1.0], device=DEVICE),
        torch.tensor([0.0, 1.0, 1.0, 0.0], device=DEVICE),
    )
    kwargs = {"reduction": "none"}
    ours = F.binary_cross_entropy(x, t, **kwargs)
    torch.testing.assert_close(ours, torch.nn.functional.binary_cross_entropy(x, t, **kwargs))
    slopes = gradient(F.binary_cross_entropy, x, t, reduction="sum")
    torch.testing.assert_close(slopes, torch.tensor([1.0, -1.0, -1e12, 1e12], device=DEVICE))


def test_soft_margin_does_not_overflow():
    x = torch.tensor([-1e30, -100.0, 100.0, INF, -INF], device=DEVICE)
    values = F.soft_margin_loss(x, torch.ones(5, device=DEVICE), reduction="none")
    torch.testing.assert_close(values, torch.tensor([1e30, 100.0, 0.0, 0.0, INF], device=DEVICE))
    slopes = gradient(F.soft_margin_loss, x, torch.ones(5, device=DEVICE), reduction="sum")
    torch.testing.assert_close(slopes, torch.tensor([-1.0, -1.0, 0.0, 0.0, -1.0], device=DEVICE))


def test_binary_cross_entropy_with_logits_keeps_small_gradients():
    """For t = 1 the slope is -σ(-x), far beyond the x where σ(x) rounds to 1."""
    x = torch.tensor([20.0, 30.0, 80.0], device=DEVICE)
    slopes = gradient(
        F.binary_cross_entropy_with_logits, x, torch.ones(3, device=DEVICE), reduction="sum"
    )
    torch.testing.assert_close(slopes, -torch.sigmoid(-x), rtol=1e-6, atol=0)
    slopes = gradient(
        F.binary_cross_entropy_with_logits, -x, torch.zeros(3, device=DEVICE), reduction="sum"
    )
    torch.testing.assert_close(slopes, torch.sigmoid(-x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1e30, INF])
def test_robust_losses_far_away(value):
    x, zero = torch.tensor([value, -value], device=DEVICE), torch.zeros(2, device=DEVICE)
    for name, slope in (("l1_loss", 1), ("huber_loss", 1), ("log_cosh_loss", 1)):
        function = getattr(F, name)
        assert gradient(function, x, zero, reduction="sum").tolist() == [slope, -slope]
        assert function(x, zero, reduction="none").tolist() == pytest.approx([value, value])


def test_hinge_embedding_of_infinite_distances():
    x = torch.tensor([INF, INF, -INF, -INF], device=DEVICE)
    t = torch.tensor([1.0, -1.0, 1.0, -1.0], device=DEVICE)
    assert F.hinge_embedding_loss(x, t, reduction="none").tolist() == [INF, 0.0, -INF, INF]
    assert gradient(F.hinge_embedding_loss, x, t, reduction="sum").tolist() == [1, 0, 1, -1]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("swap", [False, True])
def test_triplet_margin_of_empty_vectors(reduction, swap):
    vectors = [torch.zeros(3, 0, requires_grad=True, device=DEVICE) for _ in range(3)]
    y = F.triplet_margin_loss(*vectors, margin=2.0, swap=swap, reduction=reduction)
    assert y.tolist() == {"none": [2.0] * 3, "sum": 6.0, "mean": 2.0}[reduction]
    y.sum().backward()
    assert all(v.grad.shape == (3, 0) for v in vectors)


def test_gaussian_variance_below_its_floor():
    """As in torch the floor counts in the value, and lets the gradient through; second derivatives follow."""
    x, t = (
        torch.randn(5, dtype=torch.float64, device=DEVICE),
        torch.randn(5, dtype=torch.float64, device=DEVICE),
    )
    var = torch.full((5,), 1e-3, dtype=torch.float64, device=DEVICE)
    for function in (F.gaussian_nll_loss, torch.nn.functional.gaussian_nll_loss):
        v = var.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, t, v, eps=0.1), v, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), v)
        if function is F.gaussian_nll_loss:
            ours = first.detach(), second
    torch.testing.assert_close(ours, (first.detach(), second))


def test_focal_loss_without_focus_is_cross_entropy():
    x, t, w = (
        torch.randn(6, 4, device=DEVICE),
        torch.randint(4, (6,), device=DEVICE),
        torch.rand(4, device=DEVICE),
    )
    ours, theirs = F.focal_loss(x, t, w, gamma=0.0), F.cross_entropy(x, t, w)
    torch.testing.assert_close(ours, theirs)
    ours = gradient(F.focal_loss, x, t, w, gamma=0.0)
    torch.testing.assert_close(ours, gradient(F.cross_entropy, x, t, w))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_of_certain_classes(gamma):
    """p_t = 1 and p_t = 0 give the limits, without NaN."""
    x = torch.tensor([[200.0, 0.0], [0.0, 200.0]], device=DEVICE)
    slopes = gradient(
        F.focal_loss, x, torch.tensor([0, 0], device=DEVICE), gamma=gamma, reduction="sum"
    )
    torch.testing.assert_close(slopes, torch.tensor([[0.0, 0.0], [-1.0, 1.0]], device=DEVICE))
    logits, labels = (
        torch.tensor([INF, -INF, 1e30, -1e30], device=DEVICE),
        torch.tensor([1.0, 0.0, 1.0, 0.0], device=DEVICE),
    )
    right = gradient(F.sigmoid_focal_loss, logits, labels, alpha=None, gamma=gamma)
    assert right.tolist() == [0, 0, 0, 0]
    wrong = gradient(
        F.sigmoid_focal_loss, logits, 1 - labels, alpha=None, gamma=gamma, reduction="sum"
    )
    assert wrong.tolist() == [1, -1, 1, -1]


def test_z_loss_and_softcap_off_leave_no_trace():
    x, t = (
        torch.randn(6, 4, requires_grad=True, device=DEVICE),
        torch.randint(4, (6,), device=DEVICE),
    )
    plain = F.cross_entropy(x, t)
    off = F.cross_entropy(x, t, z_loss=0.0, softcap=None)
    assert plain.grad_fn.name() == off.grad_fn.name()
    assert torch.equal(plain, off)
    with pytest.raises(ValueError, match="softcap"):
        F.cross_entropy(x, t, softcap=0.0)


def test_z_loss_of_nothing_that_counts():
    x = torch.randn(3, 4, device=DEVICE)
    ignored = torch.full((3,), -100, device=DEVICE)
    assert (
        gradient(F.cross_entropy, x, ignored, z_loss=0.1, reduction="sum").tolist() == [[0] * 4] * 3
    )


def test_ctc_equals_torchs_behind_a_log_softmax():
    """Values and gradients of the logits, with torch, for sequences of all lengths; and its targets in a row."""
    steps, batch, classes = 30, 6, 8
    logits = torch.randn(steps, batch, classes, dtype=torch.float64, device=DEVICE)
    labels = torch.randint(1, classes, (batch, 10), device=DEVICE)
    times, lengths = (
        torch.randint(22, steps + 1, (batch,), device=DEVICE),
        torch.tensor([10, 0, 3, 10, 1, 7], device=DEVICE),
    )
    row = torch.cat([v[:n] for v, n in zip(labels, lengths, strict=True)])
    for reduction in ("mean", "sum", "none"):
        for targets in (labels, row):
            args = (targets, times, lengths, 0, reduction)
            results = []
            for function in (F.ctc_loss, torch.nn.functional.ctc_loss):
                x = logits.clone().requires_grad_()
                loss = function(x.log_softmax(2), *args)
                loss.sum().backward()
                results.append((loss.detach(), x.grad))
            torch.testing.assert_close(*results)


def test_ctc_without_a_path():
    x = torch.randn(2, 1, 3, device=DEVICE).log_softmax(2)
    args = (
        torch.tensor([[1, 1]], device=DEVICE),
        torch.tensor([2], device=DEVICE),
        torch.tensor([2], device=DEVICE),
    )
    assert F.ctc_loss(x, *args) == INF
    assert gradient(F.ctc_loss, x, *args).isnan().any()
    assert nn.CTCLoss(zero_infinity=True)(x, *args) == 0
    assert not gradient(F.ctc_loss, x, *args, zero_infinity=True).any()


def test_ctc_of_impossible_classes():
    """log 0 among the inputs gives no NaN."""
    x = torch.tensor(
        [[[0.0, -INF]], [[-INF, 0.0]], [[math.log(0.5), math.log(0.5)]]], device=DEVICE
    )
    args = (
        torch.tensor([[1]], device=DEVICE),
        torch.tensor([3], device=DEVICE),
        torch.tensor([1], device=DEVICE),
    )
    assert F.ctc_loss(x, *args).item() == pytest.approx(0, abs=1e-6)
    assert gradient(F.ctc_loss, x, *args).isfinite().all()


@pytest.mark.parametrize("value", [0.0, INF, -INF, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_multilabel_margin_of_rows_that_differ(dtype, value):
    """No, some and all classes in T, some twice, some behind a -1: loss and exact counts, also where x is no number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 60, generator=generator).to(dtype)
    target = torch.randint(0, 60, (90, 60), generator=generator)
    for row, length in enumerate(torch.randint(0, 20, (90,), generator=generator).tolist()):
        target[row, length : (60 if row % 2 else length + 1)] = -1
    target[:2] = torch.arange(60)
    if value:
        x[::3, ::7] = value
    results = []
    for function, a in (
        (F.multilabel_margin_loss, x.to(DEVICE)),
        (torch.nn.functional.multilabel_margin_loss, x.double()),
    ):
        t = target.to(a.device)
        loss = function(a, t, reduction="none")
        grad = gradient(partial(function, reduction="sum"), a, t) * 60
        results.append((loss.cpu(), grad.cpu().double()))
    (ours, counts), (exact, wanted) = results
    torch.testing.assert_close(ours, exact.to(dtype), rtol=torch.finfo(dtype).eps * 8, atol=0)
    torch.testing.assert_close(counts, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)


@pytest.mark.cpu("elsewhere nothing is looked at, and the kernels abort")
def test_margin_losses_name_a_wrong_index():
    with pytest.raises(
        RuntimeError, match=r"multi_margin_loss: expected class indices in \[0, 4\)"
    ):
        F.multi_margin_loss(torch.randn(2, 4, device=DEVICE), torch.tensor([0, 4], device=DEVICE))
    with pytest.raises(RuntimeError, match=r"multilabel_margin_loss: expected class indices in"):
        F.multilabel_margin_loss(
            torch.randn(4, device=DEVICE), torch.tensor([0, 4, -1, -1], device=DEVICE)
        )


@pytest.mark.cpu("elsewhere nothing is looked at, and the kernels abort")
@pytest.mark.parametrize("n", [3, 3000])
def test_values_out_of_range_are_named_among_few_and_many(n):
    """Few are checked by torch's kernels, many before: the message is ours."""
    p = torch.full((n, 8), 0.5, device=DEVICE)
    for name, args in (("input", (p * 3, p)), ("target", (p, -p))):
        with pytest.raises(RuntimeError, match=f"binary_cross_entropy: expected {name} values"):
            F.binary_cross_entropy(*args)
    for index in (-1, 8):
        with pytest.raises(RuntimeError, match="multi_margin_loss: expected class indices"):
            F.multi_margin_loss(p, torch.full((n,), index, device=DEVICE))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_few_ignores_and_weighs_as_torch(weighted, reduction):
    x = torch.randn(6, 4, requires_grad=True, device=DEVICE)
    target = torch.tensor([3, 1, 3, 0, 2, 3], device=DEVICE)
    w = torch.rand(4, device=DEVICE) if weighted else None
    grad_y = torch.randn(6 if reduction == "none" else (), device=DEVICE)
    ours, theirs = (
        torch.autograd.grad(f(x, target, w, ignore_index=3, reduction=reduction), x, grad_y)[0]
        for f in (F.cross_entropy, torch.nn.functional.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)
    assert not ours[target == 3].any()


LIMITS = {  # of what torch gives NaN for: name, options, x, t -> the loss of each
    "bce-logits": (
        "binary_cross_entropy_with_logits",
        {},
        [-INF, INF, INF],
        [0, 1, 0],
        [0, 0, INF],
    ),
    "multilabel": ("multilabel_soft_margin_loss", {}, [[-INF], [INF]], [[0], [1]], [0, 0]),
    "focal": ("sigmoid_focal_loss", {}, [-INF, INF, INF], [0, 1, 0], [0, 0, INF]),
    "kl": ("kl_div", {}, [-INF, -INF], [0, 1], [0, INF]),
    "kl-log": ("kl_div", {"log_target": True}, [-1, -INF, -INF], [-INF, -INF, 0], [0, 0, INF]),
    "poisson": ("poisson_nll_loss", {}, [-INF, -INF, INF], [0, 1, 2], [0, INF, INF]),
    "poisson-rate": ("poisson_nll_loss", {"log_input": False}, [INF, INF], [0, 2], [INF, INF]),
    "ce": ("cross_entropy", {}, [[0, -INF], [0, -INF]], [[1, 0], [0, 1]], [0, INF]),
    "distillation": (
        "distillation_loss",
        {},
        [[0, -INF], [0, -INF]],
        [[0, -INF], [0, 0]],
        [0, INF],
    ),
}


@pytest.mark.parametrize("way", ["few", "many", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_at_infinity(limit, dtype, way):
    """A class ruled out by -∞ costs nothing where the target rules it out, too; what is impossible costs ∞."""
    name, options, x, t, losses = LIMITS[limit]
    repeats = {"few": 1, "many": 1 << 17, "vmap": 1}[way]
    x, t = (
        torch.tensor(v, dtype=dtype, device=DEVICE).repeat_interleave(repeats, 0) for v in (x, t)
    )
    x.requires_grad_()
    want = torch.tensor(losses, dtype=dtype, device=DEVICE).repeat_interleave(repeats, 0)
    function = partial(getattr(F, name), **options)

    def call(x, reduction):
        if way == "vmap":
            return torch.vmap(lambda x: function(x, t, reduction=reduction))(x.unsqueeze(0))[0]
        return function(x, t, reduction=reduction)

    torch.testing.assert_close(call(x, "none"), want)
    assert call(x, "sum") == INF if INF in losses else call(x, "sum") == 0
    if INF not in losses:
        assert call(x, "mean") == 0
    (grad,) = torch.autograd.grad(call(x, "sum"), x)
    assert not grad[want == 0].isnan().any()


@pytest.mark.parametrize("limit", LIMITS)
def test_nan_is_no_limit(limit):
    """A logit that is NaN is told of."""
    name, options, x, t, _ = LIMITS[limit]
    x, t = (
        torch.full_like(torch.tensor(x, dtype=torch.float32, device=DEVICE), torch.nan),
        torch.tensor(t, device=DEVICE) * 1.0,
    )
    assert getattr(F, name)(x, t, reduction="sum", **options).isnan()


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("seed", [1.0, 0.3])
def test_what_is_ignored_does_not_count_in_half_precision(ignored, seed):
    x = torch.randn(5, 4, device=DEVICE).bfloat16().requires_grad_()
    target = torch.tensor([0, 1, ignored, 3, ignored], device=DEVICE)
    seed = torch.tensor(seed, dtype=torch.bfloat16, device=DEVICE)
    loss = F.nll_loss(x, target, ignore_index=ignored)
    (ours,) = torch.autograd.grad(loss, x, seed)
    want = torch.zeros_like(ours)
    for i in (0, 1, 3):
        want[i, target[i]] = -(seed.float() / 3).bfloat16()
    assert torch.equal(ours, want)
