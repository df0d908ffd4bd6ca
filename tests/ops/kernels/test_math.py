"""The functions of math.h, compiled: near the truth, exact at the edges, the same bits anywhere in an array."""

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torchbp

HEADER = Path(torchbp.__file__).parent / "ops" / "kernels" / "math.h"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
]
AVX2 = ("-mavx2", "-mfma")
AVX512 = (
    "-mavx512f",
    "-mavx512vl",
    "-mavx512bw",
    "-mavx512dq",
    "-mfma",
    "-mprefer-vector-width=512",
)
MACHINES = {"DEFAULT": {"plain": ()}, "AVX2": {"plain": (), "avx2": AVX2}}
MACHINES["AVX512"] = {**MACHINES["AVX2"], "avx512": AVX512}
LEVELS = MACHINES.get(torch.backends.cpu.get_cpu_capability(), MACHINES["DEFAULT"])

SOFT = HEADER.with_suffix("") / "soft.h"

# function -> ((max, mean) with fma, (max, mean) without), in ulp, as the headers' tables say.
BOUNDS = {
    row[1]: ((float(row[2]), float(row[3])), (float(row[4]), float(row[5])))
    for row in re.finditer(
        r"^//   (\w+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)",
        HEADER.read_text() + SOFT.read_text(),
        re.MULTILINE,
    )
}
POW = BOUNDS.pop("pow")

INF, NAN = float("inf"), float("nan")
TINY, LEAST, LARGEST = 2.0**-149, 2.0**-126, 2.0**128 - 2.0**104
# function -> (x, y), where y is exact or known when rounded.
ODD = [(NAN, NAN), (0.0, 0.0), (TINY, TINY), (3 * TINY, 3 * TINY), (LEAST, LEAST)]
ODD += [(-x, -y) for x, y in ODD]
ONE = [(NAN, NAN), (-NAN, NAN), (0.0, 1.0), (-0.0, 1.0), (TINY, 1.0), (-TINY, 1.0)]
LOG = [
    (NAN, NAN),
    (0.0, -INF),
    (-0.0, -INF),
    (1.0, 0.0),
    (INF, INF),
    (-INF, NAN),
    (-1.0, NAN),
    (-TINY, NAN),
]
TO_ONE = [(x, 1.0) for x in (10.0, LARGEST, INF)] + [(-x, -1.0) for x in (10.0, LARGEST, INF)]
TO_INF = [(x, INF) for x in (89.42, LARGEST, INF)]
EDGES = {
    "exp": [
        *ONE,
        *TO_INF,
        (88.73, INF),
        (-103.0, TINY),
        (-104.0, 0.0),
        (-LARGEST, 0.0),
        (-INF, 0.0),
    ],
    "exp2": [
        *ONE,
        (127.0, 2.0**127),
        (128.0, INF),
        (LARGEST, INF),
        (INF, INF),
        (3.0, 8.0),
        (-149.0, TINY),
        (-150.0, 0.0),
        (-LARGEST, 0.0),
        (-INF, 0.0),
    ],
    "expm1": [*ODD, *TO_INF, (88.73, INF), (-20.0, -1.0), (-LARGEST, -1.0), (-INF, -1.0)],
    "log": LOG,
    "log2": [*LOG, (TINY, -149.0), (LEAST, -126.0), (2.0**127, 127.0), (8.0, 3.0), (0.125, -3.0)],
    "log1p": [*ODD, (-1.0, -INF), (-1.5, NAN), (-LARGEST, NAN), (-INF, NAN), (INF, INF)],
    "tanh": [*ODD, *TO_ONE],
    "erf": [(NAN, NAN), (0.0, 0.0), (-0.0, -0.0), (TINY, TINY), (-TINY, -TINY), *TO_ONE],
    "erfc": [*ONE, (10.05, TINY), (10.1, 0.0), (LARGEST, 0.0), (INF, 0.0)]
    + [(-x, 2.0) for x in (5.0, LARGEST, INF)],
    "sinh": [*ODD, *TO_INF, *((-x, -y) for x, y in TO_INF)],
    "cosh": [*ONE, *TO_INF, *((-x, y) for x, y in TO_INF)],
    "atan": ODD + [(s * x, s * 1.57079633) for x in (LARGEST, INF) for s in (1, -1)],
    "sqrt": [
        (NAN, NAN),
        (0.0, 0.0),
        (-0.0, -0.0),
        (INF, INF),
        (4.0, 2.0),
        (2.0**-148, 2.0**-74),
        (-1.0, NAN),
        (-INF, NAN),
    ],
}


