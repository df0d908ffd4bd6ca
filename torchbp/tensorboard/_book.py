"""The runs below a log directory, each with its index, and what the page is told about them."""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchbp.tensorboard._index import SUFFIX, Index
from torchbp.tensorboard._vector import Scalar, Vector, scalars, vectors
from torchbp.tensorboard._verdicts import GRAVITY, about, verdicts, verdicts_text

__all__ = ["Book", "Page"]


class Page:
    """One run. Several threads may ask at once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._index = Index(folder)
        self._lock = threading.Lock()
        self._quantities: tuple[str, dict[str, Vector | Scalar]] = "", {}

    def quantities(self) -> tuple[str, dict[str, Vector | Scalar]]:
        """Return the version of the run, and what there is in it, by name; all of it up to date."""
        with self._lock:
            self._index.refresh()
            version = self._index.version
            if self._quantities[0] != version:
                found: dict[str, Vector | Scalar] = {**scalars(self._index)}
                found |= {q: v for q, v in vectors(self._index).items() if "/" not in q}
                held = {name: q for name, q in found.items() if len(q.steps)}
                self._quantities = version, held
            return self._quantities

    def line(self) -> dict[str, Any] | None:
        """Return the run's line in the list of runs; None where nothing in it is ours."""
        version, quantities = self.quantities()
        with self._lock:
            index = self._index
            if not index.ours:
                return None
            found = verdicts(index)
            counts = None
            if found is not None:
                stand = [v["severity"] for v in found if v["until"] is None]
                counts = {severity: stand.count(severity) for severity in GRAVITY}
            layers = [len(q.names) for q in quantities.values() if q.axis == "layer"]
            first, last = _span(quantities)
            return {
                "run": self.name,
                "version": version,
                "state": index.state,
                "updated": index.updated,
                "first_step": first,
                "last_step": last,
                "steps": max((len(q.steps) for q in quantities.values()), default=0),
                "layers": max(layers, default=0),
                "verdicts": counts,
                "hparams": about(index),
            }

    def overview(self) -> dict[str, Any]:
        """Return all that is told of the run but the values."""
        version, quantities = self.quantities()
        entries: dict[tuple[Any, Any], int] = {}
        told = []
        for name, q in quantities.items():
            place = entries.setdefault((q.names, q.kinds), len(entries))
            told.append(
                {
                    "name": name,
                    "axis": q.axis,
                    "title": q.title or name.replace("_", " "),
                    "unit": q.unit,
                    "logarithm": q.logarithm,
                    "entries": place,
                    "points": len(q.steps),
                    "first_step": int(q.steps[0]),
                    "last_step": int(q.steps[-1]),
                }
            )
        first, last = _span(quantities)
        with self._lock:
            return {
                "run": self.name,
                "version": version,
                "state": self._index.state,
                "updated": self._index.updated,
                "first_step": first,
                "last_step": last,
                "hparams": about(self._index),
                "entries": [{"names": names, "kinds": kinds} for names, kinds in entries],
                "quantities": told,
                "verdicts": verdicts(self._index),
                "verdicts_text": verdicts_text(self._index),
                "notes": list(self._index.notes),
            }


def _span(quantities: Mapping[str, Vector | Scalar]) -> tuple[int, int]:
    steps = [q.steps for q in quantities.values()]
    return min((int(s[0]) for s in steps), default=0), max((int(s[-1]) for s in steps), default=0)


class Book:
    """The runs below one or several log directories.

    Args:
        roots: Each with the name that its runs begin with, as in TensorBoard's ``--logdir_spec``;
            ``""`` for none.
        patience: Seconds that :meth:`lines` may take to read what it has not read yet.
    """

    def __init__(self, roots: Iterable[tuple[str, Path]], patience: float = 2.0) -> None:
        self._roots = list(roots)
        self._patience = patience
        self._pages: dict[str, Page] = {}
        self._lock = threading.Lock()
        self._ours = False

    def page(self, run: str) -> Page | None:
        """Return the run of this name, or None. A name is looked up, it never becomes a path."""
        page = self._pages.get(run)
        if page is None or not page.folder.is_dir():
            self._find()
        return self._pages.get(run)

    def lines(self) -> tuple[list[dict[str, Any]], int]:
        """Return a line for each run of ours, the newest first, and how many were not read for lack of time."""
        pages = self._find()
        began, lines = time.monotonic(), []
        for number, page in enumerate(pages):
            if time.monotonic() - began > self._patience:
                return lines, len(pages) - number
            try:
                line = page.line()
            except OSError:  # deleted while it was read
                continue
            if line is not None:
                lines.append(line)
        return lines, 0

    def any_of_ours(self) -> bool:
        """Whether there is any run of ours."""
        self._ours = self._ours or any(
            path.name.endswith(SUFFIX)
            for _, root in self._roots
            for folder, _ in _folders(root)
            for path in folder.iterdir()
        )
        return self._ours

    def _find(self) -> list[Page]:
        """Bring the list of runs up to date; return them, the newest first."""
        found: dict[str, tuple[float, Path]] = {}
        for name, root in self._roots:
            for folder, newest in _folders(root):
                inside = folder.relative_to(root).as_posix()
                # As TensorBoard names them.
                run = "/".join(part for part in (name, inside) if part not in {"", "."}) or "."
                found[run] = newest, folder
        with self._lock:
            known = self._pages
            self._pages = {
                run: known[run]
                if run in known and known[run].folder == folder
                else Page(run, folder)
                for run, (_, folder) in sorted(found.items(), key=lambda item: -item[1][0])
            }
            return list(self._pages.values())


def _folders(root: Path) -> Iterator[tuple[Path, float]]:
    """Yield the folders with event files below ``root``, and when each was last written to."""
    seen: set[tuple[int, int]] = set()
    for path, subfolders, names in os.walk(root, followlinks=True):  # as TensorBoard does
        folder = Path(path)
        try:
            status = folder.stat()
        except OSError:  # deleted meanwhile
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        times = []
        for name in names:
            if "tfevents" in name:
                try:
                    times.append((folder / name).stat().st_mtime)
                except OSError:  # a dangling link
                    continue
        if times:
            yield folder, max(times)
