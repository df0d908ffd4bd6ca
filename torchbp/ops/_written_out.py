"""A wrapper with the parameters of what it wraps, written out as one would by hand.

One of ``*args, **kwargs`` packs its arguments and unpacks them: 0.2 to 0.5 µs a call, of some 10 that a small op has.
"""

import linecache
from collections.abc import Callable
from inspect import Parameter, cleandoc, signature
from typing import Any

from torch import Tensor

__all__ = ["tensors", "written_out"]


def written_out(
    body: str, like: Callable[..., Any], *, first: tuple[str, ...] = (), **names: object
) -> Callable[..., Any]:
    """Return a function of the name, the parameters and the defaults of ``like``.

    Args:
        body: Its lines. ``{each}`` in them stands for all arguments, ``{given}`` for how they are passed on.
        like: Without ``*args`` and ``**kwargs``.
        first: Names of parameters before those of ``like``; not among ``{each}`` and ``{given}``.
        names: What the lines read, besides ``Tensor``; none of them is a parameter's.
    """
    parameters = signature(like).parameters.values()
    by_name = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    by_place = [p.name for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]
    declared = ", ".join([*first, *by_place, *["*"] * bool(by_name), *by_name])
    given = ", ".join([*by_place, *(f"{name}={name}" for name in by_name)])
    lines = cleandoc(body).format(given=given, each=", ".join(by_place + by_name)).splitlines()
    source = "\n    ".join([f"def {like.__name__}({declared}):", *lines]) + "\n"
    behind = f" behind {', '.join(first)}" * bool(first)
    file = f"<{like.__module__}.{like.__qualname__}, written out{behind}>"
    # where a traceback looks
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    space: dict[str, Any] = {"Tensor": Tensor, **names}
    exec(compile(source, file, "exec"), space)  # as dataclasses are made
    made = space[like.__name__]
    made.__defaults__ = like.__defaults__  # pyright: ignore[reportFunctionMemberAccess]
    made.__kwdefaults__ = like.__kwdefaults__  # pyright: ignore[reportFunctionMemberAccess]
    return made


def tensors(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of ``function`` that may be tensors."""
    parameters = signature(function).parameters.values()
    return [p.name for p in parameters if "Tensor" in str(p.annotation)]
