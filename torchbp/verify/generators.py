"""Random generators of a function's own: torch's, NumPy's and Python's, that it holds or is given."""

import pickle
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["are_same", "generators_among", "is_generator", "put_back", "seed_all", "states_of"]


def is_generator(x: object) -> bool:
    """Whether random numbers are drawn from this object, and no function."""
    if isinstance(x, random.SystemRandom):
        return False  # it cannot be seeded
    return isinstance(x, (torch.Generator, random.Random, *_numpys()))


def generators_among(reached: Iterable[Any]) -> list[Any]:
    """Return those among these objects."""
    return [x for x in reached if is_generator(x)]


def seed_all(generators: Iterable[Any], value: int) -> None:
    """Seed each with ``value``."""
    for x in generators:
        if isinstance(x, torch.Generator):
            x.manual_seed(value)
        elif hasattr(x, "seed"):
            x.seed(value % 2**32)
        else:
            x.bit_generator.state = type(x.bit_generator)(value).state


def states_of(generators: Iterable[Any]) -> list[Any]:
    """Return the state of each."""
    return [_state(x) for x in generators]


def are_same(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists of states are the same."""
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else pickle.dumps(a) == pickle.dumps(b)
        for a, b in zip(some, others, strict=True)
    )


@contextmanager
def put_back(generators: list[Any]) -> Iterator[None]:
    """Put their states back at the end."""
    was = states_of(generators)
    try:
        yield
    finally:
        for x, state in zip(generators, was, strict=True):
            if isinstance(x, random.Random):
                x.setstate(state)
            elif hasattr(x, "set_state"):
                x.set_state(state)
            else:
                x.bit_generator.state = state


def _state(x: Any) -> Any:
    if isinstance(x, random.Random):
        return x.getstate()
    return x.get_state() if hasattr(x, "get_state") else x.bit_generator.state


def _numpys() -> tuple[type, ...]:
    """Return the classes of NumPy's generators, if it is there."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    return (numpy.Generator, numpy.RandomState) if numpy else ()