# What torch calls by another name, and where a function is meant for a part of all numbers, that part.
TRUTHS = {
    "exp_below_0": torch.exp,
    "normal_exp_below_0": torch.exp,
    "expm1_below_0": torch.expm1,
    "log1p_exp": lambda x: torch.log1p(torch.exp(x)),
    "erfcx": torch.special.erfcx,
}
NORMAL = -87.3  # e^x is no subnormal number
DOMAINS = {
    "exp_below_0": (-INF, 0.0),
    "normal_exp_below_0": (NORMAL, 0.0),
    "expm1_below_0": (-INF, 0.0),
    "log1p_exp": (-INF, 0.0),
    "sigmoid": (NORMAL, INF),
    "erfcx": (0.0, 10.0),
}
TO_0 = [(x, 0.0) for x in (-104.0, -105.0, -200.0, -LARGEST, -INF)]
EDGES |= {
    "exp_below_0": [(NAN, NAN), (0.0, 1.0), (-0.0, 1.0), (-TINY, 1.0), (-103.0, TINY), *TO_0],
    "normal_exp_below_0": [(NAN, NAN), (0.0, 1.0), (-0.0, 1.0), (-88.0, 0.0), (-100.0, 0.0), *TO_0],
    "expm1_below_0": [
        (NAN, NAN),
        (0.0, 0.0),
        (-0.0, 0.0),
        *((-x, -x) for x in (TINY, 3 * TINY, LEAST)),
        *((x, -1.0) for x in (-18.0, -19.0, -104.0, -LARGEST, -INF)),
    ],
    "log1p_exp": [(NAN, NAN), *((x, math.log(2)) for x in (0.0, -0.0)), (-103.0, TINY), *TO_0],
    "sigmoid": [(NAN, NAN), (0.0, 0.5), (-0.0, 0.5), (-TINY, 0.5)]
    + [(x, 1.0) for x in (17.5, 30.0, 31.0, 89.0, LARGEST, INF)]
    + [(-x, 0.0) for x in (89.0, 104.0, LARGEST, INF)],
    "erfcx": [(NAN, NAN), (0.0, 1.0), (TINY, 1.0), (INF, 0.0)],
}


def compiler() -> str:
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    assert found, (
        "math.h needs a C++ compiler to be tested: none of c++, g++, clang++ is on the PATH"
    )
    return found[0]


def source() -> str:
    """Of each function a loop, on a line of its own, and single calls."""
    lines = [
        f'#include "{HEADER}"',
        f'#include "{SOFT}"',
        'extern "C" int has_fma() {',
        "#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)",
    ]
    lines += ["return 1;", "#else", "return 0;", "#endif", "}"]
    for name in BOUNDS:
        arguments = "(const float* __restrict x, float* __restrict y, long n)"
        lines += [
            f'extern "C" void loop_{name}{arguments} {{ for (long i = 0; i < n; i++) y[i] = torchbp::{name}(x[i]); }}',
            f"__attribute__((noinline)) static float one_{name}(float x) {{ return torchbp::{name}(x); }}",
            f'extern "C" void single_{name}{arguments} {{ for (long i = 0; i < n; i++) y[i] = one_{name}(x[i]); }}',
        ]
    pair = "(const float* __restrict x, const float* __restrict e, float* __restrict y, long n)"
    lines += [
        f'extern "C" void loop_pow{pair} {{ for (long i = 0; i < n; i++) y[i] = torchbp::pow(x[i], e[i]); }}'
    ]
    return "\n".join(lines)


