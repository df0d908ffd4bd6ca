"""Where in a run's event files everything stands. The values stay in the files.

The index follows a run that grows: a refresh reads new bytes only. Of a vector it keeps step, time, file
and offset, some 30 bytes, so that a run with thousands of layers costs megabytes, and what a view
asks for is read from the file exactly as it was written.
"""

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from torchbp.tensorboard._layout import PLUGIN, parsed
from torchbp.tensorboard._proto import DT_DOUBLE, DT_FLOAT, Event, SessionLog
from torchbp.tensorboard._record import FRAME, unpack

__all__ = ["SUFFIX", "Index", "Tag"]

_SILENT_AFTER = 300.0
_SEARCHED_AT_ONCE = 1 << 28
SUFFIX = f".{PLUGIN}"


@dataclass
class Tag:
    """The points of one tag, as they came.

    Attributes:
        plugin: Whose it is: ours, ``"scalars"``, ``"text"``; any other is not kept.
        content: The plugin data of a tag of ours; the ``title`` of a scalar.
        steps: Of each point.
        times: Wall times, in seconds since 1970.
        files: The number of the file it stands in.
        values: Vectors: the position of the first byte; scalars: the value; else the text.
    """

    plugin: str
    content: dict[str, Any]
    values: "array[int] | array[float] | list[str]"
    steps: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[float]" = field(default_factory=lambda: array("d"))
    files: "array[int]" = field(default_factory=lambda: array("l"))

    def append(self, step: int, when: float, file: int, value: Any) -> None:
        """Add a point."""
        self.values.append(value)
        self.steps.append(step)
        self.times.append(when)
        self.files.append(file)

    def drop(self, step: int, file: int) -> None:
        """Drop the points from ``step`` on, of this file and those before it."""
        keep = [i for i, s in enumerate(self.steps) if s < step or self.files[i] > file]
        if len(keep) < len(self.steps):
            self.values = _chosen(self.values, keep)
            self.steps = _chosen(self.steps, keep)
            self.times = _chosen(self.times, keep)
            self.files = _chosen(self.files, keep)


@dataclass
class _File:
    """One event file: how far it has been read."""

    path: Path
    identity: tuple[int, int]
    at: int = 0
    searched: int = 0  # how far it has been searched for a sign of ours
    ours: bool = False
    ended: bool = False  # closed, not killed
    broken: bool = False


class Index:
    """What the event files of one folder hold.

    Args:
        folder: The folder of one run.
        foreign: Also read files in which nothing is ours.

    Attributes:
        tags: By name.
        starts: ``(file, step)`` of each session: where a run began, and where it was resumed.
        notes: What could not be read, and why.
    """

    def __init__(self, folder: Path, *, foreign: bool = False) -> None:
        self.folder = folder
        self.tags: dict[str, Tag] = {}
        self.starts: list[tuple[int, int]] = []
        self.notes: list[str] = []
        self._foreign = foreign
        self._files: dict[str, _File] = {}
        self._resets = 0
        self.updated = 0.0

    @property
    def files(self) -> list[Path]:
        """The files, by number."""
        return [file.path for file in self._files.values()]

    @property
    def version(self) -> str:
        """Changes whenever the index does."""
        return f"{self._resets}.{sum(file.at for file in self._files.values())}"

    @property
    def state(self) -> str:
        """``"finished"``, ``"running"`` or ``"broken off"``."""
        read = [file for file in self._files.values() if file.at]
        if read and read[-1].ended:
            return "finished"
        return "running" if time.time() - self.updated < _SILENT_AFTER else "broken off"

    @property
    def ours(self) -> bool:
        """Whether anything here was written by this package."""
        return any(tag.plugin == PLUGIN for tag in self.tags.values())

    def refresh(self) -> None:
        """Read what has been added."""
        self.notes = []
        found = self._found()
        known = list(self._files)
        if list(found)[: len(known)] != known or any(
            f.identity != found[name].identity or found[name].at < f.at
            for name, f in self._files.items()
        ):  # a file is gone, was replaced, or belongs before those that were read
            self._files, self.tags, self.starts = {}, {}, []
            self._resets += 1
        for number, (name, new) in enumerate(found.items()):
            size, new.at = new.at, 0
            file = self._files.setdefault(name, new)
            if size > file.at + FRAME and not file.broken:
                try:
                    self._read(number, file)
                except OSError as error:
                    self.notes.append(f"{name} can't be read: {error.strerror or error}")

    def _found(self) -> dict[str, _File]:
        """The files there are, by name; ``at`` is the size of each."""
        found = {}
        for path in sorted(self.folder.iterdir()):
            if "tfevents" in path.name and path.is_file():
                status = path.stat()
                self.updated = max(self.updated, status.st_mtime)
                identity = status.st_dev, status.st_ino
                found[path.name] = _File(path, identity, status.st_size)
        return found

    def _read(self, number: int, file: _File) -> None:
        if not (self._foreign or file.ours or _is_ours(file)):
            return
        try:
            for place, payload in _from(file):
                self._take(number, file, Event.FromString(payload), payload, place)
                file.at = place + len(payload) + 4
        except DecodeError:
            file.broken = True
            self.notes.append(f"{file.path.name} is no event file from byte {file.at} on")

    def _take(self, number: int, file: _File, event: Any, payload: bytes, place: int) -> None:
        if event.HasField("session_log"):
            file.ended = event.session_log.status == SessionLog.STOP
            if event.session_log.status == SessionLog.START:
                self.starts.append((number, event.step))
                for tag in self.tags.values():
                    tag.drop(event.step, number)
        if any(later > number and step <= event.step for later, step in self.starts):
            return  # resumed from before this step, and an older file still grows
        at = 0
        for value in event.summary.value:
            tag = self.tags.get(value.tag)
            if tag is None:
                tag = self.tags[value.tag] = _described(value)
            file.ended = file.ended and tag.plugin != PLUGIN
            point = _point(tag, value)
            if isinstance(point, bytes):
                # The same bytes elsewhere in the payload are as good.
                if payload.endswith(point):  # mostly
                    point = place + len(payload) - len(point)
                else:  # the values of an event stand one behind the other
                    at = payload.find(point, at)
                    point = place + at
            if point is not None:
                tag.append(event.step, event.wall_time, number, point)


