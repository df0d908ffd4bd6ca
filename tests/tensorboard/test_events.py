"""Event files: what is written is read back, by us and by TensorBoard."""

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchbp.tensorboard import BorrowedWriter, EventWriter, Layout, read
from torchbp.tensorboard._record import _crc32c, crc32c, pack, unpack

LAYOUT = Layout("gradient_norm", "layer", ("a", "b", "c"), ("Linear", "ReLU", "Linear"), "1")


def test_crc32c_of_the_check_string():
    # The check value of CRC-32C in the RevEng catalogue.
    assert crc32c(b"123456789") == _crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 512, 8300])
def test_crc32c_equals_the_bytewise_one(size):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as bytewise

    data = np.random.default_rng(size).bytes(size)
    assert _crc32c(data) == bytewise(data)


def test_vectors_come_back_with_zero_nan_and_inf(tmp_path):
    rows = np.array([[1, 0, np.nan], [np.inf, 2, -3]], np.float32)
    with EventWriter(tmp_path) as writer:
        for step, row in enumerate(rows):
            writer.vector(LAYOUT, step, row)
        writer.vector(LAYOUT, 1, rows[0], kind="max")
    run = read(tmp_path)
    series = run.vectors["gradient_norm"]
    np.testing.assert_array_equal(series.values, rows)
    np.testing.assert_array_equal(series.steps, [0, 1])
    assert (series.names, series.kinds) == (LAYOUT.names, LAYOUT.kinds)
    assert (series.axis, series.unit) == ("layer", "1")
    np.testing.assert_array_equal(run.vectors["gradient_norm/max"].values, rows[:1])


def test_a_wrong_length_is_refused(tmp_path):
    with EventWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"shape \(3,\)"):
        writer.vector(LAYOUT, 0, [1.0])


def test_layouts_of_one_quantity_are_joined_by_name(tmp_path):
    later = Layout("gradient_norm", "layer", ("b", "d"))
    with EventWriter(tmp_path) as writer:
        writer.vector(LAYOUT, 0, [1, 2, 3])
        writer.vector(later, 1, [4, 5])
    series = read(tmp_path).vectors["gradient_norm"]
    assert series.names == ("a", "b", "c", "d")
    nan = np.nan
    np.testing.assert_array_equal(series.values, [[1, 2, 3, nan], [nan, 4, nan, 5]])


def test_tensorboard_reads_the_stock_events(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.scalar("loss/train", 3, 0.5, help="the loss")
        writer.histogram("layers/x", 3, [1.0, 2.0, np.nan, np.inf])
        writer.text("verdicts", 3, "**all** is well")
        writer.vector(LAYOUT, 3, [1, 2, 3])
    seen = EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = seen.Tensors("loss/train")
    assert (scalar.step, scalar.tensor_proto.tensor_content) == (3, np.float32(0.5).tobytes())
    assert seen.SummaryMetadata("loss/train").plugin_data.plugin_name == "scalars"
    assert seen.SummaryMetadata("loss/train").summary_description == "the loss"
    (histogram,) = seen.Tensors("layers/x")
    buckets = np.frombuffer(histogram.tensor_proto.tensor_content).reshape(-1, 3)
    assert buckets[:, 2].sum() == 2
    assert (buckets[0, 0], buckets[-1, 1]) == (1.0, 2.0)
    assert seen.SummaryMetadata("layers/x").plugin_data.plugin_name == "histograms"
    assert seen.SummaryMetadata("verdicts").plugin_data.plugin_name == "text"
    assert seen.SummaryMetadata(LAYOUT.tag).plugin_data.plugin_name == "torchbp"
    run = read(tmp_path)
    assert run.texts["verdicts"] == [(3, "**all** is well")]
    assert run.scalars["loss/train"].values == [np.float32(0.5)]


@pytest.mark.parametrize("cut", [1, 4, 15, 40])
def test_a_torn_tail_costs_the_last_event_only(tmp_path, cut):
    writer = EventWriter(tmp_path)
    for step in range(5):
        writer.vector(LAYOUT, step, [1, 2, 3])
    writer._file.close()  # as a killed process leaves it
    data = writer.path.read_bytes()
    writer.path.write_bytes(data[:-cut])
    np.testing.assert_array_equal(read(tmp_path).vectors["gradient_norm"].steps, range(4))


def test_a_tail_of_zeros_or_rubbish_is_left_out(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.vector(LAYOUT, 0, [1, 2, 3])
    data = writer.path.read_bytes()
    for tail in (bytes(100), b"\x07" * 100, pack(b"\xff\xff\xff")):
        writer.path.write_bytes(data + tail)
        assert read(tmp_path).vectors["gradient_norm"].steps.tolist() == [0]


def test_a_spoiled_last_record_is_left_out():
    good = pack(b"one")
    for tail in (b"", bytes(3), bytes(100)):  # zeros where the rest of it and more was to be
        assert list(unpack(BytesIO(good + good[:-5] + bytes(5) + tail))) == [(12, b"one")]


def test_a_resumed_run_overwrites_what_it_had_gone_on_to(tmp_path):
    for first, value in ((0, 1), (3, 2)):
        with EventWriter(tmp_path) as writer:
            for step in range(first, 5):
                writer.vector(LAYOUT, step, [value] * 3)
    series = read(tmp_path).vectors["gradient_norm"]
    assert series.steps.tolist() == [0, 1, 2, 3, 4]
    assert series.values[:, 0].tolist() == [1, 1, 1, 2, 2]


def test_every_event_is_on_disk_at_once(tmp_path):
    writer = EventWriter(tmp_path)
    writer.vector(LAYOUT, 0, [1, 2, 3])
    assert len(read(tmp_path).vectors["gradient_norm"].steps) == 1
    writer.close()


def test_no_event_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with event files"):
        read(tmp_path)


def test_a_summary_writer_can_be_borrowed(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as theirs:
        theirs.add_scalar("mine", 1.5, 0)
        ours = BorrowedWriter(theirs)
        ours.vector(LAYOUT, 7, [1, 2, 3])
        ours.close()
        theirs.add_scalar("mine", 2.5, 1)
    run = read(tmp_path)
    assert run.scalars["mine"].values.tolist() == [1.5, 2.5]
    assert run.vectors["gradient_norm"].steps.tolist() == [7]


def test_torch_is_never_imported():
    code = "import sys, torchbp.tensorboard; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
