"""What one call tells two checks is still seen by both."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

import torchbp


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def rule_for(order):
    """A product whose rule for vmap, where one input alone is batched, gives the samples in another order."""

    class Product(Function):
        @staticmethod
        def forward(x, y):
            return x * y

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad_z):
            x, y = ctx.saved_tensors
            return Product.apply(grad_z, y), Product.apply(grad_z, x)

        @staticmethod
        def vmap(info, in_dims, x, y):
            xs, ys = (
                t if d is None else t.movedim(d, 0) for t, d in zip((x, y), in_dims, strict=True)
            )
            z = xs * ys
            return (z[order(len(z))] if None in in_dims else z), 0

    return Product.apply


@pytest.mark.parametrize(
    ("order", "right"),
    [
        (torch.arange, True),
        (lambda n: torch.zeros(n, dtype=torch.int64), False),  # the first for all
        (lambda n: torch.full((n,), n - 1), False),
        (lambda n: torch.arange(n).flip(0), False),
        (lambda n: torch.arange(n).roll(1), False),
    ],
)
def test_one_input_batched_alone(order, right):
    report = torchbp.gradcheck(
        rule_for(order), (leaf(3, 4), leaf(3, 4, seed=1)), checks="vmap", raise_exception=False
    )
    assert bool(report) == right


class Largest(Function):
    """Of rows, with the whole gradient for each of several equal ones."""

    @staticmethod
    def forward(ctx, x):
        y = x.amax(-1)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, y = ctx.saved_tensors
        return grad_y[..., None] * (x == y[..., None])


@pytest.mark.parametrize("place", [0, 1])
def test_one_of_two_inputs_that_are_selected_from(place):
    def both(x, y):
        largest = [lambda t: t.amax(-1)] * 2
        largest[place] = Largest.apply
        return largest[0](x) + largest[1](y)

    inputs = (leaf(3, 4), leaf(3, 5, seed=1))
    report = torchbp.gradcheck(both, inputs, checks="ties", raise_exception=False)
    assert [f.input for f in report.wrong] in ([f"input {place}"], [f"input {place}"] * 2)


class OtherGraph(Function):
    """A product by 2, wrong under create_graph."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad_y):
        return (3 if torch.is_grad_enabled() else 2) * grad_y


class EvaluatedOtherwise(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else OtherGraph.apply(x)


def test_the_other_mode_is_asked_in_all_ways():
    report = torchbp.gradcheck(
        EvaluatedOtherwise(), leaf(3, 4), checks="module", raise_exception=False
    )
    assert not report


def test_a_call_on_used_leaves_is_looked_at_for_what_it_leaves():
    kept, seen = [], {}

    def keeps(x):
        kept.append(x * 2)
        return kept[-1] * x

    def remembers(x):
        return x * seen.setdefault(id(x), (x.detach().clone(), x))[0]

    report = torchbp.gradcheck(keeps, leaf(3, 4), checks=["memory", "leaks"], raise_exception=False)
    assert [f.check for f in report.wrong] == ["leaks"]
    report = torchbp.gradcheck(remembers, leaf(3, 4), checks="memory", raise_exception=False)
    assert {f.check for f in report.wrong} == {"memory"}
