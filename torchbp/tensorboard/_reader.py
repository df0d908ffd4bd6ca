"""The event file reader: a run's folder back as numpy arrays."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from torchbp.tensorboard._proto import DT_DOUBLE, DT_FLOAT, Event, SessionLog
from torchbp.tensorboard._record import unpack
from torchbp.tensorboard._writer import PLUGIN

__all__ = ["Run", "Series", "read"]


@dataclass(frozen=True)
class Series:
    """One quantity over time.

    Attributes:
        steps: int64 ``(S,)``, ascending.
        times: float64 ``(S,)``, wall time in seconds since 1970.
        values: float32 ``(S, N)`` for a vector, NaN where an entry had not been there yet;
            ``(S,)`` for a scalar.
        names: One an entry; empty for a scalar.
        kinds: One an entry, e.g. the layer's class; may be empty.
        axis: What an entry stands for, e.g. ``"layer"``.
        unit: The unit of the values.
    """

    steps: NDArray[np.int64]
    times: NDArray[np.float64]
    values: NDArray[np.float32]
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    axis: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Run:
    """All that a run's event files hold.

    Attributes:
        vectors: By quantity; ``"<quantity>/max"`` and ``"<quantity>/min"`` are the extremes of
            intervals.
        scalars: By tag, whoever wrote them.
        texts: By tag, ``(step, markdown)`` in order.
    """

    vectors: dict[str, Series] = field(default_factory=dict)
    scalars: dict[str, Series] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


@dataclass
class _Tag:
    """The points of one tag, as they come."""

    plugin: str
    content: dict[str, Any]
    points: list[tuple[int, float, bytes | float]] = field(default_factory=list)


def read(run_dir: str | Path) -> Run:
    """Return what the event files in ``run_dir`` hold, as numpy arrays.

    A tail that is torn, of a run that was killed or still goes on, is left out. Where a run was
    resumed, what it had logged beyond the point it was resumed from is dropped, as in TensorBoard.

    Args:
        run_dir: The folder of one run, not of several.

    Returns:
        The run; empty where its files hold nothing yet.

    Raises:
        FileNotFoundError: There is no event file in ``run_dir``.

    Example:
        >>> import tempfile
        >>> from torchbp.tensorboard import EventWriter, read
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with EventWriter(folder) as writer:
        ...         writer.scalar("loss/train", 7, 0.5)
        ...     read(folder).scalars["loss/train"].steps
        array([7])
    """
    files = sorted(Path(run_dir).glob("*.tfevents.*"))
    if not files:
        message = (
            f"read: expected a folder with event files, got {str(run_dir)!r} without any; "
            "give the log_dir of one run"
        )
        raise FileNotFoundError(message)
    tags: dict[str, _Tag] = {}
    for file in files:
        for event in _events(file):
            _take(event, tags)
    run = Run()
    vectors: dict[str, list[_Tag]] = {}
    for name, tag in tags.items():
        if tag.plugin == PLUGIN:
            kind = name.rpartition("/")[2]
            key = tag.content["quantity"] + (f"/{kind}" if kind in {"max", "min"} else "")
            vectors.setdefault(key, []).append(tag)
        elif tag.plugin == "scalars":
            run.scalars[name] = _scalars(tag)
        elif tag.plugin == "text":
            run.texts[name] = [(s, str(v)) for s, _, v in tag.points]
    run.vectors.update({key: _vectors(layouts) for key, layouts in vectors.items()})
    return run


def _events(file: Path) -> Iterator[Any]:
    payloads = unpack(file.read_bytes())
    try:
        yield from map(Event.FromString, payloads)
    except DecodeError:
        return


def _take(event: Any, tags: dict[str, _Tag]) -> None:
    if event.HasField("session_log") and event.session_log.status == SessionLog.START:
        for tag in tags.values():
            tag.points = [point for point in tag.points if point[0] < event.step]
    for value in event.summary.value:
        tag = tags.get(value.tag)
        if tag is None:
            tag = tags[value.tag] = _described(value)
        point = _point(tag, value)
        if point is not None:
            tag.points.append((event.step, event.wall_time, point))


def _described(value: Any) -> _Tag:
    plugin = value.metadata.plugin_data
    if value.HasField("simple_value"):  # torch's writer
        return _Tag("scalars", {})
    return _Tag(
        plugin.plugin_name, json.loads(plugin.content) if plugin.plugin_name == PLUGIN else {}
    )


def _point(tag: _Tag, value: Any) -> Any:
    tensor = value.tensor
    if value.HasField("simple_value"):
        return value.simple_value
    if tag.plugin == "text":
        return b"\n".join(tensor.string_val).decode(errors="replace")
    if tag.plugin not in {PLUGIN, "scalars"} or tensor.dtype not in {DT_FLOAT, DT_DOUBLE}:
        return None
    if tensor.dtype == DT_DOUBLE:
        doubles = np.frombuffer(tensor.tensor_content, "<f8")
        return (doubles if doubles.size else np.array(tensor.double_val)).astype("<f4").tobytes()
    return tensor.tensor_content or np.array(tensor.float_val, "<f4").tobytes()


def _scalars(tag: _Tag) -> Series:
    points = sorted(tag.points, key=lambda point: point[0])
    values = [float(np.frombuffer(v, "<f4")[0]) if isinstance(v, bytes) else v for *_, v in points]
    steps, times = _axis(points)
    return Series(steps, times, np.array(values, np.float32))


def _vectors(layouts: list[_Tag]) -> Series:
    """Lay the points of all layouts of one quantity side by side, columns by name."""
    names = tuple(dict.fromkeys(name for tag in layouts for name in tag.content["names"]))
    kinds: dict[str, str] = {}
    points: list[tuple[int, float, int, bytes]] = []
    columns: list[Any] = []
    for index, tag in enumerate(layouts):
        kinds.update(zip(tag.content["names"], tag.content["kinds"], strict=False))
        columns.append([names.index(name) for name in tag.content["names"]])
        points += [(s, t, index, v) for s, t, v in tag.points if isinstance(v, bytes)]
    points.sort(key=lambda point: point[0])
    if len(layouts) == 1:
        joined = b"".join(point[3] for point in points)
        values = np.frombuffer(joined, "<f4").reshape(len(points), len(names))
    else:
        values = np.full((len(points), len(names)), np.nan, np.float32)
        for row, (_, _, index, raw) in enumerate(points):
            values[row, columns[index]] = np.frombuffer(raw, "<f4")
    steps, times = _axis(points)
    newest = layouts[-1].content
    classes = tuple(kinds.get(name, "") for name in names) if kinds else ()
    return Series(steps, times, values, names, classes, newest["axis"], newest["unit"])


def _axis(points: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    steps = np.array([point[0] for point in points], np.int64)
    return steps, np.array([point[1] for point in points], np.float64)
