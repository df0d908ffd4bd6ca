"""One quantity over time: the layouts it was written with side by side, the values read on demand."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchbp.tensorboard._index import Index, Tag
from torchbp.tensorboard._layout import ABSENT, PLUGIN

__all__ = ["Scalar", "Vector", "scalars", "vectors"]


class Vector:
    """A quantity of several entries, in the order of steps.

    Attributes:
        steps: int64 ``(S,)``, ascending.
        times: float64 ``(S,)``.
        names: One an entry, of all layouts.
        kinds: One an entry, or empty.
        axis: What an entry stands for.
        unit: The unit of the values.
        title: What a chart of it is called.
        logarithm: It is to be drawn on a logarithmic axis.
    """

    def __init__(self, layouts: Sequence[Tag], files: Sequence[Path]) -> None:
        contents = [tag.content for tag in layouts]
        keys = [_keys(content["names"]) for content in contents]
        place = {key: i for i, key in enumerate(dict.fromkeys(key for ks in keys for key in ks))}
        kinds: dict[tuple[str, int], str] = {}
        for content, own in zip(contents, keys, strict=True):
            kinds.update(zip(own, content["kinds"], strict=False))
        self.names: tuple[str, ...] = tuple(name for name, _ in place)
        self.kinds = tuple(kinds.get(key, "") for key in place) if kinds else ()
        self.axis: str = contents[-1]["axis"]
        self.unit: str = contents[-1]["unit"]
        self.title: str = contents[-1].get("title", "")
        self.logarithm: bool = contents[-1].get("logarithm", False)
        steps = np.concatenate([np.array(tag.steps, np.int64) for tag in layouts])
        order = np.argsort(steps, kind="stable")
        self.steps = steps[order]
        self.times = np.concatenate([np.array(tag.times) for tag in layouts])[order]
        self._places = np.concatenate([np.array(tag.values, np.int64) for tag in layouts])[order]
        self._in_file = np.concatenate([np.array(tag.files, np.int64) for tag in layouts])[order]
        counts = [len(tag.steps) for tag in layouts]
        self._layout = np.repeat(np.arange(len(layouts)), counts)[order]
        self._columns = [np.array([place[key] for key in own], np.intp) for own in keys]
        self._files = files

    def read(
        self, start: int = 0, stop: int | None = None, entries: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Return the samples ``start`` to ``stop``, float32 ``(stop - start, len(entries))``.

        An entry that a sample's layout does not have is absent.
        """
        stop = len(self.steps) if stop is None else stop
        one = len(self._columns) == 1
        low, high = (min(entries), max(entries) + 1) if one and entries else (0, len(self.names))
        out = np.empty((stop - start, high - low), "<f4")
        if not one:
            out.view(np.uint32)[:] = ABSENT
        with ExitStack() as stack:
            opened: dict[int, Any] = {}
            for row, sample in zip(out, range(start, stop), strict=True):
                number = int(self._in_file[sample])
                if number not in opened:
                    file = self._files[number].open("rb", buffering=0)
                    opened[number] = stack.enter_context(file)
                columns = self._columns[self._layout[sample]]
                into = row if one else np.empty(len(columns), "<f4")
                opened[number].seek(int(self._places[sample]) + 4 * low)
                if opened[number].readinto(into) != into.nbytes:
                    message = f"{self._files[number].name} has been cut; reload"
                    raise OSError(message)
                if not one:
                    row[columns] = into
        return out if entries is None else out[:, np.asarray(entries, np.intp) - low]


def _keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """Tell entries of the same name apart by their number."""
    counts: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, counts[name]))
        counts[name] += 1
    return keys


class Scalar:
    """A single number a step, with the face of :class:`Vector`."""

    names: tuple[str, ...] = ("",)
    kinds: tuple[str, ...] = ()
    axis = "run"
    unit = ""
    logarithm = False

    def __init__(self, name: str, tag: Tag) -> None:
        self.title: str = tag.content.get("title", "") or name
        steps = np.array(tag.steps, np.int64)
        order = np.argsort(steps, kind="stable")
        self.steps, self.times = steps[order], np.array(tag.times)[order]
        self._values = np.array(tag.values, "<f4")[order]

    def read(
        self, start: int = 0, stop: int | None = None, entries: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Return the samples ``start`` to ``stop``, float32 ``(stop - start, 1)``."""
        column = self._values[start:stop, None]
        return column if entries is None else column[:, list(entries)]


def vectors(index: Index) -> dict[str, Vector]:
    """Return the vectors of a run by quantity; extremes of intervals as ``"<quantity>/max"``."""
    layouts: dict[str, list[Tag]] = {}
    for name, tag in index.tags.items():
        if tag.plugin == PLUGIN and "quantity" in tag.content:
            kind = name.rpartition("/")[2]
            key = tag.content["quantity"] + (f"/{kind}" if kind in {"max", "min"} else "")
            layouts.setdefault(key, []).append(tag)
    return {key: Vector(tags, index.files) for key, tags in layouts.items()}


def scalars(index: Index) -> dict[str, Scalar]:
    """Return the scalars of a run by tag."""
    found = {name: tag for name, tag in index.tags.items() if tag.plugin == "scalars"}
    return {name: Scalar(name, tag) for name, tag in found.items()}
