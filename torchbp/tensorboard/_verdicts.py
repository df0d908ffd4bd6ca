"""The verdicts of a run, put together from the changes that were written."""

import json
import math
from typing import Any

from torchbp.tensorboard._index import Index, Tag
from torchbp.tensorboard._layout import PLUGIN

__all__ = ["GRAVITY", "RECORD", "about", "verdicts", "verdicts_text"]

RECORD, _ABOUT = "verdicts", "run"
GRAVITY = {"alert": 0, "warning": 1, "info": 2}
_TEXTS = ("kind", "severity", "layer", "evidence", "threshold", "source", "advice")


def verdicts(index: Index) -> list[dict[str, Any]] | None:
    """Return the verdicts, worst first; None where the run holds none that a program can read.

    Those that stand come before those that are over, then by severity, then by step. A verdict that
    stood where the run was resumed ends there: the new session finds anew what lasts.
    """
    tag = _record(index, RECORD)
    if tag is None:
        return None
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for file, text in zip(tag.files, tag.values, strict=True):
        for number, verdict in _changes(str(text)):
            found[file, number] = verdict
    for (file, _), verdict in found.items():
        resumed = [step for later, step in index.starts if later > file]
        if verdict["until"] is None and resumed:
            verdict["until"] = max(resumed[0], verdict["step"])
    return sorted(
        found.values(),
        key=lambda v: (v["until"] is not None, GRAVITY[v["severity"]], v["step"]),
    )


def verdicts_text(index: Index) -> str:
    """Return the verdicts as the markdown that was written last."""
    tag = index.tags.get("verdicts")
    texts = [str(text) for text in tag.values] if tag is not None and tag.plugin == "text" else []
    return texts[-1] if texts else ""


def about(index: Index) -> dict[str, bool | float | str]:
    """Return what the run was made with: optimizer, learning rate, ..."""
    tag = _record(index, _ABOUT)
    held = _loaded(str(tag.values[-1])) if tag is not None and len(tag.values) else None
    items = held.items() if isinstance(held, dict) else ()
    known = {str(k): v for k, v in items if isinstance(v, bool | int | float | str)}
    return {
        k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in known.items()
    }


def _record(index: Index, name: str) -> Tag | None:
    tag = index.tags.get(f"{PLUGIN}/{name}")
    return tag if tag is not None and tag.content.get("record") == name else None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _changes(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Return ``(number, verdict)`` of each that is as it should be."""
    held = _loaded(text)
    return [
        (
            pair[0],
            pair[1] | {"quantities": [q for q in pair[1].get("quantities", ()) if _is_text(q)]},
        )
        for pair in (held if isinstance(held, list) else ())
        if isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], int)
        and _is_verdict(pair[1])
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_verdict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_is_text(value.get(name)) for name in _TEXTS)
        and value["severity"] in GRAVITY
        and isinstance(value.get("step"), int)
        and isinstance(value.get("until"), int | None)
        and isinstance(value.get("quantities", []), list)
    )
