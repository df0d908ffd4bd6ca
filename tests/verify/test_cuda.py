"""gradcheck on CUDA tensors: the same answers, and nothing left behind. Run by ``--device cuda``."""

import copy
import gc
import json
import os

import pytest
import torch
from torch import nn
from torch.autograd import Function

import torchbp
from tests.device import DEVICE
from tests.verify import known
from tests.verify.alarms import KNOWN
from tests.verify.functions import FUNCTIONS
from tests.verify.unseen import every
from torchbp.cli import main
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make, over_tensors


@pytest.fixture(autouse=True)
def _alive():
    """After a fault of a kernel nothing runs any more: let pytest-xdist start another process."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


def there(values):
    """Return values with their tensors on the device, leaves again."""

    def move(t):
        return t.detach().to(DEVICE).requires_grad_(t.requires_grad)

    return over_tensors(move, values)


def check(function, inputs, **options):
    """Check, without compiling; where a function makes tensors of its own, these are on the device, too."""
    options = {"skip": ("compile",), "raise_exception": False, **options}
    inputs = there(inputs)
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).to(DEVICE)
    try:
        with torch.device(DEVICE):
            report = torchbp.gradcheck(function, inputs, **options)
    except Exception as error:
        if _is_of_the_cpu(str(error)):
            pytest.skip("a function of the CPU")
        raise
    if any(_is_of_the_cpu(f.message) for f in report.wrong):
        pytest.skip("a function of the CPU")
    failed = [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]
    assert not failed
    return report


def _is_of_the_cpu(message):
    told = ("on the same device", "is on cpu", "is on CPU", "for generator")
    return any(words in message for words in told)


ALARMS = {name.removeprefix("torchbp ") for name in KNOWN}


@pytest.mark.parametrize("op", all_ops().values(), ids=repr)
def test_ops(op):
    samples = (s for s in op.samples(Make()) if any(t.requires_grad for t in s.tensors()))
    sample = next(samples)
    skip = ("compile", "differences") if op.estimator else ("compile",)
    report = check(op.function, sample.args, kwargs=there(sample.kwargs), skip=skip)
    assert report or op.name in ALARMS, str(report)


def some(of, one_in):
    """Return every so-manieth: of these functions a GPU is no other than a CPU, but for what checks do there."""
    return [pytest.param(v, id=n) for k, (n, v) in enumerate(of.items()) if k % one_in == 0]


@pytest.mark.parametrize("pair", some(known.every(), 4))
def test_wrong_and_right(pair):
    reference = pair.reference if pair.needs_reference else None
    wrong = check(pair.wrong, pair.make(), reference=reference)
    assert not wrong, str(wrong)
    right = check(pair.right, pair.make(), reference=reference)
    assert right, str(right)


@pytest.mark.parametrize("pair", some(every(), 20))
def test_once_unseen(pair):
    wrong = check(pair.wrong, pair.make(), kwargs=there(pair.kwargs()))
    assert bool(wrong) == bool(pair.missed), str(wrong)
    right = check(pair.right, pair.make(), kwargs=there(pair.kwargs()))
    assert bool(right) == (pair.name not in KNOWN), str(right)


RIGHT = {n: f for n, f in FUNCTIONS.items() if n not in KNOWN}


@pytest.mark.parametrize("function", some({n: n for n in RIGHT}, 7))
def test_functions_of_torch(function):
    call, make = FUNCTIONS[function]
    report = check(call, make())
    assert report, str(report)


# --------------------------------------------------------------------------- what only a GPU has
def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_by_atomics_are_no_fault(dtype):
    """Thousands of terms in an order that differs from call to call, forward and backward."""
    places = torch.randint(3, (5000,), device=DEVICE)

    def segments(x):
        return torch.zeros(3, dtype=x.dtype, device=x.device).index_add(0, places, x)

    def gathered(x):
        return x[places] * torch.linspace(-1, 1, 5000, dtype=x.dtype, device=x.device)

    for function, size in ((segments, 5000), (gathered, 3)):
        report = check(function, (normal(size, dtype=dtype),))
        assert report, str(report)


def test_probabilities_stay_probabilities():
    """A kernel of torch's asserts that, and would end the process."""
    p, t = (torch.rand(3, 4, dtype=torch.float64, device=DEVICE) for _ in "pt")
    p = p.mul(0.8).add(0.1).requires_grad_()
    report = check(torch.nn.functional.binary_cross_entropy, (p, t))
    assert report, str(report)
    torch.cuda.synchronize()


