"""Every op's output is made again to the last bit, whoever wants to keep it."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import torchbp
from tests.recompute.compared import Count, same
from torchbp.functional import softsign
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make, one_tensor

# Cheap to make again, so that each of these must have been: every op of the families but for those named.
FAMILIES = ("activations", "normalization", "dropout", "estimators")
VIEWS = {"gradient_reversal", "gradient_scale", "straight_through"}  # hand on what they are given


def consumed(op, sample, spread):
    """Return the gradients of a product with the op's output, which keeps it twice, once as a view.

    ``spread``: its inputs lie in memory with holes between the elements.
    """
    leaves, structure = tree_flatten((sample.args, sample.kwargs))
    torch.manual_seed(1)
    made = []

    def hidden(t):
        if not (isinstance(t, torch.Tensor) and t.requires_grad):
            return t
        leaf = t.detach().clone().requires_grad_()
        made.append(leaf)
        t = softsign(leaf)  # whose output lean makes again
        return torch.stack((t, t), -1)[..., 0] if spread else t

    args, kwargs = tree_unflatten([hidden(t) for t in leaves], structure)
    y = one_tensor(op.function(*args, **kwargs))
    w = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape).requires_grad_()
    z = y * w
    if y.dim():
        z = z.sum() + (y.transpose(0, -1)[:1] * w.transpose(0, -1)[:1]).sum()
    return [z.detach(), *torch.autograd.grad(z.sum(), (*made, w))]


@pytest.mark.filterwarnings("ignore:lean_scope")  # of a loss, whose output is nobody's input
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [False, True], ids=["dense", "spread"])
@pytest.mark.parametrize("name", list(all_ops()))
def test_gradients_are_the_same_bits(name, dtype, spread, monkeypatch):
    op = all_ops()[name]
    count = Count(monkeypatch)
    for index, sample in enumerate(op.samples(Make(dtype))):
        try:
            want = consumed(op, sample, spread)
        except (NotImplementedError, RuntimeError):
            continue  # not in this dtype
        again = list(op.samples(Make(dtype)))[index]
        with torchbp.lean_scope():
            got = consumed(op, again, spread)
        same(got, want)
    family = op.function.__wrapped__.__module__.split(".")[2]
    if family in FAMILIES and name not in VIEWS and not spread:
        assert count.shared, "its output was kept"
