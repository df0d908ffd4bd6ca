"""The event file writer.

Records go out by one ``write``: a process that is killed leaves at most one torn record, at the end
of its file, and nothing waits in a buffer. A run that is resumed gets a new file.
"""

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.scalar import metadata as scalars
from tensorboard.plugins.text import metadata as texts

from torchbp.tensorboard import _stock as stock
from torchbp.tensorboard._encode import event, summary_value, summary_values
from torchbp.tensorboard._layout import PLUGIN, VERSION, Layout
from torchbp.tensorboard._proto import (
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    DT_DOUBLE,
    DT_FLOAT,
    DT_STRING,
    Event,
    SessionLog,
    Summary,
    SummaryMetadata,
    TensorProto,
)
from torchbp.tensorboard._record import pack

__all__ = ["BorrowedWriter", "EventWriter"]

_BUCKETS = 30
_FILE_NUMBER = itertools.count()


class EventWriter:
    """One new event file in ``log_dir``.

    Args:
        log_dir: Folder of the run; made where it is missing. Two processes never share one.

    The file begins at the step of its first event. Readers drop what earlier files of the folder
    hold from there on: a run resumed from a checkpoint overwrites what it had gone on to.

    Raises:
        OSError: The folder or the file can't be made.

    Example:
        >>> import tempfile
        >>> from torchbp.tensorboard import EventWriter, Layout, read
        >>> layout = Layout("gradient_norm", "layer", ("0", "2"), unit="loss / weight")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with EventWriter(folder) as writer:
        ...         writer.vector(layout, 0, [0.25, 1.5])
        ...     read(folder).vectors["gradient_norm"].values
        array([[0.25, 1.5 ]], dtype=float32)
    """

    def __init__(self, log_dir: str | Path) -> None:
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().replace("/", "_") or "localhost"
        # TensorBoard reads the files of a run in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{host}.{os.getpid()}.{next(_FILE_NUMBER)}"
        self.path = folder / f"{name}.{PLUGIN}"
        self._file = self.path.open("xb", buffering=0)
        self._begin(started=False)
        self._write(
            [Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()]
        )

    def _begin(self, *, started: bool) -> None:
        self._described: set[str] = set()
        self._started, self._last = started, 0
        self._gathered: dict[tuple[int, float], list[bytes]] | None = None

    @contextlib.contextmanager
    def together(self, moments: Iterable[tuple[int, float]] = ()) -> Iterator[None]:
        """Write what is written inside at its end, in one go and with one event a step.

        Args:
            moments: Steps and their times, in the order in which they are to stand in the file;
                others come behind them.
        """
        self._gathered = {moment: [] for moment in moments}
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            self._put(gathered)

    def vectors(
        self,
        layout: Layout,
        moments: Sequence[tuple[int, float]],
        values: ArrayLike,
        *,
        kind: str = "",
    ) -> None:
        """Write a vector for each of some steps.

        Args:
            layout: What the entries are.
            moments: Steps and their times in seconds since 1970.
            values: ``(len(moments), len(layout.names))``.
            kind: As for :meth:`vector`.
        """
        table = np.ascontiguousarray(values, "<f4")
        expected = len(moments), len(layout.names)
        if table.shape != expected:
            message = (
                f"EventWriter.vectors: expected values of shape {expected} for {layout.quantity}, "
                f"got {table.shape}; give one row a step and one value a name of the layout"
            )
            raise ValueError(message)
        tag = f"{layout.tag}/{kind}" if kind else layout.tag
        self._table(tag, moments, table, lambda: _ours(layout.content()))

    def scalars(
        self,
        tag: str,
        moments: Sequence[tuple[int, float]],
        values: ArrayLike,
        *,
        help: str = "",
    ) -> None:
        """Write one number for each of some steps, as :meth:`scalar` does."""
        table = np.ascontiguousarray(values, "<f4")
        self._table(tag, moments, table, lambda: _number(help))

    def vector(
        self, layout: Layout, step: int, values: ArrayLike, *, kind: str = "", when: float = 0.0
    ) -> None:
        """Write ``values`` of shape ``(len(layout.names),)`` as float32; 0, NaN and inf stay.

        Args:
            layout: What the entries are.
            step: The step.
            values: The vector.
            kind: Empty for the value at this step; ``"max"`` or ``"min"`` for the extreme of an
                interval that ends here. TensorBoard keeps a sample of the steps, which drops
                spikes; the extremes keep them.
            when: Wall time in seconds since 1970; 0 for now.
        """
        array = np.ascontiguousarray(values, "<f4")
        if array.shape != (len(layout.names),):
            message = (
                f"EventWriter.vector: expected values of shape ({len(layout.names)},) for "
                f"{layout.quantity}, got {array.shape}; give one value a name of the layout"
            )
            raise ValueError(message)
        tag = f"{layout.tag}/{kind}" if kind else layout.tag
        self._array(tag, step, array, DT_FLOAT, lambda: _ours(layout.content()), when)

    def record(self, name: str, step: int, value: Any, *, when: float = 0.0) -> None:
        """Write ``value``, which JSON can hold, for readers of ours: ``read(run_dir).records``."""
        text = json.dumps(value).encode()
        tensor = TensorProto(dtype=DT_STRING, string_val=[text])
        content = json.dumps({"version": VERSION, "record": name}).encode()
        self._summary(f"{PLUGIN}/{name}", step, tensor, lambda: _ours(content), when)

    def scalar(
        self, tag: str, step: int, value: float, *, help: str = "", when: float = 0.0
    ) -> None:
        """Write one number for TensorBoard's Scalars; ``help`` is shown beside the chart."""
        self._array(
            tag,
            step,
            np.float32(value),
            DT_FLOAT,
            lambda: _number(help),
            when,
        )

    def histogram(
        self, tag: str, step: int, values: ArrayLike, *, help: str = "", when: float = 0.0
    ) -> None:
        """Write how ``values`` are spread, for Distributions and Histograms; non-finite are left out."""
        array = np.asarray(values, np.float64).ravel()
        counts, edges = np.histogram(array[np.isfinite(array)], _BUCKETS)
        buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)
        self._array(
            tag,
            step,
            buckets,
            DT_DOUBLE,
            lambda: histograms.create_summary_metadata(display_name="", description=help),
            when,
        )

    def text(self, tag: str, step: int, markdown: str, *, when: float = 0.0) -> None:
        """Write ``markdown`` for TensorBoard's Text."""
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode(errors="replace")])
        self._summary(
            tag,
            step,
            tensor,
            lambda: texts.create_summary_metadata(display_name="", description=""),
            when,
        )

    def hyperparameters(self, values: Mapping[str, bool | float | str], step: int = 0) -> None:
        """Write what the run was made with, for TensorBoard's HParams: a row of its table."""
        self._summary(stock.HPARAMS_TAG, step, stock.NOTHING, lambda: stock.session(values), 0.0)

    def charts(self, categories: Mapping[str, Mapping[str, Sequence[str]]], step: int = 0) -> None:
        """Write which scalars TensorBoard's Custom Scalars draws together.

        Args:
            categories: By heading, by title of the chart, regular expressions of the tags in it.
            step: The step.
        """
        tensor = TensorProto(dtype=DT_STRING, string_val=[stock.layout(categories)])
        self._summary(stock.LAYOUT_TAG, step, tensor, stock.layout_metadata, 0.0)

    def close(self) -> None:
        """Close the file. What was written is already on its way to the disk."""
        if not self._file.closed:
            self._end()
            self._file.close()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _array(
        self,
        tag: str,
        step: int,
        array: "np.ndarray[Any, Any] | np.generic",
        dtype: int,
        describe: Callable[[], Any],
        when: float,
    ) -> None:
        content = array.tobytes()
        metadata = b"" if tag in self._described else self._metadata(tag, describe)
        self._add(step, when, summary_value(tag, dtype, array.shape, content, metadata))

    def _table(
        self,
        tag: str,
        moments: Sequence[tuple[int, float]],
        table: "np.ndarray[Any, Any]",
        describe: Callable[[], Any],
    ) -> None:
        if tag not in self._described:
            (step, when), moments = moments[0], moments[1:]
            self._array(tag, step, table[0], DT_FLOAT, describe, when)
            table = table[1:]
        values = summary_values(tag, DT_FLOAT, table) if moments else []
        for (step, when), value in zip(moments, values, strict=True):
            self._add(step, when, value)

    def _summary(
        self, tag: str, step: int, tensor: Any, describe: Callable[[], Any], when: float
    ) -> None:
        members: dict[str, Any] = {"tag": tag, "tensor": tensor}
        if tag not in self._described:
            members["metadata"] = SummaryMetadata.FromString(self._metadata(tag, describe))
        self._add(step, when, Summary(value=[Summary.Value(**members)]).SerializeToString())

    def _metadata(self, tag: str, describe: Callable[[], Any]) -> bytes:
        """Return the metadata of a tag: one without it in its first event of a file is lost."""
        self._described.add(tag)
        metadata = describe()
        metadata.data_class = metadata.data_class or DATA_CLASS_TENSOR
        return metadata.SerializeToString()

    def _add(self, step: int, when: float, value: bytes) -> None:
        when = when or time.time()
        if self._gathered is None:
            self._put({(step, when): [value]})
        else:
            self._gathered.setdefault((step, when), []).append(value)

    def _put(self, gathered: dict[tuple[int, float], list[bytes]]) -> None:
        events = [
            event(when, step, b"".join(values))
            for (step, when), values in gathered.items()
            if values
        ]
        if events and not self._started:
            self._started = True
            first, _ = next(iter(gathered))
            start = SessionLog(status=SessionLog.START)
            begin = Event(wall_time=time.time(), step=first, session_log=start)
            events.insert(0, begin.SerializeToString())
        if events:
            self._last, _ = next(reversed(gathered))
            self._write(events)

    def _end(self) -> None:
        """Tell readers that the run has ended: one that was killed never says so."""
        if self._started:
            stop = SessionLog(status=SessionLog.STOP)
            end = Event(wall_time=time.time(), step=self._last, session_log=stop)
            with contextlib.suppress(OSError):  # a full disk
                self._write([end.SerializeToString()])

    def _write(self, events: Sequence[bytes]) -> None:
        self._file.write(pack(*events))


class BorrowedWriter(EventWriter):
    """Writes into the file of a ``torch.utils.tensorboard.SummaryWriter`` (or a tensorboardX one).

    Args:
        writer: The user's writer; stays open when this one is closed.
    """

    def __init__(self, writer: Any) -> None:
        self._file_writer = writer._get_file_writer()  # noqa: SLF001  # no public way to an event
        self._begin(started=True)

    def close(self) -> None:
        """Flush the user's writer."""
        self._end()
        self._file_writer.flush()

    def _write(self, events: Sequence[bytes]) -> None:
        for made in map(Event.FromString, events):
            self._file_writer.add_event(made, made.step, made.wall_time)


def _number(help: str) -> Any:
    metadata = scalars.create_summary_metadata(display_name="", description=help)
    metadata.data_class = DATA_CLASS_SCALAR  # or Scalars does not show it
    return metadata


def _ours(content: bytes) -> Any:
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=content)
    return SummaryMetadata(plugin_data=plugin)
