"""Draws docs/pictures/lean.svg from the committed rows of memory.py: kept bytes against time, two networks.

``python benchmarks/memory_picture.py``; memory.py draws it after each run.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["draw"]

DATA = Path(__file__).parent / "data"
# Where a label stands, beside its point.
_PLACES = {
    "torch": (8, 23, "start"),
    "torchbp": (8, -8, "start"),
    "torch checkpoint": (8, -7, "start"),
    "torch selective checkpoint": (-24, -10, "start"),
}

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "lean.svg"


def picture(rows: list[dict[str, Any]]) -> str:
    """Return an SVG: for two models, kept bytes against time, each way a point, lean's budgets a curve."""
    width, height, left, top, plot_w, plot_h = 860, 400, 60, 46, 330, 280
    fonts = 'font-family="system-ui, sans-serif" font-size="12" fill="#333"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {fonts}>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    times = [r["time"] for r in rows if "time" in r and r["model"] in ("GPT", "ResNet-20")]
    high = max([1.4, *(-(-t // 0.1) * 0.1 for t in times)])
    for i, name in enumerate(("GPT", "ResNet-20")):
        x0 = left + i * (plot_w + 80)

        def px(kept: float, x0: int = x0) -> float:
            return x0 + kept * plot_w / 1.3

        def py(t: float) -> float:
            return top + plot_h - (t - 0.8) / (high - 0.8) * plot_h

        out.append(f'<text x="{x0}" y="{top - 18}" font-size="15" font-weight="600">{name}</text>')
        out.extend(
            f'<line x1="{px(k):.1f}" y1="{top}" x2="{px(k):.1f}" y2="{top + plot_h}" stroke="#eee"/>'
            f'<text x="{px(k):.1f}" y="{top + plot_h + 16}" text-anchor="middle">{k:.1f}</text>'
            for k in (0, 0.2, 0.4, 0.6, 0.8, 1.0)
        )
        t = 0.8
        while t <= high + 1e-9:
            out.append(
                f'<line x1="{x0}" y1="{py(t):.1f}" x2="{x0 + plot_w}" y2="{py(t):.1f}" stroke="#eee"/>'
                f'<text x="{x0 - 6}" y="{py(t) + 4:.1f}" text-anchor="end">{t:.1f}</text>'
            )
            t += 0.1
        mine = [r for r in rows if r["model"] == name and "time" in r]
        curve = [r for r in mine if r["way"].startswith("lean")]
        points = " ".join(f"{px(r['kept']):.1f},{py(r['time']):.1f}" for r in curve)
        out.append(f'<polyline points="{points}" fill="none" stroke="#0b7a75" stroke-width="2.5"/>')
        for r in mine:
            ours = r["way"].startswith("lean")
            color = "#0b7a75" if ours else "#b3541e"
            out.append(
                f'<circle cx="{px(r["kept"]):.1f}" cy="{py(r["time"]):.1f}" r="4.5" fill="{color}"/>'
            )
            label = (
                r["way"].removeprefix("lean ").removeprefix("torch ").removesuffix(" checkpoint")
            )
            dx, dy, anchor = (-7, 15, "end") if ours else _PLACES.get(r["way"], (8, 4, "start"))
            out.append(
                f'<text x="{px(r["kept"]) + dx:.1f}" y="{py(r["time"]) + dy:.1f}" fill="{color}" '
                f'text-anchor="{anchor}">{label}</text>'
            )
        out.append(
            f'<text x="{x0 + plot_w / 2}" y="{top + plot_h + 38}" text-anchor="middle">'
            "bytes kept for backward, share of torch's</text>"
        )
    out.append(
        f'<text transform="translate(18 {top + plot_h / 2}) rotate(-90)" text-anchor="middle">'
        "step time, share of torch's</text>"
    )
    out.append(
        f'<text x="{left}" y="{height - 10}" fill="#666">Gradients of every lean point equal '
        "the converted model's to the last bit. One CPU thread, float32. Lower left is better.</text>"
    )
    return "\n".join([*out, "</svg>"]) + "\n"


def draw() -> None:
    """Draw it from the newest file."""
    file = max(DATA.glob("memory-cpu-*.json"))
    PICTURE.write_text(picture(json.loads(file.read_text())["rows"]))


if __name__ == "__main__":
    draw()