class Single(Function):
    """A kernel that takes float32 alone, with atomics in its backward."""

    @staticmethod
    def forward(ctx, x, places):
        assert x.dtype is torch.float32
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x[places]

    @staticmethod
    def backward(ctx, *grads):
        (places,) = ctx.saved_tensors
        return torch.zeros(ctx.size, device=places.device).index_add(0, places, grads[0]), None


def test_a_kernel_of_float32_alone():
    places = torch.randint(4, (3000,), device=DEVICE)
    report = check(Single.apply, (normal(4, dtype=torch.float32), places))
    assert report, str(report)


def masked(again):
    class Masked(Function):
        """Dropout, of which the wrong one draws another mask in backward."""

        @staticmethod
        def forward(ctx, x):
            mask = (torch.rand_like(x) > 0.5).to(x.dtype)
            ctx.save_for_backward(mask)
            return 2 * x * mask

        @staticmethod
        def backward(ctx, *grads):
            (mask,) = ctx.saved_tensors
            mask = (torch.rand_like(mask) > 0.5).to(mask.dtype) if again else mask
            return 2 * grads[0] * mask

    return Masked.apply


def test_what_draws_from_the_gpus_generator():
    x = normal(8, 8)
    right = check(masked(False), (x,))
    assert right, str(right)
    assert "no random numbers" not in str(right.wrong)
    assert not check(masked(True), (x,))


@pytest.mark.parametrize("seed", [torch.manual_seed, torch.cuda.manual_seed], ids=["all", "cuda"])
def test_a_backward_that_reseeds(seed):
    class Reseeds(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            seed(0)
            return grads[0] * 2

    report = check(Reseeds.apply, (normal(3, 4),), checks="random_state")
    assert [f.check for f in report.wrong] == ["random_state"]


def test_a_gradient_on_another_device():
    class Elsewhere(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            return (grads[0] * 2).cpu()

    report = torchbp.gradcheck(Elsewhere.apply, (normal(3, 4),), raise_exception=False)
    assert not report
    assert "cuda:0" in str(report)
    assert "cpu" in str(report)


def test_autocast_is_the_gpus():
    seen = set()

    def function(x, w):
        seen.add((torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")))
        return x @ w

    assert check(function, (normal(3, 4), normal(4, 2)), checks="autocast")
    assert seen == {(False, False), (True, False)}


def test_a_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().to(DEVICE)
    report = check(model, (normal(5, 3),))
    assert report, str(report)


def test_compiled():
    report = torchbp.gradcheck(
        lambda x: torch.tanh(x) * x, (normal(3, 4),), checks="compile", raise_exception=False
    )
    assert report, str(report)


def test_where_the_default_device_is_the_gpu():
    with torch.device(DEVICE):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        report = check(torchbp.functional.gelu, (x,))
    assert report, str(report)


def test_nothing_is_left_behind():
    """Neither memory, nor another state of a generator."""
    x = normal(16, 16)

    def run():
        assert check(torchbp.functional.silu, (x,))
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.get_rng_state(), torch.get_rng_state()

    torch.manual_seed(7)
    state = torch.cuda.get_rng_state(), torch.get_rng_state()
    first = run()
    torch.rand(2, device=DEVICE)
    torch.rand(2)
    moved = torch.cuda.get_rng_state(), torch.get_rng_state()
    second = run()
    assert first[0] == second[0]
    for got, want in zip((*first[1:], *second[1:]), (*state, *moved), strict=True):
        assert torch.equal(got, want)


def test_command(tmp_path, capsys):
    path = tmp_path / "under_test.py"
    path.write_text(
        "import torch\n"
        "class Double(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        assert x.is_cuda\n"
        "        return x * 1\n"
        "    @staticmethod\n"
        "    def backward(ctx, g): return 2 * g\n"
        "def right(x):\n"
        "    assert x.is_cuda\n"
        "    return x * x\n"
    )
    arguments = ["--shape", "3,4", "--device", DEVICE]
    assert main(["gradcheck", f"{path}:right", *arguments]) == 0
    out = tmp_path / "report.json"
    assert main(["gradcheck", f"{path}:Double", *arguments, "--json", str(out)]) == 1
    assert not json.loads(out.read_text())["ok"]
    printed = capsys.readouterr().out
    assert "factor 2 too large" in printed
    line = next(part for part in printed.splitlines() if "repeat:" in part).partition("torchbp ")[2]
    assert "--device cuda" in line
    assert main(line.split()) == 1
