"""Every op with its formulas compiled: on samples, made long, values and gradients are as near the truth as without.

The truth is the op itself in float64, where nothing is compiled.
"""

import warnings
from functools import cache
from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from tests.ops.kernels.conftest import library, opened
from torchbp.ops._op import all_ops
from torchbp.ops._precision import ulps
from torchbp.ops._samples import EDGES, Sample
from torchbp.ops.kernels import _build, _library, disabled

MOST = 2  # samples of an op and dtype: a formula takes 0.2 s to compile
NOT = {"ctc_loss", "info_nce_loss"}  # long in time, or all rows against all others


def samples(op, dtype, most):
    if op.random or op.name in NOT:
        return []
    return [varied(sample) for sample in islice(_build.many(op, dtype), most)]


def varied(sample):
    """Return the sample with other values in each row, no larger: probabilities stay such."""
    generator = torch.Generator().manual_seed(2)

    def vary(t):
        if not t.requires_grad or t.numel() < 1000:
            return t
        share = torch.rand(t.shape, generator=generator).bfloat16().to(t.dtype)
        return (t.detach() * (0.5 + 0.5 * share)).requires_grad_()

    return sample.over_tensors(vary)


def step(op, sample):
    """Return the values, and the gradients for a random incoming one."""
    leaves = [t for t in sample.tensors() if t.is_floating_point()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = op.function(*sample.args, **sample.kwargs)
    made = [y] if isinstance(y, torch.Tensor) else list(y)
    made = [y for y in made if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    v = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in made]
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted or not made:
        return []
    return [y.detach() for y in made] + [
        g for g in torch.autograd.grad(made, wanted, v, allow_unused=True) if g is not None
    ]


def in_float64(sample):
    def wide(t):
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return sample.over_tensors(wide)


@cache
def asked_for(dtype):
    """Return the sources that each op's samples ask for."""
    sources = {}
    for name, op in all_ops().items():
        with _library.recording() as found:
            for sample in samples(op, dtype, MOST):
                step(op, sample)
        sources[name] = dict(found)
    return sources


def edges(sample):
    """Return an elementwise op's sample with edge values in its first tensor."""
    first, *others = sample.args
    x = torch.tensor(EDGES, dtype=first.dtype).repeat(-(-first.numel() // len(EDGES)))
    x = x[: first.numel()].view(first.shape).requires_grad_(first.requires_grad)
    return Sample((x, *others), sample.kwargs, f"{sample.name}-edges")


@pytest.fixture(
    scope="module",
    params=[
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16", "float16"],
)
def dtype(request):
    """A dtype for which all ops' formulas are compiled, and opened."""
    found = asked_for(request.param)
    everything = {name: text for sources in found.values() for name, text in sources.items()}
    _library.open_library(library(everything))
    yield request.param
    _library.open_library(None)


def compiles(name, dtype):
    if not asked_for(dtype)[name]:
        pytest.skip("compiles nothing")
    return all_ops()[name]


@pytest.mark.parametrize("name", all_ops())
def test_as_near_the_truth_as_without(dtype, name):
    op = compiles(name, dtype)
    for sample in samples(op, dtype, MOST):
        made = step(op, sample)
        with disabled():
            plain = step(op, sample)
        truth = step(op, in_float64(sample))
        for a, b, c in zip(made, plain, truth, strict=True):
            assert a.shape == b.shape
            assert a.stride() == b.stride()
            scale = c.square().mean().sqrt() / 16  # of what cancels
            with_, without = ulps(a, c, dtype, scale), ulps(b, c, dtype, scale)
            # a tenth is the noise of 16 thousand values; benchmarks/precision.py has more, and torch's beside them.
            # Half a unit, for grad / N is rounded, and all share it. A half, for the tail is 16 values, and of what
            # cancels they were found up to a third apart.
            if a.numel() > 1000:  # of a sum one cannot tell how near it is in the mean
                assert with_.mean() <= max(1.1 * without.mean(), 0.5), sample.name
            tail = 1.5 * max(without.quantile(0.999).item(), 1.0)
            assert with_.quantile(0.999) <= tail, sample.name


@pytest.mark.parametrize("name", [name for name, op in all_ops().items() if op.elementwise])
def test_edges_as_without(dtype, name):
    op = compiles(name, dtype)
    for sample in map(edges, samples(op, dtype, MOST)):
        made = step(op, sample)
        with disabled():
            plain = step(op, sample)
        truth = step(op, in_float64(sample))
        for a, b, c in zip(made, plain, truth, strict=True):
            # what torch's kernel loses in a tail, a loop may keep
            nearer = (a.double() - c).abs() < (b.double() - c).abs()
            known = torch.where(nearer, a, b)
            assert_close(a, known, rtol=4 * torch.finfo(dtype).eps, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, op in all_ops().items() if op.random])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_draws_what_is_drawn_without(dtype, name):
    op = all_ops()[name]
    for sample in islice(_build.many(op, dtype), MOST):

        def seeded(sample=sample):
            torch.manual_seed(3)
            return [*step(op, sample), torch.rand(1)]

        with _library.recording() as found:
            plain = seeded()
        if not found:
            pytest.skip("compiles nothing")
        with opened(found):
            made = seeded()
        eps = torch.finfo(dtype).eps  # a slope is rounded after each step without, once with
        for a, b in zip(made, plain, strict=True):
            assert_close(a, b, rtol=4 * eps, atol=4 * eps)


def test_most_ops_compile_something(dtype):
    assert sum(bool(sources) for sources in asked_for(dtype).values()) > 30
