"""Whatever is written to, and whenever: the same gradient as without lean, or the same refusal, never a wrong one."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import torchbp
import torchbp.functional as F

CASES = {}


def case(f):
    CASES[f.__name__] = f
    return f


def hidden(x, w):
    return F.linear(x, w)


@case
def output_written_to_before_it_is_kept(x, w):
    y = F.gelu(hidden(x, w))
    with torch.no_grad():
        y.mul_(2)
    return F.linear(y, w)


@case
def output_written_to_after_it_is_kept(x, w):
    y = F.gelu(hidden(x, w))
    z = F.linear(y, w)
    with torch.no_grad():
        y.mul_(2)
    return z


@case
def output_differentiably_written_to_after_it_is_kept(x, w):
    y = F.gelu(hidden(x, w))
    z = F.linear(y, w)
    y.mul_(2)
    return z


@case
def view_written_to_after_it_is_kept(x, w):
    y = F.gelu(hidden(x, w))
    z = F.linear(y, w)
    with torch.no_grad():
        y[0].zero_()
    return z


@case
def input_written_to(x, w):
    h = hidden(x, w)
    z = F.linear(F.gelu(h), w)
    with torch.no_grad():
        h.mul_(2)
    return z


@case
def input_of_what_keeps_its_output_written_to(x, w):
    h = hidden(x, w)
    z = F.linear(F.relu(h), w)
    with torch.no_grad():
        h.mul_(2)
    return z


@case
def chain_written_to_in_the_middle(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    with torch.no_grad():
        a.mul_(2)
    return F.linear(F.relu(a), w)


@case
def chain_written_to_at_its_middle_after(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    b = F.relu(a)
    z = F.linear(b, w)
    with torch.no_grad():
        a.mul_(2)
    return z


@case
def in_place_chain(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    a += F.gelu(hidden(x, w))
    return F.linear(F.relu(a, inplace=True), w)


@case
def in_place_chain_written_to_between(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    with torch.no_grad():
        a.mul_(2)
    a += F.gelu(hidden(x, w))
    return F.linear(F.relu(a, inplace=True), w)


@case
def in_place_chain_written_to_before_the_relu(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    a += F.gelu(hidden(x, w))
    with torch.no_grad():
        a.mul_(2)
    return F.linear(F.relu(a, inplace=True), w)


@case
def sum_written_to(x, w):
    s = F.layer_norm(hidden(x, w), (8,)) + F.gelu(hidden(x, w))
    with torch.no_grad():
        s.clamp_(-1, 1)
    return F.linear(s, w)


@case
def operand_of_a_sum_written_to_before(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    with torch.no_grad():
        a.mul_(2)
    return F.linear(a + F.gelu(hidden(x, w)), w)


@case
def operand_of_a_sum_written_to_after(x, w):
    a = F.layer_norm(hidden(x, w), (8,))
    s = a + F.gelu(hidden(x, w))
    z = F.linear(s, w)
    with torch.no_grad():
        a.mul_(2)
    return z


@case
def intermediate_of_torchs_own_ops_written_to(x, w):
    s = torch.add(F.gelu(hidden(x, w)), F.gelu(hidden(x, w)))
    with torch.no_grad():
        s.mul_(2)
    return F.linear(s * torch.full_like(s, 0.5).detach(), w)


@case
def intermediate_written_to_before_our_op(x, w):
    s = F.gelu(hidden(x, w)) - F.silu(hidden(x, w))
    with torch.no_grad():
        s.mul_(2)
    return F.linear(F.relu(s), w)


ELSEWHERE = []  # graphs that nobody runs backward


@case
def sum_written_to_of_what_is_kept_elsewhere(x, w):
    a, b = F.gelu(hidden(x, w)), F.silu(hidden(x, w))
    ELSEWHERE.append([F.linear(a, w), F.linear(b, w)])
    s = a + b
    with torch.no_grad():
        s.mul_(2)
    return F.linear(s, w)


@case
def product_written_to_of_what_is_kept_elsewhere(x, w):
    s = F.gelu(hidden(x, w)) * F.silu(hidden(x, w))
    with torch.no_grad():
        s.mul_(2)
    return F.linear(s, w)


@case
def written_to_after_it_is_kept_elsewhere(x, w):
    y = F.gelu(hidden(x, w))
    ELSEWHERE.append(F.linear(y, w))
    with torch.no_grad():
        y.mul_(2)
    return F.linear(y, w)


@case
def written_to_after_it_is_kept_elsewhere_then_a_chain(x, w):
    y = F.gelu(hidden(x, w))
    ELSEWHERE.append(F.linear(y, w))
    with torch.no_grad():
        y.mul_(2)
    return F.linear(F.relu(y), w)


@case
def middle_of_a_chain_written_to_that_is_kept_elsewhere(x, w):
    y = F.gelu(hidden(x, w))
    ELSEWHERE.append(F.linear(y, w))
    z = F.linear(F.relu(y), w)
    with torch.no_grad():
        y.mul_(2)
    return z


@case
def leaf_written_to_before_a_sum_of_it_is_kept(x, w):
    y = x + x
    with torch.no_grad():
        x.mul_(2)
    return F.linear(y, w)


@case
def detached_and_written_to(x, w):
    y = F.gelu(hidden(x, w))
    z = F.linear(y, w)
    y.detach().mul_(2)
    return z


@case
def leaf_that_our_op_reads_written_to_before_it_is_kept(x, w):
    bias = torch.zeros(8, requires_grad=True)  # which no backward reads
    y = F.layer_norm(hidden(x, w), (8,), None, bias)
    with torch.no_grad():
        bias.add_(1)
    return F.linear(y, w)


class Rude(torch.autograd.Function):
    """Its backward writes to what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x.mul_(2).mul_(grad)


