"""The report of memory() as text: a table by layer and op, the sums, a bar for each way."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchbp.recompute._memory import Memory

__all__ = ["size", "table"]

_BAR = 40  # characters
_SMALL = 0.004  # of what is kept: smaller rows are summed up in one


def table(report: "Memory", each: bool) -> str:
    """Return the report for a terminal; see :meth:`Memory.table`."""
    usages = report.ways.values()
    most = max(u.kept_bytes for u in usages)
    rows = [["layer", "op", *report.ways]]
    small = dict.fromkeys(report.ways, 0)
    few = 0
    for (layer, op), kept in report.rows(each).items():
        if max(kept.values()) < _SMALL * most:
            few += 1
            small = {way: small[way] + kept.get(way, 0) for way in small}
        else:
            rows.append([layer or "(model)", op, *(size(kept.get(w, 0)) for w in report.ways)])
    if few:
        rows.append([f"{few} smaller", "", *map(size, small.values())])
    rows.append(["kept for backward", "", *(size(u.kept_bytes) for u in usages)])
    rows.append(["peak of the step", "", *(size(u.peak) for u in usages)])
    work = [u.flops / max(1, next(iter(usages)).flops) for u in usages]
    sums = 2
    if any(abs(w - 1) > 0.002 for w in work):
        rows.append(["products, FLOP", "", *(f"{w:.2f}x" for w in work)])
        sums = 3
    lines = _aligned(rows)
    rule = "─" * max(map(len, lines))
    apart = f"parameters and buffers {size(report.parameters)}, inputs {size(report.inputs)}"
    lines = [lines[0], rule, *lines[1:-sums], rule, *lines[-sums:]]
    return "\n".join([*lines, "", *_bars(report), "", f"apart: {apart}"])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{c:{w}}" if i < 2 else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _bars(report: "Memory") -> list[str]:
    first = next(iter(report.ways.values())).kept_bytes
    most = max(u.kept_bytes for u in report.ways.values()) or 1
    width = max(map(len, report.ways))
    lines = []
    for way, usage in report.ways.items():
        bar = "█" * round(_BAR * usage.kept_bytes / most)
        share = f"{usage.kept_bytes / first:4.0%}" if first else ""
        lines.append(f"{way:{width}}  {bar:{_BAR}}  {size(usage.kept_bytes):>9}  {share}".rstrip())
    return lines


def size(count: int) -> str:
    """Return bytes in the unit that leaves one to three digits before the point."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
