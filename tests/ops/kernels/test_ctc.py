"""CTC compiled: values and gradients near the truth, what is odd left to the formula, bits that no thread changes."""

import pytest
import torch
from torch.testing import assert_close

import torchbp.functional as F
from tests.ops.kernels.conftest import opened
from torchbp.ops.kernels import _library, disabled, over_sequences, over_sequences_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
STEPS, N, C, S = 60, 9, 37, 17
INF = torch.inf


def arguments(blank=0, dtype=torch.float32, spelt=True):
    """Return log probabilities, and targets with repeats, of all lengths; some of them that nothing spells."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(STEPS, N, C, generator=generator)
    labels = torch.randint(C - 1, (N, S), generator=generator)
    labels += labels >= blank
    labels[:, 3] = labels[:, 2]
    labels[1] = labels[1, 0]
    times = torch.randint(2 * S + 1, STEPS + 1, (N,), generator=generator)
    lengths = torch.randint(1, S + 1, (N,), generator=generator)
    times[0], lengths[0], lengths[2], lengths[4] = STEPS, S, 0, 1
    if not spelt:
        times[5:8], lengths[5:8] = torch.tensor([3, 0, 0]), torch.tensor([9, 0, 2])
    return x.log_softmax(2).to(dtype).requires_grad_(), labels, times, lengths


def step(x, *rest, **options):
    values = F.ctc_loss(x, *rest, reduction="none", **options)
    v = torch.linspace(1, 2, N, dtype=x.dtype)
    return values.detach(), *torch.autograd.grad(values, x, v)


@pytest.fixture(scope="module", autouse=True)
def _library_of_ctc():
    with _library.recording() as sources:
        for dtype in DTYPES:
            step(*arguments(dtype=dtype))
    assert len(sources) == 2 * len(DTYPES)
    with opened(sources):
        yield


def taken(x, labels, times, lengths):
    with torch.no_grad():
        return over_sequences(x, labels, times, lengths, 0)


@dtypes
@pytest.mark.parametrize("blank", [0, 5])
@pytest.mark.parametrize("spelt", [True, False], ids=["spelt", "not-spelt"])
def test_near_the_truth(dtype, blank, spelt):
    x, *rest = arguments(blank, dtype, spelt)
    options = {"blank": blank, "zero_infinity": not spelt}
    made = step(x, *rest, **options)
    truth = step(x.detach().double().requires_grad_(), *rest, **options)
    eps = torch.finfo(dtype).eps
    for a, b in zip(made, truth, strict=True):
        error = 1e-5 if dtype == torch.float32 else eps
        assert_close(a.double(), b, rtol=eps, atol=error * b.abs().max().item())


def test_runs_compiled():
    x, *rest = arguments()
    assert taken(x, *rest) is not None
    with torch.no_grad():
        made = over_sequences_backward(x, torch.ones(N), *rest, 0, zero_infinity=False)
    assert made is not None


def test_as_the_formula_where_no_path_spells_the_target():
    x, *rest = arguments(spelt=False)
    made = step(x, *rest)
    with disabled():
        plain = step(x, *rest)
    assert made[0][5] == made[0][7] == INF
    assert made[0][6] == 0
    for a, b in zip(made, plain, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_as_the_formula_at_impossible_classes_and_nan():
    x, *rest = arguments()
    x = x.detach()
    x[:, 0, 0] = x[7, 1] = -INF
    x[9, 2, 0] = torch.nan
    x[9, 3, 1] = INF
    x.requires_grad_()
    made = step(x, *rest, zero_infinity=True)
    with disabled():
        plain = step(x, *rest, zero_infinity=True)
    assert made[0][2].isnan()
    for a, b in zip(made, plain, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_impossible_classes_are_taken():
    x, *rest = arguments()
    x = x.detach()
    x[:, 0, 0] = x[7, 1] = -INF
    assert taken(x, *rest) is not None


@pytest.mark.parametrize("label", [-1, C])
def test_a_label_that_is_no_class_is_refused(label):
    x, labels, *rest = arguments()
    labels[3, S - 1] = label
    assert taken(x, labels, *rest) is None
    with pytest.raises(RuntimeError, match="index"):
        F.ctc_loss(x, labels, *rest)


def test_many_steps_lose_few_digits():
    """α grows with T; what is kept of it does not."""
    x = torch.randn(3000, 2, 20, generator=torch.Generator().manual_seed(0))
    x = (4 * x).log_softmax(2).requires_grad_()
    labels = torch.arange(1, 11).repeat(2, 20)
    rest = labels, torch.tensor([3000, 2999]), torch.tensor([200, 1])

    def gradient(x):
        return torch.autograd.grad(F.ctc_loss(x, *rest), x)[0].double()

    truth = gradient(x.detach().double().requires_grad_())
    with disabled():
        plain = (gradient(x) - truth).abs().mean()
    assert (gradient(x) - truth).abs().mean() < plain / 10


def test_bits_do_not_depend_on_threads():
    x, *rest = arguments()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(step(x, *rest))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_differentiated_twice_by_the_formula():
    x, *rest = arguments()
    (g,) = torch.autograd.grad(F.ctc_loss(x, *rest), x, create_graph=True)
    (again,) = torch.autograd.grad(g.square().sum(), x)
    with disabled():
        (g,) = torch.autograd.grad(F.ctc_loss(x, *rest), x, create_graph=True)
        (plain,) = torch.autograd.grad(g.square().sum(), x)
    assert_close(again, plain)
