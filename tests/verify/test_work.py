"""Large sizes are left out where too much lies between inputs and outputs, and nowhere else."""

import pytest
import torch
from torch.autograd import Function

import torchbp
from torchbp.verify.work import MOST, PRODUCT, Bounded, TooMuch

rows: list[int] = []  # of every call that came to its end


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def all_pairs(x):
    y = (x[:, None] - x).tanh().sum((1, 2))
    rows.append(len(x))
    return y


def product_of_products(x):
    pairs = x @ x.mT / x.shape[1] ** 0.5 / len(x)
    y = pairs @ pairs @ x
    rows.append(len(x))
    return y


class Cumulated(Function):
    """The sums of all rows up to each, whose backward makes a matrix of ones of all pairs of elements."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.cumsum(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_y):
        n = grad_y.numel()
        later = torch.ones(n, n, dtype=grad_y.dtype).triu()
        columns = torch.arange(n) // len(grad_y)
        grad_x = (later * (columns[:, None] == columns)) @ grad_y.mT.reshape(-1)
        rows.append(len(grad_y))
        return grad_x.view(grad_y.mT.shape).mT


@pytest.mark.parametrize(
    ("function", "work"),
    [
        (all_pairs, lambda n: n * n * 31),
        (product_of_products, lambda n: n**3 * PRODUCT),
    ],
)
def test_work_between_inputs_and_outputs_is_bounded(function, work):
    rows.clear()
    report = torchbp.gradcheck(function, leaf(3, 4), checks=["sizes", "low_precision"])
    assert report.capabilities["sizes"].status == "ok"
    assert work(2053) > MOST > work(max(rows))
    assert max(rows) == 257


def test_work_of_backward_is_bounded():
    rows.clear()
    report = torchbp.gradcheck(Cumulated.apply, leaf(3, 4), checks="sizes")
    assert report.capabilities["sizes"].status == "ok"
    assert 33 <= max(rows) < 257


class Shifted(Function):
    """Sums of rows in a loop, and a backward that runs that once for each step: a parameter shift."""

    steps = 0

    @staticmethod
    def run(x):
        y = 0
        for column in x.unbind(1):
            Shifted.steps += 1
            y = (y + column.sin()).cos().sin().cos()
        return y

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Shifted.run(x)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        shifts = 2.0**-17 * torch.eye(x.shape[1], dtype=x.dtype)
        slopes = [(Shifted.run(x + s) - Shifted.run(x - s)) * 2.0**16 for s in shifts]
        return grad_y[:, None] * torch.stack(slopes, 1)


def test_work_of_a_backward_of_many_loops_is_bounded():
    """A gate at 257 places alone would take 2 · 257² steps of five operations, some twenty times."""
    Shifted.steps = 0
    report = torchbp.gradcheck(Shifted.apply, leaf(2, 3), checks="sizes")
    assert report.capabilities["sizes"].status == "ok"
    assert 1000 < Shifted.steps < 2**15


def test_ordinary_functions_are_tried_at_all_sizes():
    rows.clear()

    def attention(x):
        rows.append(len(x))
        return x.softmax(-1).cumsum(0).tanh()

    assert torchbp.gradcheck(attention, leaf(3, 4), checks="sizes")
    assert {1, 33, 64, 127, 2053} <= set(rows)


def test_what_is_compiled_stays_so():
    graphs = []

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    def compiled(x):
        return x.sin() * 2

    with Bounded():
        compiled(leaf(3))
    assert graphs


def test_ends_before_it_does_too_much():
    """On the device "meta" nothing is done: what is not refused would pass."""
    wide, tall, square, one = (
        torch.empty(shape, device="meta")
        for shape in ((2**12, 2**10), (2**10, 2**12), (2**11, 2**11), (1,))
    )
    with Bounded(), pytest.raises(TooMuch, match="mm"):
        _ = wide @ tall @ wide
    with Bounded(), pytest.raises(TooMuch, match="eigh"):
        torch.linalg.eigh(square)
    with Bounded(), pytest.raises(TooMuch, match="mul"):
        _ = wide.view(-1, 1)[: 2**14] * wide.view(-1)[: 2**13]
    with Bounded(), pytest.raises(TooMuch, match="ones"):
        torch.ones(2**14, 2**13, device="meta")
    with Bounded(), pytest.raises(TooMuch, match="index"):
        _ = wide[torch.zeros(2**17, dtype=torch.int64, device="meta")]
    with Bounded():
        _ = square[:64] @ square, one.expand(2**30).view(2**15, -1)
