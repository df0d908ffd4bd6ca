"""The catalogues of quantities and diagnoses: the listings of their folders."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torchbp.monitor import diagnoses, quantities
from torchbp.monitor._diagnosis import Diagnosis
from torchbp.monitor._quantity import Quantity

__all__ = ["all_diagnoses", "all_quantities"]


@cache
def all_quantities() -> dict[str, Quantity]:
    """Return every quantity by name; a derived one comes after all measured ones."""
    names = sorted(m.name for m in iter_modules(quantities.__path__))
    found = [import_module(f"{quantities.__name__}.{name}").QUANTITY for name in names]
    return {q.name: q for q in sorted(found, key=lambda q: q.at == "derived")}


@cache
def all_diagnoses() -> tuple[Diagnosis, ...]:
    """Return every diagnosis, by name."""
    names = sorted(m.name for m in iter_modules(diagnoses.__path__))
    return tuple(import_module(f"{diagnoses.__name__}.{name}").DIAGNOSIS for name in names)
