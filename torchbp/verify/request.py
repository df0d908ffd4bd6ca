"""What gradcheck is asked for: refused before anything is done where it cannot be."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.autograd import Function

from torchbp.verify._check import Check, Level, all_checks

__all__ = ["chosen", "expect"]

LARGEST_SEED = 2**62  # of torch's generators it is 2**63, and checks add to it


def chosen(
    level: Level, names: str | Collection[str] | None, skip: str | Collection[str] = ()
) -> list[Check]:
    """Return the checks that are asked for, in the order of the report.

    Raises:
        ValueError: There is no such level or check, or none is left.
    """
    known = all_checks()
    if level not in ("quick", "full"):
        raise ValueError(
            f"gradcheck: expected level 'quick' or 'full', got {level!r}; pass one of them"
        )
    wanted = [names] if isinstance(names, str) else names
    skipped = [skip] if isinstance(skip, str) else skip
    for name in [*(wanted or ()), *(n for n in skipped if n != "differences")]:
        if name not in known:
            raise ValueError(f"gradcheck: expected checks among {', '.join(known)}, got {name!r}")
    if wanted is not None:
        left = [c for c in known.values() if c.name in wanted]
    else:
        left = [c for c in known.values() if c.level in ("quick", level)]
    left = [c for c in left if c.name not in skipped]
    if "differences" in skipped:
        left = [c for c in left if not c.differences]
    if not left:
        raise ValueError("gradcheck: expected at least one check, got none; skip fewer")
    return left


def expect(func: Any, kwargs: Any, reference: Any, seed: Any, options: Mapping[str, Any]) -> None:
    """Raise where an argument is none that can be used, before anything is done."""
    rules: dict[str, tuple[bool, Any, str, str]] = {
        "func": (callable(func), func, "a callable", "pass the function, not what it returns"),
        "kwargs": (
            kwargs is None or isinstance(kwargs, Mapping),
            kwargs,
            "a mapping of keyword arguments",
            "positional ones are inputs",
        ),
        "reference": (
            reference is None or callable(reference),
            reference,
            "a callable",
            "pass the function, not its values",
        ),
        "seed": (isinstance(seed, int), seed, "a whole number", "pass seed=0"),
    }
    function = isinstance(func, type) and issubclass(func, Function)
    if function:
        rules["func"] = (False, func.__name__, "a callable", f"pass {func.__name__}.apply")
    for name, (right, value, rule, advice) in rules.items():
        if not right:
            shown = type(value).__name__ if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"gradcheck: expected {rule} for {name}, got {shown:.60}; {advice}")
    if abs(seed) >= LARGEST_SEED:
        raise ValueError(f"gradcheck: expected a seed below 2**62, got {seed}; pass a smaller one")
    for name, least in {"eps": "above 0", "atol": "of 0 or more", "rtol": "of 0 or more"}.items():
        x = options[name]
        if x is not None and not (x > 0 if name == "eps" else x >= 0):
            raise ValueError(
                f"gradcheck: expected {name} to be a number {least}, got {x!r}; leave it out"
            )