def compiled(folder: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    file, library = folder / "math.cpp", folder / "math.so"
    file.write_text(source())
    subprocess.run(
        [compiler(), *FLAGS, *flags, "-Wall", "-Wextra", "-Werror", file, "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module", params=LEVELS)
def library(request, tmp_path_factory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp(request.param), LEVELS[request.param])


def apply(function: Callable, *x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x[0])
    function(*(ctypes.c_void_p(t.data_ptr()) for t in (*x, y)), ctypes.c_long(y.numel()))
    return y


def errors(truth: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of each y, in units in the last place of the true value; infinite where sign or kind of number is another."""
    rounded = truth.float()
    unit = torch.ldexp(torch.ones_like(truth), torch.frexp(truth).exponent.clamp_min(-125) - 24)
    error = (y.double() - truth).abs() / unit
    same = (y == rounded) | (y.isnan() & rounded.isnan())
    error = torch.where(y.isfinite() & rounded.isfinite(), error, torch.where(same, 0.0, INF))
    return error.masked_fill((y.signbit() != truth.signbit()) & ~truth.isnan(), INF)


def stratified(each: int = 2048) -> torch.Tensor:
    """Random mantissas, `each` of them of every exponent and sign."""
    exponent = torch.arange(512, dtype=torch.int64)[:, None] << 23
    numbers = exponent | torch.randint(1 << 23, (512, each))
    return numbers.to(torch.int32).view(torch.float32).flatten()


def of_domain(name: str, x: torch.Tensor) -> torch.Tensor:
    """What is outside is at the edge, but +0 for -0: what a function gives there is tested with the edges."""
    return x.clamp(*DOMAINS[name]) + 0.0 if name in DOMAINS else x


def check(name: str, library: ctypes.CDLL, pieces) -> None:
    most, mean = BOUNDS[name][0 if library.has_fma() else 1]
    total, count = 0.0, 0
    truth = TRUTHS.get(name) or getattr(torch, name)
    for piece in pieces:
        x = of_domain(name, piece)
        error = errors(truth(x.double()), apply(getattr(library, f"loop_{name}"), x))
        worst = error.argmax()
        assert error[worst] <= most, f"{name}({x[worst].item().hex()}): {error[worst]:.3f} ulp"
        usual = error[(x.abs() >= 1 / 128) & (x.abs() < 8)]
        total, count = total + usual.sum().item(), count + usual.numel()
    assert total / count <= mean


def test_the_table_names_every_function():
    parts = "".join(file.read_text() for file in HEADER.with_suffix("").glob("*.h"))
    functions = set(re.findall(r"^TORCHBP_INLINE float (\w+)\(float x\)", parts, re.MULTILINE)) - {
        "fabs"
    }
    assert functions == set(BOUNDS) == set(EDGES)


@pytest.mark.parametrize("name", BOUNDS)
def test_error(name, library):
    check(name, library, [stratified()])


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_error_of_one_float_in_61(name, library):
    size, end = 61 << 20, 1 << 31
    starts = range(-end, end, size)
    pieces = (torch.arange(i, min(i + size, end), 61).to(torch.int32) for i in starts)
    check(name, library, (piece.view(torch.float32) for piece in pieces))


@pytest.mark.parametrize("name", EDGES)
def test_edges(name, library):
    x, expected = torch.tensor(EDGES[name], dtype=torch.float32).T.contiguous()
    for way in ("loop", "single"):
        y = apply(getattr(library, f"{way}_{name}"), x)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[~y.isnan()], expected[~y.isnan()])
        assert torch.equal(y.signbit()[~y.isnan()], expected.signbit()[~y.isnan()])


def test_error_of_pow(library):
    """x and y of few digits; y log2(x) up to where the result is 0 or inf; any x and y."""
    near = torch.rand(1 << 18) * 8, torch.randn(1 << 18) * 4
    x = stratified(256).abs()
    y = 300 * (torch.rand(x.shape) - 0.5) / (x.log2().abs() + 1e-3)
    x, y = (
        torch.cat(numbers)
        for numbers in ((near[0], x, stratified(256)), (near[1], y, stratified(256).flip(0)))
    )
    error = errors(x.double() ** y.double(), apply(library.loop_pow, x, y))
    worst, (most, mean) = error.argmax(), POW[0 if library.has_fma() else 1]
    assert error[worst] <= most, (
        f"pow({x[worst].item().hex()}, {y[worst].item().hex()}): {error[worst]:.3f} ulp"
    )
    assert error[: 1 << 18].mean() <= mean


def test_edges_of_pow(library):
    sizes = [
        0.0,
        TINY,
        LEAST,
        0.5,
        1 - 2**-24,
        1.0,
        1 + 2**-23,
        1.5,
        2.0,
        3.0,
        2.0**23 - 0.5,
        2.0**23 + 1,
    ]
    sizes += [2.0**24 - 1, 2.0**24, 2.0**25, LARGEST, INF, NAN]
    numbers = torch.tensor([*sizes, *(-size for size in sizes)])
    x, y = (t.flatten() for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    error = errors(
        x.double() ** y.double(), apply(library.loop_pow, x.contiguous(), y.contiguous())
    )
    assert error.max() <= POW[0][0]


@pytest.mark.parametrize("name", BOUNDS)
def test_bits_do_not_depend_on_the_position(name, library):
    """In the vectors of a loop, in what is left at its end, alone."""
    loop, single = getattr(library, f"loop_{name}"), getattr(library, f"single_{name}")
    x = of_domain(name, stratified(64))
    bits = apply(loop, x).view(torch.int32)
    number = ~x.isnan()
    assert torch.equal(apply(single, x).view(torch.int32)[number], bits[number])
    for start in range(0, x.numel() - 1024, 517):
        part = slice(start, start + 512)
        assert torch.equal(
            apply(loop, x[part]).view(torch.int32)[number[part]], bits[part][number[part]]
        )
    for length in range(1, 70):
        part = slice(9000, 9000 + length)
        assert torch.equal(apply(loop, x[part]).view(torch.int32), bits[part])


@pytest.mark.parametrize("level", LEVELS)
def test_loops_become_vectors(level, tmp_path):
    clang = (
        "clang"
        in subprocess.run(
            [compiler(), "--version"], check=True, capture_output=True, text=True
        ).stdout
    )
    file = tmp_path / "math.cpp"
    file.write_text(source())
    report = "-Rpass=loop-vectorize" if clang else "-fopt-info-vec"
    command = [compiler(), *FLAGS, *LEVELS[level], report, file, "-o", tmp_path / "math.so"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    lines = {int(line) for line in re.findall(r"math\.cpp:(\d+):\d+:.*vectorized", said)}
    loops = {
        number: text for number, text in enumerate(source().splitlines(), 1) if "void loop_" in text
    }
    assert [text for number, text in loops.items() if number not in lines] == []
