"""Formulas written down as CUDA: what each rule says is what torch computes; and the kernels themselves, on a GPU."""

import ctypes
import math
import subprocess
import threading
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._C import _nn  # pyright: ignore[reportAttributeAccessIssue]

from tests.device import DEVICE
from tests.ops.conftest import HALF, drawn
from torchbp.ops import _function, _one_kernel
from torchbp.ops._one_kernel import in_one_kernel
from torchbp.ops._symbols import _RULES, source

EDGES = [0.0, -0.0, 0.25, -0.25, 1.0, -1.0, 3.0, -3.0, 30.0, -30.0, math.inf, -math.inf, math.nan]
FUNCTIONS = """exp exp2 expm1 log log1p log2 sqrt tanh erf erfc cosh sinh atan
    sigmoid relu sign square reciprocal abs neg"""


def of_first(name):
    return lambda x, y: getattr(torch, name)(x)


RULES = {
    **{name: of_first(name) for name in FUNCTIONS.split()},
    "operators": lambda x, y: 2 - x + y / 3 - (1 / y) * x + x**2 + 0.5**y,
    "comparisons": lambda x, y: torch.where((x < y) | (x >= 2) & ~(x == 1) | (y != y), x, -y),
    "masks": lambda x, y: x.masked_fill(x.isnan(), 7).masked_fill(y.isinf() | (y <= x), 5),
    "clamp": lambda x, y: x.clamp(min=-0.5) + y.clamp(-1, 2) + torch.clamp(x, max=3),
    "hardtanh": lambda x, y: F.hardtanh(x, -0.5, 2.0),
    "softplus": lambda x, y: F.softplus(x, -1, 40) + F.softplus(y),
    "logsigmoid": lambda x, y: F.logsigmoid(x),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=-2) + torch.add(x, y, alpha=3),
    "sub": lambda x, y: torch.sub(x, y, alpha=2),
    "errors": lambda x, y: F.mse_loss(x, y, reduction="none") + _nn.huber_loss(x, y, 0, 0.7),
    "infinite": lambda x, y: torch.where(x > 0, math.inf, -math.inf),
    "same": lambda x, y: x.float().detach().conj().contiguous(),
}
HEAD = """
#include <cmath>
#include <cstring>
using namespace std;
inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
inline float __uint_as_float(unsigned i) { float x; memcpy(&x, &i, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned i; memcpy(&i, &x, 4); return i; }
"""
CALL = """extern "C" void run_{0}(long n, float* x, float* y, float* z) {{
    for (long i = 0; i < n; i++) z[i] = {0}<float>(x[i], y[i]);
}}"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return all rules as a library of the CPU: CUDA's functions have the names of C++."""
    home = tmp_path_factory.mktemp("rules")
    lines = [HEAD]
    for name, formula in RULES.items():
        code = source(f"rule_{name}", formula, 2)
        assert code, name
        lines += [code, CALL.format(f"rule_{name}")]
    one = source("one", lambda x, y: x * y, 2)
    two = source("two", lambda x, y: x * y, 2)
    assert one
    assert two
    pack = _one_kernel._of_pairs("one", one, (True, True), torch.bfloat16, False)
    total = _one_kernel._of_pairs("two", two, (True, False), torch.bfloat16, True)
    lines += [
        pack,
        CALL.format("one_of_pairs"),
        total.replace(_one_kernel._HALVES[torch.bfloat16], ""),
    ]
    lines += [CALL.format("two_of_pairs")]
    (home / "rules.cpp").write_text("\n".join(lines))
    command = ["g++", "-O0", "-shared", "-fPIC", "-o", home / "rules.so", home / "rules.cpp"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(home / "rules.so"))

    def call(name, x, y):
        z = torch.empty_like(x)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, y, z))
        getattr(library, f"run_{name}")(ctypes.c_long(x.numel()), *pointers)
        return z

    return call


@pytest.mark.cpu("a C++ compiler of the CPU")
@pytest.mark.parametrize("name", RULES)
def test_rules_say_what_torch_computes(name, compiled):
    grid = torch.tensor(EDGES)
    x, y = (t.reshape(-1) for t in torch.meshgrid(grid, grid, indexing="ij"))
    x, y = x.contiguous(), y.contiguous()
    torch.testing.assert_close(
        compiled(f"rule_{name}", x, y), RULES[name](x, y), rtol=1e-6, atol=1e-38, equal_nan=True
    )


