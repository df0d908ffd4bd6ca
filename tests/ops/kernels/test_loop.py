"""A formula compiled: any layout, dtype and length that a loop takes, and what it leaves to the formula itself."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

import torchbp.functional as F
from torchbp.ops._symbols import steps
from torchbp.ops.activations import _infinities
from torchbp.ops.kernels import SUM, _library, _loop, at_hand, disabled, in_one_loop, looped

N = _loop.MANY + 77  # neither whole blocks nor whole vectors
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
names = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def swish(v, x):
    return v * torch.sigmoid(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("n", [N, _loop.MANY, 3 * 32768 + 1])
def test_computes_in_float32_and_rounds_once(compiled, dtype, n):
    v, x = random(n, dtype=dtype), random(n, dtype=dtype, seed=1)
    compiled(lambda: in_one_loop(swish, v, x))
    made = in_one_loop(swish, v, x)
    truth = swish(v.double(), x.double())
    assert made.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(made.double(), truth, rtol=0.51 * eps + 3e-7, atol=torch.finfo(dtype).tiny * eps)


def test_bits_depend_on_no_place_and_no_threads(compiled):
    x = random(1).expand(5 * 32768 + 3).clone()
    v = random(x.numel(), seed=1)
    compiled(lambda: in_one_loop(swish, v, x))
    made = in_one_loop(swish, x, x)
    assert torch.equal(made, made[:1].expand_as(made))
    alone = in_one_loop(swish, v, x)
    total = None
    compiled(lambda: in_one_loop(swish, v, x, outputs=(SUM,)))
    total = in_one_loop(swish, v, x, outputs=(SUM,))
    torch.set_num_threads(2)
    try:
        assert torch.equal(in_one_loop(swish, v, x, outputs=(SUM,)), total)
        compiled(lambda: in_one_loop(swish, v, x))
        assert torch.equal(in_one_loop(swish, v, x), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", ["whole", "tail"])
def test_sums_keep_their_digits(compiled, value):
    n = (1 << 20) + (5 if value == "tail" else 0)
    x = torch.full((n,), 0.1)
    compiled(lambda: in_one_loop(torch.square, x, outputs=(SUM,)))
    total = in_one_loop(torch.square, x, outputs=(SUM,))
    assert total.shape == ()
    assert_close(total.double(), x.double().square().float().double().sum(), rtol=1e-7, atol=0)


def test_several_outputs_each_of_a_dtype_of_its_own(compiled):
    def formula(x, t):
        d = x - t
        return d.abs(), d.sign(), d

    x, t = random(N), random(N, seed=1)
    t[::7] = x[::7]
    outputs = (SUM, torch.int8, None)
    compiled(lambda: in_one_loop(formula, x, t, outputs=outputs))
    total, sign, d = in_one_loop(formula, x, t, outputs=outputs)
    assert torch.equal(d, x - t)
    assert sign.dtype == torch.int8
    assert torch.equal(sign, (x - t).sign().to(torch.int8))
    assert_close(total, (x - t).abs().sum())


@pytest.mark.parametrize("of", [torch.int8, torch.bool], ids=names)
def test_signs_may_come_first_and_truths_come_out(compiled, of):
    def formula(sign, v):
        y = sign * v
        return y, y > 0

    sign, v = random(N).sign().to(of), random(N, seed=1)
    outputs = (torch.float32, torch.bool)
    compiled(lambda: in_one_loop(formula, sign, v, outputs=outputs))
    for made, truth in zip(
        in_one_loop(formula, sign, v, outputs=outputs), formula(sign, v), strict=True
    ):
        assert made.dtype == truth.dtype
        assert torch.equal(made, truth)
    with _library.recording() as asked:
        assert in_one_loop(torch.mul, sign, v) is None
    assert not asked, "no value is rounded to an integer"


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.view(3, -1, 4).transpose(0, 2),
        lambda x: x.view(2, 3, -1, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "channels_last"],
)
def test_takes_any_layout_that_all_have(compiled, layout):
    x, v = (layout(random(12 * 2048, seed=s)) for s in (0, 1))
    compiled(lambda: in_one_loop(torch.mul, v, x))
    made = in_one_loop(torch.mul, v, x)
    assert made.stride() == x.stride()
    assert torch.equal(made, v * x)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1, 1), (700,), (5, 1), (7, 1, 1), (1, 5, 1), (5, 700)], ids=str
)
def test_numbers_are_spread_over_dimensions(compiled, dtype, shape):
    x = random(7, 5, 700, dtype=dtype)
    w = random(*shape, dtype=dtype, seed=1)
    compiled(lambda: in_one_loop(torch.mul, x, w))
    assert torch.equal(in_one_loop(torch.mul, x, w), (x.float() * w.float()).to(dtype))


def halves(x, dim):
    return x.chunk(2, dim)


ROWS = [  # (shape, dim): rows as long as a block, shorter, longer, and of no whole blocks
    ((64, 2 * 512), 1),
    ((500, 2 * 40), -1),
    ((9, 2 * 2500), 1),
    ((7, 2 * 5, 501), 1),
    ((2 * 6, 3001), 0),
    ((300, 1, 2 * 60), 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("shape", "dim"), ROWS, ids=str)
def test_takes_and_writes_the_halves_of_a_tensor(compiled, dtype, shape, dim):
    def formula(v, a, b):
        return v * b, v * a

    x = random(*shape, dtype=dtype)
    a, b = halves(x, dim)
    v = random(*a.shape, dtype=dtype, seed=1)
    compiled(lambda: in_one_loop(torch.mul, a, b))
    y = in_one_loop(torch.mul, a, b)
    assert y.is_contiguous()
    assert torch.equal(y, (a.float() * b.float()).to(dtype))
    grad = torch.full_like(x, torch.nan)
    into = halves(grad, dim)
    compiled(lambda: in_one_loop(formula, v, a, b, outputs=into))
    made = in_one_loop(formula, v, a, b, outputs=into)
    assert made == into
    truth = torch.cat([(v.float() * b.float()), (v.float() * a.float())], dim).to(dtype)
    assert torch.equal(grad, truth)


def test_a_value_beside_what_is_written_into_rows(compiled):
    x = random(300, 2 * 70)
    a, b = halves(x, 1)
    room = torch.full_like(x, torch.nan)
    outputs = (SUM, room[:, 70:], None)

    def formula(a, b):
        return a * b, a - b, a + b

    compiled(lambda: in_one_loop(formula, a, b, outputs=outputs))
    total, made, y = in_one_loop(formula, a, b, outputs=outputs)
    assert_close(total, (a * b).sum())
    assert made is outputs[1]
    assert torch.equal(made, a - b)
    assert torch.equal(y, a + b)
    assert room[:, :70].isnan().all(), "the gaps are left as they are"


def test_rows_that_are_repeated_are_read_but_not_written(compiled):
    x = random(400, 64)
    row = random(1, 64, seed=1).expand(400, 64)
    compiled(lambda: in_one_loop(torch.mul, x, row))
    assert torch.equal(in_one_loop(torch.mul, x, row), x * row)
    room = torch.empty_like(x)
    compiled(lambda: in_one_loop(torch.mul, x, x, outputs=(room,)))
    assert in_one_loop(torch.mul, x, x, outputs=(room,)) is room
    assert in_one_loop(torch.mul, x, x, outputs=(row,)) is None
    assert in_one_loop(torch.mul, x, x, outputs=(random(400, 63),)) is None


def test_the_halves_of_channels_last_are_left_to_the_formula(compiled):
    x = random(2, 8, 64, 64).to(memory_format=torch.channels_last)
    compiled(lambda: in_one_loop(torch.exp, x))
    assert in_one_loop(torch.exp, x) is not None
    assert in_one_loop(torch.exp, x.chunk(2, 1)[0]) is None


def test_a_gradient_that_is_the_same_for_all(compiled):
    v, x = torch.tensor(0.5).expand(N), random(N)
    compiled(lambda: in_one_loop(swish, v, x))
    assert_close(in_one_loop(swish, v, x), 0.5 * torch.sigmoid(x))


def test_one_kernel_serves_all_numbers_that_a_formula_closes_over(compiled):
    def scaled(a, b):
        return lambda x: torch.where(x > a, x, x * (a * b))

    x = random(N)
    compiled(lambda: in_one_loop(scaled(0.5, 0.5), x))
    for a, b in ((0.5, 0.5), (-1.0, 0.25), (0.1, 3.0)):
        assert_close(in_one_loop(scaled(a, b), x), scaled(a, b)(x), rtol=2e-7, atol=0)
    compiled(lambda: in_one_loop(partial(torch.sub, alpha=2.0), x, x))
    assert_close(in_one_loop(partial(torch.sub, alpha=3.0), x, x), -2 * x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=names)
def test_every_half_precision_number_goes_in_and_out(compiled, dtype):
    x = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    compiled(lambda: in_one_loop(torch.abs, x))
    assert_close(in_one_loop(torch.abs, x), x.abs(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=names)
def test_rounds_to_the_nearest_even(compiled, dtype):
    x = torch.arange(1 << 16).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    wide = torch.cat([x.float()] * 3)
    next_ = torch.nextafter(wide, torch.tensor(torch.inf))
    s = torch.linspace(0.9, 1.1, 3).repeat_interleave(x.numel())
    half_up = (x.view(torch.int16) + 1).view(dtype).float()
    between = torch.cat([(x.float() + half_up) / 2, next_[: x.numel()], x.float()]) * s
    between = between[between.isfinite()]
    # a half-precision first argument, whose place the float32 one takes
    compiled(lambda: in_one_loop(lambda _, y: y, between.to(dtype), between))
    made = in_one_loop(lambda _, y: y, between.to(dtype), between)
    assert torch.equal(made, between.to(dtype))


def test_edges_are_those_of_the_formula(compiled):
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38, 1e-38]
    x = torch.tensor(edges).repeat_interleave(len(edges)).repeat(400)
    t = torch.tensor(edges).repeat(len(edges)).repeat(400)

    def formula(x, t):
        kept = torch.clamp(x, -1.0, 1.0), torch.where(x > t, x, t), torch.relu(t), x.sign()
        return *kept, (x - t).abs()

    compiled(lambda: in_one_loop(formula, x, t, outputs=(None,) * 5))
    for made, truth in zip(
        in_one_loop(formula, x, t, outputs=(None,) * 5), formula(x, t), strict=True
    ):
        assert_close(made, truth, rtol=0, atol=0, equal_nan=True)


def test_leaves_to_the_formula_what_a_loop_does_not_take(compiled):
    x = random(N)
    compiled(lambda: in_one_loop(torch.exp, x))
    assert looped(x)
    assert in_one_loop(torch.exp, x) is not None
    some = random(2 * N)[::2]
    for other in (
        x[:16],
        x.double(),
        some,
        x.requires_grad_(False).to("meta"),
        x.to(torch.complex64),
    ):
        assert in_one_loop(torch.exp, other) is None
        assert not looped(other)
    assert in_one_loop(torch.mul, x, random(2 * N)[::2]) is None
    assert in_one_loop(torch.log, x) is None, "not compiled"
    assert in_one_loop(lambda x: x.cumsum(0), x) is None
    with disabled():
        assert not at_hand()
        assert in_one_loop(torch.exp, x) is None
    with torch.enable_grad():
        assert in_one_loop(torch.exp, x) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(in_one_loop(torch.exp, x)) or x)(random(2, N))
    assert seen == [None]
    with torch._subclasses.FakeTensorMode() as mode:
        assert in_one_loop(torch.exp, mode.from_tensor(x)) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_hardswish_is_torchs_to_the_bit_by_a_loop_or_without(compiled, threads):
    """On several threads it is a loop, which needs no look at x for infinities."""
    x = 3 * random(N)
    compiled(lambda: F.hardswish(x))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.object(_infinities, "in_one_loop", wraps=_infinities.in_one_loop) as loop:
            found = F.hardswish(x)
        assert loop.called == (threads > 1)
        assert torch.equal(found, torch.nn.functional.hardswish(x))
        x[:2] = torch.tensor([torch.inf, -torch.inf])
        assert F.hardswish(x)[:2].tolist() == [torch.inf, 0]
    finally:
        torch.set_num_threads(before)


def test_a_changed_header_is_another_library(monkeypatch):
    before = _library.path
    monkeypatch.setenv("TORCHBP_KERNELS", "somewhere")
    file = before()
    _library.version.cache_clear()
    monkeypatch.setattr(_library, "flags", lambda: "-O0")
    try:
        assert before() != file
    finally:
        _library.version.cache_clear()


CHEAPER = {
    "-|x|": ("exp_below_0", lambda x: torch.exp(-x.abs())),
    "-2|x|": ("exp_below_0", lambda x: (-2 * x.abs()).exp()),
    "-x²/2": ("exp_below_0", lambda x: torch.exp(-0.5 * (x * x))),
    "-square": ("exp_below_0", lambda x: torch.exp(-x.square())),
    "at-most-0": ("exp_below_0", lambda x: torch.exp((3 * x).clamp(max=0))),
    "expm1": ("expm1_below_0", lambda x: torch.expm1(x.clamp(max=-1))),
    "softplus": ("log1p_exp", lambda x: torch.nn.functional.softplus(-x.abs())),
}
NOT_CHEAPER = {
    "x": torch.exp,
    "-x": lambda x: torch.exp(-x),
    "|x|": lambda x: torch.exp(x.abs()),
    "neg(-|x|)": lambda x: torch.exp((-x.abs()).neg()),
    "-2·-|x|": lambda x: torch.exp(-2 * -x.abs()),
    "at-most-1": lambda x: torch.exp(x.clamp(max=1)),
    "at-least--1": lambda x: torch.exp(x.clamp(min=-1)),
    "1/-|x|": lambda x: torch.exp(1 / -x.abs()),
    "a-number": partial(lambda x, c: torch.exp(c * x.abs()), c=-2.0),
    "x·y": lambda x: torch.exp(-(x * (x + 1))),
    "softplus": lambda x: torch.nn.functional.softplus(-x.abs(), 2.0, 1.0),
}


@pytest.mark.parametrize("name", CHEAPER)
def test_what_is_known_to_be_below_0_has_the_cheaper_function(name, compiled):
    function, formula = CHEAPER[name]
    noted = steps(formula, 1, loop=True)
    assert noted
    assert f" {function}(" in " ".join(noted[0])
    x = random(N)
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    compiled(lambda: in_one_loop(formula, x))
    assert_close(in_one_loop(formula, x), formula(x), rtol=3e-7, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("name", NOT_CHEAPER)
def test_what_may_be_above_0_has_not(name):
    noted = steps(NOT_CHEAPER[name], 1, loop=True)
    assert noted
    assert "below_0" not in " ".join(noted[0])
