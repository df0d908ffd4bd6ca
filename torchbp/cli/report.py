"""``torchbp report``: what the monitor wrote, as verdicts in the terminal and as one HTML file."""

import json
import math
import shutil
import textwrap
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchbp.cli._command import Command, CouldNotRun
from torchbp.cli._sparkline import sparkline

if TYPE_CHECKING:
    from torchbp.tensorboard._book import Book, Page
    from torchbp.tensorboard._vector import Scalar, Vector

_VERDICTS_OF_A_KIND = 5
_DESCRIPTION = """\
What torchbp.watch(..., log_dir=RUN_DIR) wrote: its verdicts, and how the error signal of each layer
went. Reads runs that are still going, were killed or were cut off. RUN_DIR is the folder of a run or
of several; several are compared.

Exits with 1 while an alert stands, so that a training job can be checked by it.

examples:
  torchbp report runs/first
  torchbp report runs/first runs/second -o report.html   with all views, one file, no server
  torchbp report runs/first --json -                     for programs
"""


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", nargs="+", type=Path, metavar="RUN_DIR", help="where runs are")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write this HTML file")
    parser.add_argument("--json", metavar="FILE", help="write JSON there; - instead of the text")
    parser.add_argument(
        "--layers", type=int, default=24, metavar="N", help="print so many layers (%(default)s)"
    )


def _run(args: Namespace) -> int:
    book = _book(args.run_dir)
    lines, _ = book.lines()
    if not lines:
        where = ", ".join(map(str, args.run_dir))
        message = f"expected runs of torchbp.watch, got none in {where}; give it as log_dir there"
        raise CouldNotRun(message)
    lines.sort(key=lambda line: line["run"])
    pages = [page for line in lines if (page := book.page(line["run"])) is not None]
    overviews = [page.overview() for page in pages]
    alerts = sum(v["severity"] == "alert" for o in overviews for v in _standing(o))
    status = 1 if alerts else 0
    if args.output:
        _write_html(args.output, pages, ", ".join(map(str, args.run_dir)))
    if args.json:
        _write_json(args.json, lines, overviews, status)
    if args.json != "-":
        width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
        print("\n".join(_text(pages, lines, overviews, width, args.layers)))
        if args.output:
            print(f"\nwritten: {args.output}")
    return status


def _book(folders: Sequence[Path]) -> "Book":
    from torchbp.tensorboard._book import Book

    for folder in folders:
        if not folder.is_dir():
            raise CouldNotRun(f"expected a folder, got {folder}; give a log_dir of torchbp.watch")
    names = [folder.resolve().name for folder in folders]
    roots = []
    for folder, name in zip(folders, names, strict=True):
        alone = len(folders) == 1 and not any("tfevents" in p.name for p in folder.iterdir())
        unique = names.count(name) == 1
        roots.append(("" if alone else name if unique else folder.as_posix(), folder))
    return Book(roots, patience=math.inf)


def _write_html(path: Path, pages: "Sequence[Page]", folder: str) -> None:
    from torchbp.tensorboard._report import report

    try:
        path.write_text(report(pages, folder), "utf-8")
    except OSError as error:
        raise CouldNotRun(f"--output {path}: {error.strerror}; choose another") from None


def _write_json(
    where: str, lines: list[dict[str, Any]], overviews: list[dict[str, Any]], status: int
) -> None:
    runs = [
        line | {"verdicts": o["verdicts"], "notes": o["notes"]}
        for line, o in zip(lines, overviews, strict=True)
    ]
    text = json.dumps({"version": 1, "status": status, "runs": runs}, indent=1)
    if where == "-":
        print(text)
        return
    try:
        Path(where).write_text(text + "\n", "utf-8")
    except OSError as error:
        raise CouldNotRun(f"--json {where}: {error.strerror}; choose another") from None


def _standing(overview: dict[str, Any]) -> list[dict[str, Any]]:
    return [v for v in overview["verdicts"] or () if v["until"] is None]


# ------------------------------------------------------------------------------------ the text
def _text(
    pages: "Sequence[Page]",
    lines: Sequence[dict[str, Any]],
    overviews: Sequence[dict[str, Any]],
    width: int,
    layers: int,
) -> Iterator[str]:
    if len(pages) > 1:
        yield from _comparison(pages, lines, overviews)
    for page, line, overview in zip(pages, lines, overviews, strict=True):
        if len(pages) > 1:
            yield ""
        yield _head(line)
        yield from (f"  note: {_plain(note)}" for note in overview["notes"])
        yield from _verdicts(overview, width)
        yield from _layers(page, overview, width, layers)


