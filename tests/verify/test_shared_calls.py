"""What one call tells two checks is still seen by both."""

import pytest
import torch
from torch import nn
from torch.autograd import Function, forward_ad

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


class WrongWhere(Function):
    """x times y, with a gradient that is twice as large where a condition of the inputs holds."""

    @staticmethod
    def forward(ctx, x, y, holds):
        ctx.save_for_backward(x, y)
        ctx.holds = holds
        return x * y

    @staticmethod
    def backward(ctx, grad_z):
        x, y = ctx.saved_tensors
        factor = 2.0 if ctx.holds else 1.0
        return factor * grad_z * y, grad_z * x, None


def wrong_checks(function, inputs, *checks):
    report = torchbp.gradcheck(function, inputs, checks=checks, raise_exception=False)
    assert all(report.capabilities[c].status != "not run" for c in checks)
    return {f.check for f in report.wrong}


def test_integers_that_are_equal_in_a_larger_row_alone_are_named_by_their_check():
    def taken(table, index):
        rows = table[index]
        return WrongWhere.apply(rows, rows.sin(), len(index.unique()) == 1).sum(-1)

    inputs = (leaf(5, 3), torch.tensor([3, 0, 2, 0]))
    assert wrong_checks(taken, inputs, "sizes", "indices") == {"indices"}
    right = wrong_checks(lambda t, i: taken(t, torch.cat([i, i + 1])), inputs, "sizes", "indices")
    assert not right


def test_rows_that_meet_others_in_a_larger_row_are_named_by_their_check():
    def met(x, y):
        return WrongWhere.apply(x.sin(), y.cos(), bool(x[0, 0] * y[1, 0] > 0)).sum(-1)

    inputs = (leaf(4, 3), leaf(4, 3, seed=2))
    assert inputs[0][0, 0] * inputs[1][1, 0] < 0
    assert wrong_checks(met, inputs, "sizes", "pairing") == {"pairing"}


@pytest.mark.parametrize("place", [0, 1])
def test_of_degenerate_samples_in_one_batch_the_wrong_one_is_found(place):
    def product(x, y):
        given = (x, y)[place]
        flat = given.detach().abs().amax((-1, -2))  # of each sample of a batch
        factor = 1.0 + (flat == 0).to(x.dtype)
        z = x.sin() * y.cos() + x
        return Scaled.apply(z, factor[..., None, None]).cumsum(-1)

    inputs = (leaf(3, 4), leaf(3, 4, seed=1))
    assert wrong_checks(product, inputs, "batch_dimension", "degenerate") == {"degenerate"}


class Scaled(Function):
    """x, with a gradient that is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * ctx.factor, None


def recorded_or_not(x):
    return x.sin() if torch.is_grad_enabled() else x.cos()


def test_another_way_without_a_gradient_is_seen_on_dual_numbers():
    def function(x):  # whose source does not say so
        return recorded_or_not(x) * 2

    assert wrong_checks(function, leaf(3, 4), "memory", "forward_mode") == {"memory"}
    assert not wrong_checks(lambda x: x.sin(), leaf(3, 4), "memory", "forward_mode")


class Sine(Function):
    """Without a jvp, or a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * ctx.saved_tensors[0].cos()


def test_where_transforms_go_another_way_they_are_asked():
    def function(x):
        composed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        return x.sin() if composed else Sine.apply(x)

    report = torchbp.gradcheck(function, leaf(3, 4), checks=["forward_mode", "vmap"])
    assert {c.status for c in report.capabilities.values()} == {"ok"}


def running_sum(terms):
    total = 0
    for term in terms:
        total = total + term
    return total


class Product(Function):
    """A product of matrices whose gradients are summed in their own precision: of the inputs that are named."""

    stalled = ()

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad_y):
        a, b = ctx.saved_tensors
        grad_a, grad_b = grad_y @ b.mT, a.mT @ grad_y
        if "a" in Product.stalled:
            grad_a = running_sum(
                g[:, None] * row for g, row in zip(grad_y.unbind(1), b.unbind(1), strict=True)
            )
        if "b" in Product.stalled:
            grad_b = running_sum(
                row[:, None] * g for row, g in zip(a.unbind(0), grad_y.unbind(0), strict=True)
            )
        return grad_a, grad_b


@pytest.mark.parametrize("stalled", ["", "a", "b", "ab"])
def test_of_two_long_dimensions_at_once_the_one_that_stalls_is_found(stalled, monkeypatch):
    monkeypatch.setattr(Product, "stalled", stalled)
    report = torchbp.gradcheck(
        Product.apply,
        (leaf(3, 4), leaf(4, 5, seed=1)),
        checks="long_reductions",
        raise_exception=False,
    )
    assert report.capabilities["long_reductions"].status == ("wrong" if stalled else "ok")
    assert all(
        f.input == f"input {'ab'.index(stalled[0])}" for f in report.wrong if len(stalled) == 1
    )


class Frozen(Function):
    """x times y, whose second gradient hangs on the flag of the first."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad_z):
        x, y = ctx.saved_tensors
        return grad_z * y, grad_z * x if ctx.needs_input_grad[0] else None


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)])
def test_what_hangs_on_another_flag_is_found_for_images_too(shape):
    inputs = (leaf(*shape), leaf(*shape, seed=1))
    assert wrong_checks(Frozen.apply, inputs, "input_layouts", "requires_grad") == {"requires_grad"}
