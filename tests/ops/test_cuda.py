"""What a GPU alone can show: that no op waits for it, that a graph can capture it, that cuDNN's numbers are ours."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import torchbp.nn
from tests.device import DEVICE
from tests.ops.conftest import Case, drawn, tensors_of, torchs
from tests.ops.test_transforms import check_compiled
from torchbp.ops._op import all_ops

if DEVICE != "cuda":
    pytest.skip("needs --device cuda", allow_module_level=True)


def forward_and_backward(f, tensors, v):
    y = f(*tensors)
    return (y.detach(), *torch.autograd.grad(y, tensors, v, allow_unused=True))


def waits(f, tensors, v) -> str:
    """Return what the debug mode says of a call that waits for the device, or nothing."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(f, tensors, v)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_waits_for_the_device_only_where_torch_does(case, dtype):
    sample = case.sample(dtype)
    f, tensors = case.of_tensors(sample, case.op.function)
    y = f(*tensors)
    if not y.requires_grad:
        pytest.skip("nothing to differentiate")
    v = torch.ones_like(y)
    forward_and_backward(f, tensors, v)  # what is compiled at first, with a wait
    said = waits(f, tensors, v)
    if said:
        theirs, _ = case.of_tensors(sample, torchs(case.op))
        assert waits(theirs, tensors, v), said


def test_the_debug_mode_tells():
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    assert waits(lambda x: x * x.sum().item(), (x,), torch.ones_like(x))
    assert not waits(lambda x: x * x.sum(), (x,), torch.ones_like(x))


def captured(f, tensors, v):
    """Return a graph of forward and backward, and the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward_and_backward(f, tensors, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = forward_and_backward(f, tensors, v)
    return graph, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graph(first, dtype):
    """Captured once, forward and backward are those of whatever values stand in the inputs at each replay."""
    if first.op.name in {"ctc_loss", "gaussian_nll_loss"}:
        pytest.skip("looks at values, as torch's does: its lengths; its variances' sign")
    f, tensors = first.of_tensors(first.sample(dtype), first.op.function)
    tensors = tuple(t.detach().clone().requires_grad_() for t in tensors)
    v = drawn(f(*tensors).shape, f(*tensors).dtype)
    graph, made = captured(f, tensors, v)
    results = []
    for _ in range(2):
        with torch.no_grad():
            for t in tensors:
                t.mul_(0.75)
        graph.replay()
        results.append([t.clone() for t in made if t is not None])
        if not first.op.random:
            want = [t for t in forward_and_backward(f, tensors, v) if t is not None]
            torch.testing.assert_close(results[-1], want)
    if first.op.random:  # each replay draws anew
        assert all(t.isfinite().all() for t in results[0])


def test_a_captured_dropout_draws_anew():
    x = torch.ones(1000, device=DEVICE, requires_grad=True)
    v = torch.ones_like(x)  # the graph reads where it lies
    graph, (y, slope) = captured(torchbp.functional.dropout, (x,), v)
    graph.replay()
    before = y.clone()
    graph.replay()
    assert not torch.equal(y, before)
    assert torch.equal(y, slope), "one mask in both passes"
    assert 400 < (y == 0).sum() < 600


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_as_cudnn(name, packed):
    """In float32 over 50 steps of two layers in both directions, without TF32: to the roundings of sums of 128."""
    options = {"num_layers": 2, "bidirectional": True, "device": DEVICE}
    ours, theirs = (getattr(home, name)(32, 64, **options) for home in (torchbp.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x = drawn((50, 8, 32), torch.float32).requires_grad_()
    lengths = torch.tensor([50, 3, 20, 1, 49, 50, 7, 30])
    results = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for module in (ours, theirs):
            given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
            outputs = tensors_of(module(given))
            loss = sum((k + t).cos().sum() for k, t in enumerate(outputs))
            results.append((*outputs, *torch.autograd.grad(loss, (x, *module.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", ["gelu", "softmax", "cross_entropy", "batch_norm"])
def test_inductor(name):
    """One graph of Triton's kernels, forward and backward, with the values and gradients of eager."""
    check_compiled(Case(all_ops()[name], 0), "inductor")


def test_half_of_a_graph_on_each_device():
    """A backward that passes from the GPU to the CPU and back: each node runs on its own."""
    import torchbp.functional as F

    x = torch.linspace(-2, 2, 64, requires_grad=True)
    y = F.softmax(F.gelu(F.silu(x).to(DEVICE)).cpu().view(8, 8), 1).to(DEVICE)
    (ours,) = torch.autograd.grad((y * y).sum(), x)
    f = torch.nn.functional
    z = f.softmax(f.gelu(f.silu(x)).view(8, 8), 1)
    torch.testing.assert_close(ours, torch.autograd.grad((z * z).sum(), x)[0])