def _comparison(
    pages: "Sequence[Page]",
    lines: Sequence[dict[str, Any]],
    overviews: Sequence[dict[str, Any]],
) -> Iterator[str]:
    rows = [("run", "steps", "loss", "signal, first layer / last", "verdicts that stand")]
    for page, line, overview in zip(pages, lines, overviews, strict=True):
        quantities = page.quantities()[1]
        loss, signal = quantities.get("loss/train"), quantities.get("error_signal")
        kinds = dict.fromkeys(v["kind"] for v in _standing(overview) if v["severity"] != "info")
        stand = ", ".join(kinds) or ("none" if overview["verdicts"] is not None else "not known")
        rows.append(
            (
                _plain(line["run"]),
                str(line["last_step"] + 1),
                f"{loss.read(0, 1)[0, 0]:.2g} → {_last(loss)[0]:.2g}" if loss else "–",
                _ratio(_last(signal)) if signal else "–",
                _plain(stand),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        yield "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
        if number == 0:
            yield "─" * (sum(widths) + 2 * len(widths) - 2)


def _last(quantity: "Vector | Scalar") -> list[float]:
    return quantity.read(len(quantity.steps) - 1)[0].tolist()


def _ratio(signal: list[float]) -> str:
    return f"{signal[0] / signal[-1]:.0e}" if signal[-1] else "–"


def _head(line: dict[str, Any]) -> str:
    state = line["state"]
    if state != "finished":
        minutes = max(0.0, time.time() - line["updated"]) / 60
        age = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        state = f"{state}, last written {age} ago"
    steps = f"steps {line['first_step']} to {line['last_step']}"
    return f"{_plain(line['run'])}: {steps}, {line['layers']} layers, {state}"


def _verdicts(overview: dict[str, Any], width: int) -> Iterator[str]:
    if overview["verdicts"] is None:
        yield "  its verdicts are text only (an older version wrote them), and not counted here:"
        yield from (
            f"  {_plain(row)}" for row in overview["verdicts_text"].splitlines() or ["none"]
        )
    elif not overview["verdicts"]:
        yield "  nothing is wrong"
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for v in overview["verdicts"] or ():
        groups.setdefault((v["kind"], v["until"] is None), []).append(v)
    for (kind, stands), group in groups.items():
        for v in group[:_VERDICTS_OF_A_KIND]:
            until = "" if stands else f" until step {v['until']}"
            where = f" at {_plain(v['layer'])}" if v["layer"] else ""
            yield f"  {v['severity'].upper():8}{_plain(kind)}{where} since step {v['step']}{until}"
            if stands:
                yield _paragraph("measured", v["evidence"], width)
        if len(group) > _VERDICTS_OF_A_KIND:
            rest = len(group) - _VERDICTS_OF_A_KIND
            yield f"    and {rest} more of {_plain(kind)}; --json - tells all"
        if stands:
            yield _paragraph("rule", f"{group[0]['threshold']} ({group[0]['source']})", width)
            yield _paragraph("try", group[0]["advice"], width)


def _paragraph(head: str, text: str, width: int) -> str:
    return textwrap.fill(
        _plain(text), width, initial_indent=f"    {head:10}", subsequent_indent=" " * 14
    )


def _layers(page: "Page", overview: dict[str, Any], width: int, most: int) -> Iterator[str]:
    """Yield a sparkline a layer: the quantity over the steps, all layers on one logarithmic scale."""
    from torchbp.tensorboard._matrix import matrix

    quantities = page.quantities()[1]
    names = ("error_signal", "layer_gradient_norm", "gradient_norm")
    name = next((n for n in names if n in quantities), None)
    if name is None or most < 1:
        return
    quantity = quantities[name]
    rows = _some(quantity.names, {v["layer"] for v in overview["verdicts"] or ()}, most)
    labels = [_plain(quantity.names[row])[-30:] for row in rows]
    label = max(map(len, labels))
    columns = max(10, width - label - 26)
    part = matrix(quantity, columns=columns, planes=("last",), entries=rows)
    told = f"  {name.replace('_', ' ')}, steps {part.steps[0]} to {part.ends[-1]}"
    if len(rows) < len(quantity.names):
        told += f", {len(rows)} of {len(quantity.names)} layers"
    yield f"{told}; logarithmic, · is 0, ! inf or NaN, ? not there"
    values = part.values[0]
    for text, line, column in zip(labels, sparkline(values), values.T, strict=True):
        yield f"  {text:{label}}  {line}  {column[0]:8.1e} → {column[-1]:8.1e}"


def _some(names: Sequence[str], wanted: set[str], most: int) -> list[int]:
    """Return the places of ``most`` of the names: the wanted ones, the others evenly spread."""
    count = len(names)
    if count <= most:
        return list(range(count))
    chosen = [i for i, name in enumerate(names) if name in wanted][:most]
    for i in (round(k * (count - 1) / max(most - 1, 1)) for k in range(most)):
        if len(chosen) < most and i not in chosen:
            chosen.append(i)
    return sorted(chosen)


def _plain(text: str) -> str:
    """Return ``text`` without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


COMMAND = Command(
    help="what the monitor found in a run: verdicts, sparklines, one HTML file",
    description=_DESCRIPTION,
    arguments=_arguments,
    run=_run,
)
