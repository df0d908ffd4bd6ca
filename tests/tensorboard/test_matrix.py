"""What a view is told equals what was written: exactly, or the extremes of what shares a column."""

import json
import struct

import numpy as np
import pytest

from torchbp.tensorboard import EventWriter, Layout, is_absent, with_absent
from torchbp.tensorboard import _matrix as module
from torchbp.tensorboard._index import Index
from torchbp.tensorboard._matrix import matrix, profile
from torchbp.tensorboard._vector import scalars, vectors

N, S = 7, 103
NAMES = tuple("abcdefg")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """103 samples of 7 entries at uneven steps: with 0, inf, a measured NaN, and absent ones."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=(S, N)) * 5).astype(np.float32)
    values[3, 1], values[50, 2], values[70, 3] = 0, np.inf, np.nan
    present = rng.random((S, N)) < 0.8
    present[3, 1] = present[50, 2] = present[70, 3] = True
    present[:, 6] = False
    values = with_absent(values, present)
    steps = np.cumsum(rng.integers(1, 9, S))
    folder = tmp_path_factory.mktemp("run")
    with EventWriter(folder) as writer:
        for step, row in zip(steps, values, strict=True):
            writer.vector(Layout("q", "layer", NAMES), step, row)
            writer.scalar("loss/train", step, step / 2)
    index = Index(folder)
    index.refresh()
    return index, steps, values


def same_bits(a, b):
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)
    )


def test_where_there_is_room_it_is_exact(written):
    index, steps, values = written
    part = matrix(vectors(index)["q"], columns=S)
    assert part.planes == ("value",)
    np.testing.assert_array_equal(part.steps, steps)
    same_bits(part.values[0], values)


def test_a_range_and_entries(written):
    index, steps, values = written
    part = matrix(vectors(index)["q"], first=steps[10], last=steps[20] + 0.5, entries=[5, 0, 5])
    np.testing.assert_array_equal(part.steps, steps[10:21])
    same_bits(part.values[0], values[10:21][:, [5, 0, 5]])
    nothing = matrix(vectors(index)["q"], first=1e9)
    assert nothing.values.shape == (1, 0, N)
    assert matrix(vectors(index)["q"], first=20, last=10).values.shape == (1, 0, N)


@pytest.mark.parametrize("columns", [1, 2, 10, 102])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_buckets(written, columns, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
    index, steps, values = written
    part = matrix(vectors(index)["q"], columns=columns)
    assert part.planes == ("max", "min", "last")
    assert part.values.shape == (3, columns, N)
    edges = np.searchsorted(steps, part.steps), np.searchsorted(steps, part.ends)
    assert edges[0][0] == 0
    assert edges[1][-1] == S - 1
    np.testing.assert_array_equal(edges[0][1:], edges[1][:-1] + 1)
    for c, (first, last) in enumerate(zip(*edges, strict=True)):
        for n in range(N):
            bucket = values[first : last + 1, n]
            there = bucket[~is_absent(bucket)]
            for plane, reduce in ((0, np.max), (1, np.min)):
                got = part.values[plane, c, n : n + 1]
                if not len(there):
                    assert is_absent(got).all()
                else:  # NaN that was measured wins
                    np.testing.assert_array_equal(got[0], reduce(there))
                    assert not is_absent(got).any()
            same_bits(part.values[2, c, n], bucket[-1])


def test_planes_are_chosen(written):
    index, _, _ = written
    q = vectors(index)["q"]
    whole = matrix(q, columns=9)
    part = matrix(q, columns=9, planes=("last", "max"))
    assert part.planes == ("last", "max")
    same_bits(part.values, whole.values[[2, 0]])


def test_profile_is_the_nearest_sample(written):
    index, steps, values = written
    for step in (-5, steps[40] - 0.4, steps[40], 1e9):
        part = profile(vectors(index)["q"], step)
        nearest = np.argmin(np.abs(steps - step))
        assert part.steps == steps[nearest]
        same_bits(part.values[0, 0], values[nearest])


def test_of_two_samples_at_a_step_the_later_counts(tmp_path):
    with EventWriter(tmp_path) as writer:
        for step, value in ((0, 1), (3, 2), (3, 5), (6, 9)):
            writer.vector(Layout("q", "layer", ("a",)), step, [value])
    index = Index(tmp_path)
    index.refresh()
    assert profile(vectors(index)["q"], 3).values.item() == 5


def test_a_scalar_has_the_same_face(written):
    index, steps, _ = written
    loss = scalars(index)["loss/train"]
    np.testing.assert_array_equal(matrix(loss, columns=S).values[0, :, 0], steps / 2)
    assert matrix(loss, columns=5).values.shape == (3, 5, 1)
    assert profile(loss, steps[7]).values.item() == steps[7] / 2


def test_encoded(written):
    index, _, values = written
    data = matrix(vectors(index)["q"], columns=S).encoded(run="r", quantity="q", version="1")
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    assert (header["run"], header["exact"], header["points"]) == ("r", True, S)
    assert length % 4 == 0
    got = np.frombuffer(data, "<f4", offset=4 + length).reshape(1, S, N)
    same_bits(got[0], values)


def test_layouts_side_by_side_leave_the_others_absent(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.vector(Layout("q", "layer", ("a", "b")), 0, [1, np.nan])
        writer.vector(Layout("q", "layer", ("b", "c")), 1, [2, 3])
    index = Index(tmp_path)
    index.refresh()
    values = matrix(vectors(index)["q"]).values[0]
    np.testing.assert_array_equal(values, [[1, np.nan, np.nan], [np.nan, 2, 3]])
    np.testing.assert_array_equal(is_absent(values), [[False, False, True], [True, False, False]])
    picked = matrix(vectors(index)["q"], entries=[2, 1]).values[0]
    np.testing.assert_array_equal(picked, [[np.nan, np.nan], [3, 2]])
