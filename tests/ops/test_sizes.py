"""A compiled op takes any number of rows: no choice by size, as of a loop for many elements, bounds it."""

import pytest
import torch
import torch._dynamo.testing

import torchbp
from tests.device import DEVICE
from tests.ops.conftest import make, with_args
from torchbp.ops._samples import Sample, one_tensor

LEAST, MOST = 2, 100_000
FEW, MANY = 13, 3000  # rows of ten elements: the thresholds that float32 has lie between


def of_rows(sample, rows):
    """Return the sample with ``rows`` rows wherever its first tensor's number of them stands first."""
    before = next(t.shape[0] for t in sample.tensors() if t.dim())

    def resized(t):
        if t.dim() and t.shape[0] == before:
            many = torch.cat([t.detach()] * -(-rows // before))[:rows].clone()
            return many.requires_grad_(t.requires_grad)
        return t.detach().clone().requires_grad_(t.requires_grad)

    return with_args(sample, resized)


def graphs(function, samples):
    """Return how many graphs dynamo makes, forward and backward, where the number of rows is marked dynamic."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for sample, rows in samples:
        for t in sample.tensors():
            for dim, size in enumerate(t.shape):
                if size == rows:
                    torch._dynamo.mark_dynamic(t, dim, min=LEAST, max=MOST)
        y = compiled(*sample.args, **sample.kwargs)
        if y.requires_grad:
            y.sum().backward()
    return counter.frame_count


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_one_graph_for_any_number_of_rows(op, dtype):
    sample = op.benchmark(make(dtype), 128)

    def function(*args, **kwargs):
        return one_tensor(op.function(*args, **kwargs))

    samples = [(of_rows(sample, rows), rows) for rows in (FEW, MANY)]
    try:
        for resized, _ in samples:
            function(*resized.args, **resized.kwargs)
    except (RuntimeError, ValueError, IndexError):
        pytest.skip("its first dimension is not the batch's alone")
    assert graphs(function, samples) == 1


MODULES = {
    "RNNCell": ((10, 5), lambda n: (n, 10)),
    "LSTMCell": ((10, 5), lambda n: (n, 10)),
    "GRUCell": ((10, 5), lambda n: (n, 10)),
    "BatchNorm1d": ((10,), lambda n: (n, 10)),
    "LayerNorm": ((10,), lambda n: (2, n, 10)),
    "Softmax2d": ((), lambda n: (2, 5, n, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_one_graph_of_a_module(name):
    given, dims = MODULES[name]
    module = (
        getattr(torchbp.nn, name)(*given, device=DEVICE) if given else getattr(torchbp.nn, name)()
    )

    def function(x):
        y = module(x)
        return torch.cat(y, -1) if isinstance(y, tuple) else y

    samples = [
        (Sample((torch.randn(dims(n), device=DEVICE, requires_grad=True),)), n) for n in (FEW, MANY)
    ]
    assert graphs(function, samples) == 1


def test_one_graph_of_ctc_for_any_batch():
    def given(n):
        log_p = torch.randn(6, n, 7, device=DEVICE, requires_grad=True)
        lengths = torch.full((n,), 6, device=DEVICE), torch.full((n,), 2, device=DEVICE)
        return Sample((log_p, torch.randint(1, 7, (n, 2), device=DEVICE), *lengths)), n

    assert graphs(torchbp.functional.ctc_loss, [given(n) for n in (FEW, MANY)]) == 1


def test_two_graphs_where_nobody_has_marked_a_size():
    """As torch's own: one of the first size, one for any."""
    for function in (torchbp.functional.gelu, torchbp.functional.cross_entropy):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for n in (FEW, 9, 300, MANY, 20_000):
            x = torch.randn(n, 10, device=DEVICE, requires_grad=True)
            target = () if function is torchbp.functional.gelu else (x.detach().argmax(1),)
            compiled(x, *target).sum().backward()
        assert counter.frame_count == 2