@case
def made_for_two_and_written_to_by_one(x, w):
    y = F.gelu(hidden(x, w))
    z = F.linear(y, w)
    return z + Rude.apply(y)


@case
def made_for_one_and_written_to_by_it(x, w):
    return F.linear(Rude.apply(F.gelu(hidden(x, w))), w)


@case
def weight_of_a_norm_written_to(x, w):
    scale = torch.ones(8, requires_grad=True)
    z = F.linear(F.layer_norm(hidden(x, w), (8,), scale), w)
    with torch.no_grad():
        scale.mul_(2)
    return z


@case
def inplace_dropout(x, w):
    torch.manual_seed(3)
    return F.linear(F.dropout(F.gelu(hidden(x, w)), 0.5, inplace=True), w)


@case
def running_statistics_move(x, w):
    mean, var = torch.zeros(8), torch.ones(8)
    y = F.relu(F.batch_norm(hidden(x, w), mean, var, training=True))
    z = F.linear(y, w)
    return z + F.linear(F.relu(F.batch_norm(hidden(x, w), mean, var, training=True)), w)


def outcome(f, scope):
    """Return the gradients, or what was said as they were refused."""
    torch.manual_seed(0)
    x, w = torch.randn(16, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with scope():
        z = f(x, w)
    try:
        return torch.autograd.grad(z.sum(), (x, w))
    except RuntimeError as error:
        return str(error)


def refused(outcome):
    return isinstance(outcome, str) and "modified by an inplace operation" in outcome


@pytest.mark.filterwarnings("ignore:lean_scope")
@pytest.mark.parametrize("f", CASES.values(), ids=CASES)
def test_as_without_lean(f):
    want, got = outcome(f, nullcontext), outcome(f, torchbp.lean_scope)
    ELSEWHERE.clear()
    assert refused(got) == refused(want)
    if not refused(want):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_some_are_refused_and_some_are_not():
    assert sum(refused(outcome(f, nullcontext)) for f in CASES.values()) in range(6, 11)
    ELSEWHERE.clear()


def test_graph_that_another_backward_has_released():
    w = torch.randn(8, 8, requires_grad=True)
    with torchbp.lean_scope():
        y = F.gelu(F.linear(torch.randn(16, 8), w))
        first, second = F.linear(y, w).sum(), F.linear(y.detach(), w).sum()
        v = torch.randn(8, 8, requires_grad=True)
        third = F.linear(y, v).sum()
    want = [torch.outer(torch.ones(8), y.detach().sum(0))] * 2
    first.backward()
    torch.testing.assert_close(torch.autograd.grad(second, w)[0], want[0])
    torch.testing.assert_close(torch.autograd.grad(third, v)[0], want[1])


def test_truncated_backpropagation_through_time_holds_no_history():
    w = torch.randn(8, 8, requires_grad=True)
    h = torch.zeros(4, 8)
    watched = []
    for _ in range(5):
        with torchbp.lean_scope():
            inner = F.linear(h, w)
            watched.append(weakref.ref(inner.untyped_storage()))
            h = F.layer_norm(F.gelu(inner) + h, (8,))
            F.linear(h, w).sum().backward()
        h = h.detach()
    del inner
    assert not any(ref() for ref in watched)


def test_a_repeated_backward_is_refused_as_by_torch():
    model = torchbp.lean(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    y = model(torch.randn(4, 8)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
