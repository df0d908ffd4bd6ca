"""The report: one HTML file with the page, its scripts and the data of some runs. README.md in this folder."""

import base64
import hashlib
import html
import json
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from torchbp.tensorboard._book import Page
from torchbp.tensorboard._bundle import bundle, slim
from torchbp.tensorboard._matrix import PLANES, matrix
from torchbp.tensorboard._vector import Scalar, Vector

__all__ = ["report"]

_STATIC = Path(__file__).parent / "static"
_LIMIT = 400_000  # bytes for the page and a run of 100 layers
_COLUMNS = (1000, 700, 500, 350, 250, 175, 125, 90, 64, 45, 35, 25)
_COLUMNS_OF_A_LINE = 250  # a single number a step is small
# What the views show first; the rest follows as far as the size allows.
_FIRST = (
    "loss/train",
    "loss/val",
    "error_signal",
    "layer_gradient_norm",
    "update_ratio",
    "dead_share",
    "saturated_share",
    "noise_scale",
    "learning_rate",
)
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
{styles}
</head>
<body>
<noscript>This report draws itself with JavaScript, which is switched off here.</noscript>
<script type="application/json" id="torchbp-data">{data}</script>
{scripts}
</body>
</html>
"""


def report(pages: Sequence[Page], folder: str) -> str:
    """Return the report as one HTML document.

    A quantity is told exactly where that is small enough, else in buckets, of which largest, smallest
    and last value are told; what does not fit into 400 kB for 100 layers is left out, and said to be.

    Args:
        pages: The runs; each has something of ours.
        folder: What the report calls the place they are from.
    """
    styles = [slim((_STATIC / name).read_text("utf-8")) for name in ("uPlot.min.css", "style.css")]
    licence = (_STATIC / "uPlot.LICENSE").read_text("utf-8")
    scripts = [
        ("", f"/*\n{licence}*/\n{(_STATIC / 'uPlot.iife.min.js').read_text('utf-8')}"),
        (' type="module"', bundle(_STATIC / "report.js")),
    ]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; "
        f"style-src {_hashes(styles)}; script-src {_hashes(script for _, script in scripts)}"
    )
    frame = sum(len(text.encode()) for text in (*styles, *(script for _, script in scripts)))
    lines = [line for page in pages if (line := page.line()) is not None]
    names = ", ".join(line["run"] for line in lines)
    return _TEMPLATE.format(
        policy=html.escape(policy, quote=False),
        title=html.escape(f"{names}: gradient flow"),
        styles="\n".join(f"<style>{style}</style>" for style in styles),
        data=_data(pages, lines, folder, max(_LIMIT - frame - 2000, _LIMIT // 4)),
        scripts="\n".join(f"<script{kind}>{script}</script>" for kind, script in scripts),
    )


def _hashes(texts: Iterable[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _data(
    pages: Sequence[Page], lines: Sequence[Mapping[str, Any]], folder: str, allowed: int
) -> str:
    overviews = {page.name: page.overview() for page in pages}
    matrices, left_out = {}, {}
    for page, line in zip(pages, lines, strict=True):
        room = allowed - len(json.dumps(overviews[page.name]))
        room *= max(1.0, line["layers"] / 100)
        matrices[page.name], left_out[page.name] = _chosen(page.quantities()[1], int(room))
    runs = {"logdir": folder, "message": "", "runs": lines}
    members = {"version": 1, "made": time.time(), "runs": runs, "overviews": overviews}
    text = json.dumps(members | {"matrices": matrices, "left_out": left_out}, allow_nan=False)
    return text.replace("<", "\\u003c")  # no name can end the script


def _chosen(
    quantities: Mapping[str, Vector | Scalar], room: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the matrices that fit into ``room`` bytes, and the names of those that do not.

    The first ones all get the same number of columns, as many as fit.
    """
    first = [name for name in _FIRST if name in quantities]

    @cache
    def all_first(columns: int) -> dict[str, dict[str, Any]]:
        return {name: _packed(quantities[name], columns) for name in first}

    def fits(columns: int) -> bool:
        return sum(map(_size, all_first(columns).values())) <= room

    columns = _COLUMNS[min(bisect_left(_COLUMNS, True, key=fits), len(_COLUMNS) - 1)]
    packed = dict(all_first(columns))
    room -= sum(map(_size, packed.values()))
    left_out = []
    for name in sorted(
        set(quantities) - set(first), key=lambda n: (quantities[n].axis != "run", n)
    ):
        one = _packed(quantities[name], columns)
        if _size(one) <= room:
            packed[name] = one
            room -= _size(one)
        else:
            left_out.append(name)
    return packed, left_out


def _packed(quantity: Vector | Scalar, columns: int) -> dict[str, Any]:
    # Three planes of a bucket take the place of three samples.
    points = len(quantity.steps)
    columns = max(columns, _COLUMNS_OF_A_LINE) if quantity.axis == "run" else columns
    exact = points <= len(PLANES) * columns
    part = matrix(quantity, columns=points if exact else columns)
    # The first bytes of neighbours (sign and exponent) are alike, the last ones are noise.
    planar = part.values.astype("<f4").reshape(-1, 1).view(np.uint8).T.tobytes()
    data = base64.b64encode(zlib.compress(planar)).decode()
    return {"header": part.header(), "data": data}


def _size(packed: Mapping[str, Any]) -> int:
    return len(packed["data"]) + len(json.dumps(packed["header"]))
