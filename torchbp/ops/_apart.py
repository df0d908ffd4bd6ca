"""Numbers of a formula that are given to its kernel, and not written into it: one kernel serves all of them."""

from functools import partial
from types import CellType, FunctionType
from typing import Any

__all__ = ["Apart", "with_apart"]


class Apart(float):
    """A number that is given to the kernel, as is what is computed of it."""


def with_apart(value: Any) -> Any:
    """Return ``value`` with the numbers apart that a function closes over, or is partial in."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Apart(value)
    if isinstance(value, partial):
        named = {k: with_apart(v) for k, v in value.keywords.items()}
        return partial(with_apart(value.func), *map(with_apart, value.args), **named)
    if isinstance(value, FunctionType) and value.__closure__:
        cells = tuple(CellType(with_apart(cell.cell_contents)) for cell in value.__closure__)
        function = FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
        )
        function.__kwdefaults__ = value.__kwdefaults__
        return function
    return value


def _give_arithmetic() -> None:
    """Let what is computed of a number that is apart be apart."""

    def give(name: str) -> None:
        own = getattr(float, name)

        def compute(*operands: float) -> Any:
            value = own(*operands)  # NotImplemented beside a symbol
            return Apart(value) if isinstance(value, float) else value

        setattr(Apart, name, compute)

    for name in ("add", "sub", "mul", "truediv", "pow"):
        give(f"__{name}__")
        give(f"__r{name}__")
    give("__neg__")


_give_arithmetic()
