"""What autograd asks of every op: higher orders, forward mode, batches, layouts, and no trace left behind."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from tests.device import DEVICE
from tests.ops.conftest import HALF, drawn, with_args
from tests.ops.test_values import gradients


def test_gradcheck(case):
    """First and second order against finite differences, forward mode, forward over reverse, batched gradients."""
    if case.op.estimator:
        pytest.skip("not the derivative of its forward, by definition")
    f, tensors = case.of_tensors(case.sample())
    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(
        f, tensors, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_passes_our_own_gradcheck(first):
    import torchbp

    if first.op.estimator:
        pytest.skip("not the derivative of its forward, by definition")
    f, tensors = first.of_tensors(first.sample())
    assert torchbp.gradcheck(f, tensors, skip=["compile"])  # test_transforms compiles


def test_forward_mode_over_a_backward_without_a_graph(first):
    """A Hessian's product with a direction, as the tangent of a gradient of dual tensors."""
    if first.op.estimator:
        pytest.skip("not the derivative of its forward, by definition")
    f, tensors = first.of_tensors(first.sample())
    tangents = []
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(t, drawn(t.shape)) for t in tensors))
        for graph in (True, False):
            grads = torch.autograd.grad(y.sin().sum(), tensors, create_graph=graph)
            tangents.append([forward_ad.unpack_dual(g).tangent for g in grads])
    zeros = [torch.zeros_like(t) for t in tensors]
    want, got = ([z if t is None else t for t, z in zip(ts, zeros, strict=True)] for ts in tangents)
    torch.testing.assert_close(got, want)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "offset": lambda t: torch.cat([t.flatten() + 1, t.flatten()])[t.numel() :].view(t.shape),
    "expanded": lambda t: t[:1].expand_as(t),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, layout):
    """Inputs and incoming gradients of any strides: the values and gradients of contiguous ones."""
    if case.op.random and DEVICE != "cpu" and layout in ("transposed", "channels last"):
        pytest.skip("draws in the order of memory, as torch does there")
    sample = case.sample()

    def laid_out(t: Tensor) -> Tensor:
        least = {"transposed": 2, "expanded": 2, "channels last": 3}.get(layout, 0)
        if t.dim() < least:
            return t
        return LAYOUTS[layout](t.detach()).requires_grad_(t.requires_grad)

    changed = with_args(sample, laid_out)
    plain = with_args(changed, lambda t: t.detach().contiguous().requires_grad_(t.requires_grad))
    (f, a), (g, b) = case.of_tensors(changed), case.of_tensors(plain)
    y, z = f(*a), g(*b)
    torch.testing.assert_close(y, z)
    regular = torch.randn(y.shape, dtype=y.dtype, device=DEVICE)
    irregular = laid_out(regular) if y.dim() > 1 else regular
    for v in (irregular, regular, torch.ones((), dtype=y.dtype, device=DEVICE).expand_as(y)):
        want = torch.autograd.grad(z, b, v.contiguous(), retain_graph=True)
        for output, inputs in ((y, a), (z, b)):
            ours = torch.autograd.grad(output, inputs, v, retain_graph=True)
            for p, q in zip(ours, want, strict=True):
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_writes_to_nothing_it_was_given(case, dtype):
    sample = case.sample(dtype)
    f, tensors = case.of_tensors(sample)
    before = [t.detach().clone() for t in sample.tensors()]
    y = f(*tensors)
    v = torch.randn_like(y)
    v_before = v.clone()
    kept = torch.autograd.grad(y, tensors, v, create_graph=True, allow_unused=True)
    torch.autograd.grad(y, tensors, v, allow_unused=True, retain_graph=True)
    assert torch.equal(v, v_before)
    for t, b in zip(sample.tensors(), before, strict=True):
        torch.testing.assert_close(t.detach(), b, rtol=0, atol=0, equal_nan=True)
    assert all(g is None or g.shape == t.shape for g, t in zip(kept, tensors, strict=True))


def test_backward_twice(case):
    f, tensors = case.of_tensors(case.sample())
    y = f(*tensors)
    v = torch.randn_like(y)
    once = torch.autograd.grad(y, tensors, v, retain_graph=True)
    twice = torch.autograd.grad(y, tensors, v)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    saves = any(t.numel() for t in kept_storages(f, tensors)[1])
    if saves and y.grad_fn.name().endswith("FunctionBackward"):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, tensors, v)


def test_one_gradient_at_a_time(case):
    """Each subset of inputs that requires grad gets the gradient it gets among all."""
    sample = case.sample()
    f, tensors = case.of_tensors(sample)
    together = gradients(f, tensors)
    for i, t in enumerate(tensors):
        alone = [u if u is t else u.detach() for u in tensors]
        y = f(*alone)
        (grad,) = torch.autograd.grad(y, t, drawn(y.shape))
        torch.testing.assert_close(grad, together[i], rtol=1e-9, atol=1e-12)


def kept_storages(f, tensors) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        y = f(*tensors)
    return y, kept


def storage_bytes(tensors) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.numel()}
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_keeps_the_bytes_it_declares(case, dtype):
    """All that is kept goes through saved-tensor hooks: what the op declares, and never more than torch keeps."""
    sample = case.sample(dtype)
    f, tensors = case.of_tensors(sample)
    y, kept = kept_storages(f, tensors)
    assert storage_bytes(kept) == case.op.saved_bytes(*sample.args, **sample.kwargs)
    context = vars(y.grad_fn) if y.grad_fn is not None and hasattr(y.grad_fn, "__dict__") else {}
    assert not [name for name, value in context.items() if isinstance(value, Tensor)]
    if not case.op.random:
        g, again = case.of_tensors(case.sample(dtype), case.reference)
        _, theirs = kept_storages(g, again)
        scalars = 8 * len(
            theirs
        )  # torch keeps a scalar or two inside its nodes, which no hook sees
        assert storage_bytes(kept) <= storage_bytes(theirs) + scalars


def test_a_changed_saved_tensor_raises(first):
    """Whatever the op keeps is watched by autograd's version check."""
    f, tensors = first.of_tensors(first.sample())
    y, kept = kept_storages(f, tensors)
    y = f(*tensors)
    storages = {t.untyped_storage()._cdata for t in kept if t.numel()}
    for t in (*tensors, y):
        if t.untyped_storage()._cdata in storages:
            with torch.no_grad():
                t.add_(0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)


def test_backward_under_saved_tensor_hooks(case):
    """Offloading hooks that move what is kept elsewhere change no gradient."""

    def placed(array):
        return torch.from_numpy(array).to(DEVICE)

    f, tensors = case.of_tensors(case.sample())
    want = gradients(f, tensors)
    with saved_tensors_hooks(lambda t: t.detach().cpu().numpy().copy(), placed):
        ours = gradients(f, tensors)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
