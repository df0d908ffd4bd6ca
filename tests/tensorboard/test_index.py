"""The index follows event files: new bytes only, whatever stands beside them."""

import os
from contextlib import ExitStack

import numpy as np
import pytest

from torchbp.tensorboard import EventWriter, Layout
from torchbp.tensorboard import _index as module
from torchbp.tensorboard._index import Index
from torchbp.tensorboard._record import pack
from torchbp.tensorboard._vector import vectors

LAYOUT = Layout("error_signal", "layer", ("a", "b", "c"))


@pytest.fixture
def open_writer(tmp_path):
    """Writers that stay open, as a process at work has them."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(EventWriter(tmp_path))


def steps(index):
    index.refresh()
    found = vectors(index)
    return found["error_signal"].steps.tolist() if found else []


def write(writer, *at):
    for step in at:
        writer.vector(LAYOUT, step, [step, step + 0.5, -step])


def test_a_growing_file_is_read_from_where_it_ended(tmp_path, monkeypatch, open_writer):
    read = []
    unpack = module.unpack
    monkeypatch.setattr(module, "unpack", lambda file, at: read.append(at) or unpack(file, at))
    index, writer = Index(tmp_path), open_writer()
    write(writer, 0, 1)
    assert steps(index) == [0, 1]
    size, version = writer.path.stat().st_size, index.version
    assert steps(index) == [0, 1]
    assert index.version == version
    write(writer, 2)
    assert steps(index) == [0, 1, 2]
    assert index.version != version
    assert read == [0, size], "twice there was something new, and the rest was not read again"
    values = vectors(index)["error_signal"].read()
    np.testing.assert_array_equal(values, [[s, s + 0.5, -s] for s in range(3)])


def test_a_torn_record_is_read_once_it_is_whole(tmp_path, open_writer):
    writer = open_writer()
    write(writer, 0, 1)
    data = writer.path.read_bytes()
    for cut in (1, 10, 40):
        writer.path.write_bytes(data[:-cut])
        index = Index(tmp_path)
        assert steps(index) == [0]
        writer.path.write_bytes(data)  # in place: the same inode
        assert steps(index) == [0, 1]


def test_a_folder_that_was_emptied_begins_anew(tmp_path):
    index = Index(tmp_path)
    with EventWriter(tmp_path) as first:
        write(first, 0, 1, 2)
    assert steps(index) == [0, 1, 2]
    first.path.unlink()
    with EventWriter(tmp_path) as second:
        write(second, 0)
    assert steps(index) == [0]
    second.path.write_bytes(second.path.read_bytes()[:100])  # and a file that was cut
    assert steps(index) == []


def test_a_resumed_run_drops_what_it_had_gone_on_to(tmp_path, open_writer):
    index, first = Index(tmp_path), open_writer()
    write(first, 0, 1, 2, 3)
    assert steps(index) == [0, 1, 2, 3]
    second = open_writer()
    write(second, 2)
    assert steps(index) == [0, 1, 2]
    write(first, 4)  # the killed one was not dead yet
    assert steps(index) == [0, 1, 2]
    assert steps(Index(tmp_path)) == [0, 1, 2]


def test_state(tmp_path, open_writer):
    index, writer = Index(tmp_path), open_writer()
    write(writer, 0)
    index.refresh()
    assert index.state == "running"
    os.utime(writer.path, (0, 0))
    index = Index(tmp_path)
    index.refresh()
    assert index.state == "broken off"
    writer.close()
    index.refresh()
    assert index.state == "finished"
    later = open_writer()
    write(later, 5)
    index.refresh()
    assert index.state == "running"


def test_foreign_files_are_not_parsed(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    from torchbp.tensorboard import BorrowedWriter

    theirs = SummaryWriter(str(tmp_path))
    theirs.add_scalar("mine", 1.0, 0)
    theirs.flush()
    index = Index(tmp_path)
    index.refresh()
    assert not index.tags
    ours = BorrowedWriter(theirs)
    write(ours, 0)
    ours.close()
    assert steps(index) == [0]
    assert index.tags["mine"].steps.tolist() == [0], "from its beginning"
    theirs.add_scalar("mine", 2.0, 1)
    theirs.close()
    index.refresh()
    assert len(index.tags["mine"].steps) == 2
    assert index.state == "finished", "ours had closed"


def test_a_large_foreign_file_is_searched_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SEARCHED_AT_ONCE", 1 << 20)
    with EventWriter(tmp_path) as writer:
        for _ in range(3):
            writer.text("mine", 0, "x" * (1 << 20))
        write(writer, 7)
    writer.path.rename(tmp_path / "events.out.tfevents.1.x")
    index = Index(tmp_path)
    assert [steps(index) for _ in range(5)] == [[], [], [], [7], [7]]


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 500, b"rubbish" * 100, b"torchbp" * 100, pack(b"\xff\xff\xfftorchbp"), pack(b"")],
    ids=["empty", "zeros", "rubbish", "our name", "no event", "empty event"],
)
def test_garbage_beside_a_run(tmp_path, content):
    (tmp_path / "events.out.tfevents.0.broken").write_bytes(content)
    (tmp_path / "events.out.tfevents.1.folder").mkdir()
    (tmp_path / "events.out.tfevents.2.dangling").symlink_to(tmp_path / "nowhere")
    with EventWriter(tmp_path) as writer:
        write(writer, 0, 1)
    assert steps(Index(tmp_path)) == [0, 1]


def test_what_can_not_be_read_is_noted(tmp_path):
    bad = tmp_path / "events.out.tfevents.0.torchbp"
    bad.write_bytes(pack(b"\xff\xff\xff") + pack(b""))
    index = Index(tmp_path)
    index.refresh()
    assert index.notes == ["events.out.tfevents.0.torchbp is no event file from byte 0 on"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"quantity": 1}',
        b'{"quantity": "q", "axis": "layer", "unit": ""}',
    ],
)
def test_metadata_that_is_not_as_we_write_it(tmp_path, monkeypatch, content):
    monkeypatch.setattr(Layout, "content", lambda self: content)
    with EventWriter(tmp_path) as writer:
        write(writer, 0)
    index = Index(tmp_path)
    assert steps(index) == []
    assert not index.notes


def test_names_that_occur_twice_keep_their_columns(tmp_path):
    twice, later = Layout("q", "layer", ("a", "a", "b")), Layout("q", "layer", ("b", "a", "a"))
    with EventWriter(tmp_path) as writer:
        writer.vector(twice, 0, [1, 2, 3])
        writer.vector(later, 1, [3, 1, 2])
    index = Index(tmp_path)
    index.refresh()
    np.testing.assert_array_equal(vectors(index)["q"].read(), [[1, 2, 3], [1, 2, 3]])


def test_several_vectors_of_one_event(tmp_path):
    layouts = [Layout(name, "layer", ("a", "b")) for name in "pqrst"]
    rows = [[1, 2], [3, 4], [1, 2], [0, 0], [1, 2]]  # the first are the last's bytes, too
    with EventWriter(tmp_path) as writer:
        for step in range(3):
            with writer.together():
                for layout, row in zip(layouts, rows, strict=True):
                    writer.vector(layout, step, row)
    index = Index(tmp_path)
    index.refresh()
    for layout, row in zip(layouts, rows, strict=True):
        values = vectors(index)[layout.quantity].read()
        np.testing.assert_array_equal(values, [row] * 3)
