"""Tensors whose class computes for them: wrappers, and distributed tensors."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.two_tensor import TwoTensor

import torchbp.functional
from tests.ops.conftest import torchs, with_args
from torchbp.ops._samples import one_tensor

pytestmark = pytest.mark.cpu("what their classes do is the same on every device")


def check(case, wrap, parts):
    """Of wrapped arguments the value and gradients of plain ones, wherever torch's own function takes them."""

    def outcome(function, wrap):
        wrapped = with_args(
            case.sample(), lambda t: wrap(t.detach()).requires_grad_(t.requires_grad)
        )
        y = (
            case.function(*wrapped.args, **wrapped.kwargs)
            if function is None
            else one_tensor(function(*wrapped.args, **wrapped.kwargs))
        )
        leaves = [t for t in wrapped.tensors() if t.requires_grad]
        return y, *torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)

    try:
        outcome(torchs(case.op), wrap)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch's own refuses")
    ours = outcome(None, wrap)
    if case.op.random:
        return
    want = outcome(None, lambda t: t.clone())
    for a, b in zip(ours, want, strict=True):
        for part in () if b is None else parts(a):
            torch.testing.assert_close(part, b)


def test_a_wrapper(first):
    """As those of quantization and of sharding are: everything that is made is wrapped, too."""

    def parts(t):
        return (t.a, t.b) if isinstance(t, TwoTensor) else (t,)

    check(first, lambda t: TwoTensor(t.clone(), t.clone()), parts)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    rendezvous = f"file://{tmp_path_factory.mktemp('ranks')}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_distributed_tensors(first, mesh):
    def wrap(t):
        return distribute_tensor(t, mesh, [Shard(0) if t.dim() else Replicate()])

    check(first, wrap, lambda t: (t.full_tensor() if isinstance(t, DTensor) else t,))


@pytest.mark.parametrize("name", ["info_nce_loss", "sparsemax"])
def test_distributed_tensors_beyond_torch(name, mesh):
    function = getattr(torchbp.functional, name)
    given = [torch.randn(4, 5) for _ in range(2 if name == "info_nce_loss" else 1)]

    def outcome(wrap):
        leaves = [wrap(t).requires_grad_() for t in given]
        y = function(*leaves)
        return y, *torch.autograd.grad(y.sin().sum(), leaves)

    ours = outcome(lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    for a, b in zip(ours, outcome(torch.clone), strict=True):
        torch.testing.assert_close(a.full_tensor(), b)


class Named(Tensor):
    """Takes every function of torch's, and none of ours."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert not getattr(func, "__module__", "").startswith("torchbp")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")  # torch's
def test_a_class_that_takes_all_of_torchs_functions(case):
    """They are called as torch's own signatures, built in or not, will have it."""
    own = getattr(torch.nn.functional, case.op.name, None)
    if own is None:
        pytest.skip("torch has none")
    sample = with_args(case.sample(), Tensor.detach)
    if case.op.name == "l1_loss" and "weight" in sample.kwargs:
        pytest.skip("torch (2.13) loses the weight on the way to the class")
    try:
        torch.manual_seed(1)
        want = one_tensor(own(*sample.args, **sample.kwargs))
    except (TypeError, RuntimeError):
        pytest.skip("torch's own does not take it")
    as_named = lambda t: t.as_subclass(Named) if t.is_floating_point() else t  # noqa: E731
    got = case.call(with_args(sample, as_named))
    torch.testing.assert_close(got.as_subclass(Tensor), want, equal_nan=True)
