"""What single checks find, and what they let pass."""

from types import SimpleNamespace

import torch
from torch.autograd import Function

import torchbp


def sample(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def found(function, inputs, check):
    """Return what one check says, and see to it that it was made."""
    report = torchbp.gradcheck(function, inputs, checks=check, raise_exception=False)
    assert "itself failed" not in report.capabilities[check].detail
    return report.findings


class KeptOutput(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.y = y.detach()
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * ctx.y


def test_an_output_that_was_modified_is_no_input_that_was():
    (finding,) = found(KeptOutput.apply, sample(2, 3), "modified")
    assert "after an output was modified" in finding.message


class FirstOfTwo(Function):
    """An input as it is, which autograd takes for a view of it."""

    @staticmethod
    def forward(ctx, x, y):
        return x

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y, torch.zeros_like(grad_y)


def test_a_view_that_refuses_is_not_modified():
    assert not found(FirstOfTwo.apply, (sample(3), sample(3, seed=1)), "modified")


class Doubled(Function):
    """Twice x: the adjoint of this complex code is itself."""

    @staticmethod
    def forward(ctx, x):
        """Not of complex numbers."""
        return x + x.real

    @staticmethod
    def backward(ctx, grad_y):  # of no complex ones
        def adjoint(x):
            return x

        return adjoint(2 * grad_y)


class DoubledComplex(Doubled):
    @staticmethod
    def forward(ctx, x):
        return torch.complex(x, x).real + x if not x.is_complex() else x + x.real


def test_words_of_comments_take_no_complex_numbers():
    report = torchbp.gradcheck(
        Doubled.apply, sample(3, 4), checks=["values", "complex_inputs"], raise_exception=False
    )
    assert report.capabilities["complex_inputs"].status == "not applicable"
    assert found(DoubledComplex.apply, sample(3, 4), "complex_inputs")


class Products(Function):
    """Of queries and keys, for each of a batch."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return torch.einsum("bqd,bkd->bqk", q, k)

    @staticmethod
    def backward(ctx, grad_y):
        q, k = ctx.saved_tensors
        if len(q) != len(k):
            raise IndexError("one batch is another")
        return grad_y @ k, grad_y.mT @ q


def test_an_input_that_forward_does_not_look_at_is_emptied_too():
    assert not found(FirstOfTwo.apply, (sample(3), sample(3, seed=1)), "empty")


def test_a_batch_of_one_is_emptied_as_a_whole():
    inputs = sample(1, 4, 3), sample(1, 4, 3, seed=1)
    assert not found(Products.apply, inputs, "empty")


class Biased(Function):
    """Twice x, and the bias where that is learned."""

    @staticmethod
    def forward(ctx, x, b):
        return 2 * x + b if b.requires_grad else 2 * x

    @staticmethod
    def backward(ctx, grad_y):
        return 2 * grad_y, grad_y.sum(0) if ctx.needs_input_grad[1] else None


def test_values_are_the_same_whatever_requires_grad():
    x, b = sample(3, 4), sample(4, seed=1)
    (finding,) = found(Biased.apply, (x, b), "requires_grad")
    assert finding.message.startswith("output 0 wrong in 12/12")
    (finding,) = found(Biased.apply, (x, b.detach()), "unasked")
    assert finding.message.startswith("output 0 wrong in 12/12")


class Resizing(Function):
    """The sum of squares; what comes back is made as large as the input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return 2 * x * grad_y.item() + 0 * grad_y.resize_as_(x).zero_()


def test_a_backward_that_resizes_its_grad_output_writes():
    report = torchbp.gradcheck(Resizing.apply, sample(3, 4), raise_exception=False, skip="compile")
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]
    assert report.wrong[0].check == "writes"
    assert report.wrong[0].message == "backward resizes grad_output, of shape (), to (3, 4)"


class GradWriter(Function):
    """x w, whose backward adds to .grad of w, as that of a reversible layer does."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x * layer.weight.detach()

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            torch.autograd.backward(x.detach() * ctx.layer.weight, grad_y)
        return grad_y * ctx.layer.weight.detach(), None


def test_what_backward_adds_to_parameters_that_are_closed_over():
    layer = torch.nn.RMSNorm(4, dtype=torch.float64)
    before = torch.full((4,), 2.0, dtype=torch.float64)
    for grad in (None, before.clone()):
        layer.weight.grad = grad
        (finding,) = found(lambda x: GradWriter.apply(x, layer), sample(3, 4), "writes")
        assert finding.message == "backward writes to .grad of parameter weight of RMSNorm"
        assert layer.weight.grad is grad
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, before)


def test_what_backward_adds_to_a_tensor_that_is_closed_over():
    weight = sample(4)
    layer = SimpleNamespace(weight=weight)

    def function(x):
        return GradWriter.apply(x, layer) + 0 * weight.detach()

    (finding,) = found(function, sample(3, 4), "writes")
    assert finding.message == "backward writes to .grad of a tensor that the function holds"
    assert weight.grad is None


def normed(x, running_mean):
    """Statistics are written as torch's batch_norm writes them."""
    with torch.no_grad():
        running_mean.lerp_(x.mean(0), 0.1)
    return x - x.mean(0)


class CountedData(Function):
    @staticmethod
    def forward(ctx, x, target):
        y = x * target
        ctx.save_for_backward(target.clone())
        target.add_(1.0)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * ctx.saved_tensors[0], None


def test_what_forward_writes_to_a_constant_is_noted():
    (finding,) = found(normed, (sample(3, 4), torch.zeros(4, dtype=torch.float64)), "writes")
    assert finding.severity == "note"
    assert finding.message.startswith("forward writes to input 1: element [0] was 0, is ")
    ones = torch.ones(3, 4, dtype=torch.float64)
    (finding,) = found(CountedData.apply, (sample(3, 4), ones), "writes")
    assert finding.severity == "wrong"


class ThroughFloat32(Function):
    """exp(x), computed in torch's default dtype."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tensor(x.tolist()).exp().to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return grad_y * torch.tensor(x.tolist()).exp().to(x.dtype)


def test_outputs_that_move_with_the_default_dtype_are_noted():
    (finding,) = found(ThroughFloat32.apply, sample(3, 4), "default_dtype")
    assert finding.severity == "note"
    assert finding.message.startswith("output 0 moves by ")
    assert finding.message.endswith(" where float64 is torch's default dtype, not torch.float32")


class Sampled(Function):
    """logsumexp, whose gradient is one element, drawn with the odds of the right one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        chosen = torch.distributions.Categorical(logits=x).sample()
        one = torch.zeros_like(x).scatter(-1, chosen[..., None], 1.0)
        return one * grad_y[..., None]


def test_a_backward_that_draws_is_told_as_that():
    report = torchbp.gradcheck(
        Sampled.apply, sample(3, 4), raise_exception=False, skip=("compile", "differences")
    )
    assert {f.check for f in report.wrong} <= {"determinism", "random_state"}
    assert "random_state" in {f.check for f in report.wrong}
    assert report.capabilities["linearity"].status == "not applicable"


class RootTrace(Function):
    """The trace of a symmetric matrix's root; of negative eigenvalues forward takes the size, and backward does not."""

    @staticmethod
    def forward(ctx, x):
        w, v = torch.linalg.eigh((x + x.mT) / 2)
        ctx.save_for_backward(w, v)
        return w.abs().sqrt().sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        w, v = ctx.saved_tensors
        return (v * (0.5 * grad_y[..., None] / w.abs().sqrt())[..., None, :]) @ v.mT


def test_what_is_wrong_of_indefinite_matrices_alone_is_a_note_where_the_sample_is_definite():
    a = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    skip = ("compile", "autocast", "low_precision", "empty")
    definite = (a @ a.mT + torch.eye(3)).requires_grad_()
    report = torchbp.gradcheck(RootTrace.apply, definite, skip=skip, raise_exception=False)
    assert report, str(report)
    notes = [f for f in report.findings if f.severity == "note"]
    assert any("positive definite" in f.message for f in notes)
    indefinite = (a + a.mT).requires_grad_()
    assert not torchbp.gradcheck(RootTrace.apply, indefinite, skip=skip, raise_exception=False)
