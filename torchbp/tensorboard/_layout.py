"""What an event of ours holds, as its tag's metadata says it; and how an absent value is told from NaN."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ABSENT", "PLUGIN", "VERSION", "Layout", "is_absent", "parsed", "with_absent"]

PLUGIN = "torchbp"
VERSION = 2
# A NaN of its own, as R's NA is one: "nothing was there to measure" is not "NaN was measured".
ABSENT = np.uint32(0x7FC0AB5E)


@dataclass(frozen=True)
class Layout:
    """What the entries of a vector are: one name an entry, and what all of them share.

    Attributes:
        quantity: What is measured, e.g. ``"gradient_norm"``.
        axis: What an entry stands for, e.g. ``"layer"`` or ``"parameter"``.
        names: One an entry, in the order of the entries.
        kinds: One an entry, e.g. the class of the layer; or empty.
        unit: The unit of the values.
        title: What a chart of it is called.
        logarithm: It is to be drawn on a logarithmic axis.
    """

    quantity: str
    axis: str
    names: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    unit: str = ""
    title: str = ""
    logarithm: bool = False
    tag: str = field(init=False)

    def __post_init__(self) -> None:
        # A tag keeps the first metadata it ever had, so other entries need another tag.
        entries = "\0".join((*self.names, "", *self.kinds)).encode(errors="replace")
        digest = hashlib.sha256(entries).hexdigest()[:8]
        object.__setattr__(self, "tag", f"{self.quantity}/{self.axis}-{digest}")

    def content(self) -> bytes:
        """Return the plugin data of the tag: JSON with version, quantity, axis, names, ..."""
        members = {name: value for name, value in vars(self).items() if name != "tag"}
        return json.dumps({"version": VERSION} | members).encode()


def parsed(content: bytes) -> dict[str, Any]:
    """Return the plugin data of a tag of ours; empty where it is not as we write it.

    A vector's has ``quantity``, ``axis``, ``unit``, ``names``, ``kinds`` and, from version 2 on,
    ``title`` and ``logarithm``; a record's has ``record``.
    """
    try:
        held = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(held, dict):
        return {}
    if isinstance(held.get("record"), str):
        return held
    texts = all(isinstance(held.get(name), str) for name in ("quantity", "axis", "unit"))
    lists = all(
        isinstance(held.get(name), list) and all(isinstance(n, str) for n in held[name])
        for name in ("names", "kinds")
    )
    return held if texts and lists else {}


def is_absent(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return where ``values``, as read from a file, say that nothing was there to measure."""
    return values.view(np.uint32) == ABSENT


def with_absent(values: ArrayLike, present: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return ``values`` as float32, absent where ``present`` is False.

    Example:
        >>> import numpy as np
        >>> values = with_absent([1.0, np.nan, np.nan], np.array([True, True, False]))
        >>> values, is_absent(values)
        (array([ 1., nan, nan], dtype=float32), array([False, False,  True]))
    """
    marked = np.array(values, np.float32)
    marked.view(np.uint32)[~present] = ABSENT
    return marked