def test_every_rule_is_tested():
    used = set()

    class Noted(dict):
        def __getitem__(self, name):
            used.add(name)
            return super().__getitem__(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchbp.ops._symbols._RULES", Noted(_RULES))
        for formula in RULES.values():
            source("rule", formula, 2)
    assert used == set(_RULES)


@pytest.mark.cpu("a C++ compiler of the CPU")
def test_pairs_are_rounded_as_torch_rounds(compiled):
    # among them 1.53515625, halfway between two of bfloat16
    x = torch.tensor([*EDGES[1:], 1.0, 1e-40, 3e38, 1 + 3 * 2.0**-7]).bfloat16()
    y = torch.tensor([*EDGES[:0:-1], 1.0, 1.0, 1.5, 1.5]).bfloat16()
    product = compiled("one_of_pairs", x.view(torch.float32), y.view(torch.float32))
    want = (x.float() * y.float()).bfloat16()
    assert torch.equal(product.view(torch.bfloat16).nan_to_num(7.0), want.nan_to_num(7.0))
    few = torch.tensor([0.3, 0.7, 1.1, -2.5]).bfloat16()
    total = compiled("two_of_pairs", few.view(torch.float32).clone(), torch.tensor([0.1, 3.0]))
    assert torch.equal(total, (few.float().view(2, 2) * torch.tensor([[0.1], [3.0]])).sum(1))


def test_what_has_no_rule_has_no_source():
    weight = torch.ones(3)
    assert source("f", lambda x: x.cumsum(0), 1) is None
    assert source("f", lambda x: x if x > 0 else -x, 1) is None
    assert source("f", lambda x: x * weight, 1) is None
    assert source("f", lambda x: 3.0, 1) is None


def test_formulas_are_told_apart():
    identity = _one_kernel.identity

    def scaled(factor):
        return lambda x: x * factor

    assert identity(scaled(2.0)) == identity(scaled(2.0))
    assert identity(scaled(2.0)) != identity(scaled(3.0))
    assert identity(scaled(2)) != identity(scaled(2.0))
    assert identity(partial(torch.add, alpha=2)) != identity(partial(torch.add, alpha=3))
    assert identity(scaled(torch.ones(2))) is None, "a tensor is no constant"


def test_sources_are_written_one_at_a_time():
    """Or two threads would take each other's ``formula_only`` for what was there before."""
    inside, most = [], []

    def formula(x):
        inside.append(x)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()
        return x * 2

    threads = [threading.Thread(target=source, args=("f", formula, 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    assert not _function._formula_only


def test_on_the_cpu_the_formula_runs():
    x = torch.randn(8, device="cpu")
    assert in_one_kernel(torch.exp, x) is None


cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs --device cuda")


def annealed(x, k):
    return x * k


def swish(v, x):
    return v * torch.sigmoid(x) * x


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["dense", "transposed", "strided", "broadcast", "odd"])
def test_kernel_is_the_formula(dtype, layout):
    """Rounded once; whatever strides the tensors have, which the value then has, too."""
    v, x = drawn((6, 8), dtype), 4 * drawn((6, 8), dtype)
    if layout == "transposed":
        v, x = v.t(), x.t()
    elif layout == "strided":
        v, x = v[:, ::2], x[:, 1::2]
    elif layout == "broadcast":
        v = v[:, :1]
    elif layout == "odd":
        v, x = v.view(-1)[1:46], x.view(-1)[1:46]
    with torch.no_grad():
        made = in_one_kernel(swish, v, x)
        want = swish(v.double(), x.double())
    assert made is not None
    assert made.dtype == dtype
    assert made.stride() == torch.empty_like(v * x).stride()
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    rtol, atol = (0.51 * eps, 0.51 * eps * least) if dtype in HALF else (4 * eps, least)
    torch.testing.assert_close(made.double(), want, rtol=rtol, atol=atol)


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_numbers_beside_half_precision_are_not_rounded(dtype):
    """A mean's gradient, 1/N, is subnormal in float16."""
    x, scale = 1 + drawn((64, 32), dtype).abs(), torch.tensor(1e-7 / 3, device=DEVICE)
    with torch.no_grad():
        made = in_one_kernel(lambda x, s: 1e5 * (x * s), x, scale)
        total = in_one_kernel(lambda x, s: x * s, x, scale, summed=True)
    assert made is not None
    assert total is not None
    want = 1e5 * x.double() * scale.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        made.double(), want, rtol=0.51 * eps if dtype in HALF else 4 * eps, atol=0
    )
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.sum().double(), want.sum() / 1e5, rtol=1e-6, atol=0)


@cuda
def test_who_differentiates_gets_the_formula():
    x = drawn((4, 4), torch.float32).requires_grad_()
    assert in_one_kernel(torch.exp, x) is None
    with torch.no_grad():
        assert in_one_kernel(torch.exp, x) is not None
        assert in_one_kernel(lambda x: x.cumsum(0), x) is None
        assert in_one_kernel(torch.exp, x.double()) is None
        assert torch.func.vmap(lambda x: in_one_kernel(torch.exp, x) or x)(x).shape == x.shape


@cuda
def test_a_number_that_changes_at_every_step_is_compiled_a_few_times_only(monkeypatch):
    monkeypatch.setattr(_one_kernel, "_VARIANTS", 3)
    x = drawn((4, 4), torch.float32)
    with torch.no_grad():
        made = [
            in_one_kernel(partial(annealed, k=k), x) is not None for k in (1.0, 2.0, 3.0, 4.0, 2.0)
        ]
    assert made == [True, True, True, False, True]


@cuda
@pytest.mark.parametrize(
    "name", ["gelu", "silu", "mish", "sigmoid", "tanh", "binary_cross_entropy", "mse_loss"]
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_ops_take_it(name, dtype, monkeypatch):
    """Their backward is one kernel: several steps in float32 take four to nine times as long."""
    made = []
    real = _one_kernel._kernel
    monkeypatch.setattr(_one_kernel, "_kernel", lambda *args: made.append(real(*args)) or made[-1])
    x = torch.rand(64, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    function = getattr(__import__("torchbp.functional", fromlist=[name]), name)
    y = function(x, torch.rand_like(x)) if name.endswith(("loss", "entropy")) else function(x)
    made.clear()
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert len(made) == 1
    assert made[0] is not None
