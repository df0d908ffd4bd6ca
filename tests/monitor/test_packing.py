"""Many small tensors measured together, against each by itself in double."""

import numpy as np
import pytest
import torch

from torchbp.monitor._norms import norms
from torchbp.monitor._packing import Packing, Shelf, small

SHAPES = [(3, 4), (5,), (), (7, 4), (5,), (2, 3, 3), (1,), (64, 32), (64, 32)]


def tensors(scale, seed=0, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) * scale for shape in shapes]


def put(shelf, given):
    return shelf.ask(norms, shelf.put([given[i] for i in shelf.packing.order]))


def wanted(shelf, given):
    return [given[i].double().norm().item() for i in shelf.packing.order]


# Down to where float32 holds the elements but not their squares, and up to where these overflow.
@pytest.mark.parametrize("scale", [1, 1e-12, 1e-17, 1e-25, 1e-36, 1e10, 1e19, 1e36, 0])
@pytest.mark.parametrize("sizes", [SHAPES, [(n,) for n in range(1, 40)]], ids=["few", "many"])
def test_norms_of_every_magnitude(scale, sizes):
    shelf = Shelf(Packing(sizes))
    given = [
        [t if k % 2 else t * scale for k, t in enumerate(tensors(1, s, sizes))] for s in (0, 1)
    ]
    found = [put(shelf, row) for row in given]
    shelf.empty()
    for values, row in zip(found, given, strict=True):
        np.testing.assert_allclose(values, wanted(shelf, row), rtol=1e-6)


def test_what_is_not_finite_stays_where_it_is():
    shelf = Shelf(Packing(SHAPES))
    given = tensors(1)
    given[0][1, 2], given[5][0] = float("nan"), float("inf")
    found = put(shelf, given)
    shelf.empty()
    np.testing.assert_allclose(found, wanted(shelf, given), rtol=1e-6)


def test_a_full_shelf_is_emptied_first():
    shelf = Shelf(Packing(SHAPES))
    rows = shelf.free
    given = [tensors(1, seed) for seed in range(2 * rows + 3)]
    found = [put(shelf, row) for row in given]
    assert shelf.filled == 2
    shelf.empty()
    for values, row in zip(found, given, strict=True):
        np.testing.assert_allclose(values, wanted(shelf, row), rtol=1e-6)


def test_a_difference_of_rows():
    shelf = Shelf(Packing(SHAPES))
    before, after = tensors(1), tensors(1, 1)
    first = shelf.put([before[i] for i in shelf.packing.order], room=2)
    second = shelf.put([after[i] for i in shelf.packing.order])
    shelf.subtract(second, first)
    weight, update = shelf.ask(norms, first), shelf.ask(norms, second)
    shelf.empty()
    np.testing.assert_allclose(weight, wanted(shelf, before), rtol=1e-6)
    changes = [a - b for a, b in zip(after, before, strict=True)]
    np.testing.assert_allclose(update, wanted(shelf, changes), rtol=1e-6)


def test_room_for_two_rows_is_made_before_the_first():
    shelf = Shelf(Packing(SHAPES))
    order = shelf.packing.order
    for seed in range(shelf.free - 1):
        put(shelf, tensors(1, seed))
    shelf.put([tensors(1)[i] for i in order], room=2)
    filled = shelf.filled
    shelf.put([tensors(1)[i] for i in order])
    assert shelf.filled == filled == 1


def test_only_small_dense_floats_on_the_cpu_are_packed():
    given = [
        torch.ones(3),
        torch.ones(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(1 << 15),
        torch.ones(0),
        torch.ones(3, device="meta"),
        torch.ones(()),
    ]
    assert small(given) == [0, 6]
    assert len(small([torch.ones(1 << 13)] * 200)) == 128  # a mebi of elements
