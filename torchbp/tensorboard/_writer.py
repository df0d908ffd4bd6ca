"""The event file writer.

Every record is one ``write``: a process that is killed leaves at most one torn record, at the end
of its file, and nothing waits in a buffer. A run that is resumed gets a new file.
"""

import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.scalar import metadata as scalars
from tensorboard.plugins.text import metadata as texts

from torchbp.tensorboard._proto import (
    DATA_CLASS_TENSOR,
    DT_DOUBLE,
    DT_FLOAT,
    DT_STRING,
    Event,
    SessionLog,
    Summary,
    SummaryMetadata,
    TensorProto,
    TensorShapeProto,
)
from torchbp.tensorboard._record import pack

__all__ = ["PLUGIN", "BorrowedWriter", "EventWriter", "Layout"]

PLUGIN = "torchbp"
_BUCKETS = 30
_FILE_NUMBER = itertools.count()


@dataclass(frozen=True)
class Layout:
    """What the entries of a vector are: one name an entry, and what all of them share.

    Attributes:
        quantity: What is measured, e.g. ``"gradient_norm"``.
        axis: What an entry stands for, e.g. ``"layer"`` or ``"parameter"``.
        names: One an entry, in the order of the entries.
        kinds: One an entry, e.g. the class of the layer; or empty.
        unit: The unit of the values.
    """

    quantity: str
    axis: str
    names: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    unit: str = ""
    tag: str = field(init=False)

    def __post_init__(self) -> None:
        # A tag keeps the first metadata it ever had, so other entries need another tag.
        entries = "\0".join((*self.names, "", *self.kinds)).encode()
        digest = hashlib.sha256(entries).hexdigest()[:8]
        object.__setattr__(self, "tag", f"{self.quantity}/{self.axis}-{digest}")

    def content(self) -> bytes:
        """Return the plugin data of the tag: JSON with version, quantity, axis, names, ..."""
        members = {"version": 1, "quantity": self.quantity, "axis": self.axis, "unit": self.unit}
        return json.dumps(members | {"names": self.names, "kinds": self.kinds}).encode()


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
        self.path = folder / f"{name}.torchbp"
        self._file = self.path.open("xb", buffering=0)
        self._described: set[str] = set()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._started = False

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
        plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=layout.content())
        self._summary(
            tag, step, _tensor(array, DT_FLOAT), SummaryMetadata(plugin_data=plugin), when
        )

    def scalar(
        self, tag: str, step: int, value: float, *, help: str = "", when: float = 0.0
    ) -> None:
        """Write one number for TensorBoard's Scalars; ``help`` is shown beside the chart."""
        metadata = scalars.create_summary_metadata(display_name="", description=help)
        self._summary(tag, step, _tensor(np.float32(value), DT_FLOAT), metadata, when)

    def histogram(
        self, tag: str, step: int, values: ArrayLike, *, help: str = "", when: float = 0.0
    ) -> None:
        """Write how ``values`` are spread, for Distributions and Histograms; non-finite are left out."""
        array = np.asarray(values, np.float64).ravel()
        counts, edges = np.histogram(array[np.isfinite(array)], _BUCKETS)
        buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)
        metadata = histograms.create_summary_metadata(display_name="", description=help)
        self._summary(tag, step, _tensor(buckets, DT_DOUBLE), metadata, when)

    def text(self, tag: str, step: int, markdown: str, *, when: float = 0.0) -> None:
        """Write ``markdown`` for TensorBoard's Text."""
        metadata = texts.create_summary_metadata(display_name="", description="")
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
        self._summary(tag, step, tensor, metadata, when)

    def close(self) -> None:
        """Close the file. What was written is already on its way to the disk."""
        self._file.close()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _summary(self, tag: str, step: int, tensor: Any, metadata: Any, when: float) -> None:
        members: Mapping[str, Any] = {"tag": tag, "tensor": tensor}
        if tag not in self._described:  # a tag without it in its first event of a file is lost
            metadata.data_class = metadata.data_class or DATA_CLASS_TENSOR
            members = {**members, "metadata": metadata}
            self._described.add(tag)
        summary = Summary(value=[Summary.Value(**members)])
        if not self._started:
            self._started = True
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=step, session_log=start))
        self._write(Event(wall_time=when or time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        self._file.write(pack(event.SerializeToString()))


class BorrowedWriter(EventWriter):
    """Writes into the file of a ``torch.utils.tensorboard.SummaryWriter`` (or a tensorboardX one).

    Args:
        writer: The user's writer; stays open when this one is closed.
    """

    def __init__(self, writer: Any) -> None:
        self._file_writer = writer._get_file_writer()  # noqa: SLF001  # no public way to an event
        self._described = set()
        self._started = True

    def close(self) -> None:
        """Flush the user's writer."""
        self._file_writer.flush()

    def _write(self, event: Any) -> None:
        self._file_writer.add_event(event, event.step, event.wall_time)


def _tensor(array: "np.ndarray[Any, Any] | np.generic", dtype: int) -> Any:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in array.shape])
    return TensorProto(dtype=dtype, tensor_shape=shape, tensor_content=array.tobytes())