def _chosen(old: Any, keep: list[int]) -> Any:
    items = (old[i] for i in keep)
    return list(items) if isinstance(old, list) else array(old.typecode, items)


def _is_ours(file: _File) -> bool:
    """Whether the file bears our name; others may be large, and full of what nobody asks for.

    A call looks at so many bytes at most, and the next one goes on from there.
    """
    name = PLUGIN.encode()
    file.ours = file.path.name.endswith(SUFFIX)
    with file.path.open("rb") as opened:
        opened.seek(file.searched)
        end, tail = file.searched + _SEARCHED_AT_ONCE, b""
        while not file.ours and opened.tell() < end and (block := opened.read(1 << 20)):
            file.ours = name in tail + block
            tail = block[-len(name) :]
            file.searched = max(0, opened.tell() - len(tail))
    return file.ours


def _from(file: _File) -> Iterator[tuple[int, bytes]]:
    with file.path.open("rb", buffering=1 << 18) as opened:
        yield from unpack(opened, file.at)


def _described(value: Any) -> Tag:
    plugin = value.metadata.plugin_data
    if plugin.plugin_name == "scalars" or value.HasField("simple_value"):  # the latter: torch's
        return Tag("scalars", {"title": value.metadata.summary_description}, array("f"))
    if plugin.plugin_name != PLUGIN:
        return Tag(plugin.plugin_name, {}, [])
    content = parsed(plugin.content)
    return Tag(PLUGIN, content, array("q") if "quantity" in content else [])


def _point(tag: Tag, value: Any) -> Any:
    """Return what is kept of a value; of a vector its bytes."""
    if value.HasField("simple_value"):
        return value.simple_value if tag.plugin == "scalars" else None
    tensor = value.tensor
    if tag.plugin == "text" or "record" in tag.content:
        return b"\n".join(tensor.string_val).decode(errors="replace")
    if tag.plugin == "scalars":
        return _number(tensor)
    names = tag.content.get("names")
    if names is not None and len(tensor.tensor_content) == 4 * len(names):
        return tensor.tensor_content
    return None


def _number(tensor: Any) -> float | None:
    if tensor.dtype not in {DT_FLOAT, DT_DOUBLE}:
        return None
    code, values = (
        ("<f4", tensor.float_val) if tensor.dtype == DT_FLOAT else ("<f8", tensor.double_val)
    )
    held = np.frombuffer(tensor.tensor_content, code) if tensor.tensor_content else values
    return float(held[0]) if len(held) else None
