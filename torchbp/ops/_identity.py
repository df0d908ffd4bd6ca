"""What tells one formula from others, though it is made anew at each call."""

from functools import partial
from types import CodeType, FunctionType, MethodType, NoneType
from typing import Any

__all__ = ["identity"]

# A formula's code stands for it by its address, for to hash the code takes as long as all else; kept, it keeps that.
_codes: dict[int, CodeType] = {}


def identity(value: Any) -> Any:
    """Return what is equal for formulas that do the same, of one source and numbers; ``None`` where nothing is."""
    kind = type(value)
    if kind is FunctionType:
        if "<" not in value.__qualname__:  # of a module: there once, and for good
            return value
        code = value.__code__
        _codes[id(code)] = code
        parts = [*(value.__defaults__ or ()), *(c.cell_contents for c in value.__closure__ or ())]
        found: list[Any] = [id(code)]
    elif kind is partial:
        parts = [value.func, *value.args, *value.keywords.values()]
        found = list(value.keywords)
    elif isinstance(value, (int, float, str, NoneType)):
        return kind, value
    else:
        return value if callable(value) and kind is not MethodType else None
    for part in parts:
        known = part if type(part) is float else identity(part)
        if known is None:
            return None
        found.append(known)
    return tuple(found)
