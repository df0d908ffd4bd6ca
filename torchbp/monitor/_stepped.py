"""Which gradients the last step was made with: whether there has been a backward since."""

import weakref
from collections.abc import Iterable

from torch import Tensor

from torchbp.monitor._catalogue import Catalogue

__all__ = ["Stepped"]


class Stepped:
    """Remembers, of every optimizer's parameters, the first gradient there was when a step ended.

    A second optimizer's step finds it as it was. Gradients that came of a backward since are tensors of
    their own, unless they were reset in place.

    Args:
        catalogue: The parameters.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._parameters = catalogue.parameters
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def note(self, optimizers: Iterable[tuple[int, tuple[int, ...]]]) -> None:
        """Remember them at the end of a step: of every optimizer its key and its parameters."""
        self._seen = {k: weakref.ref(g) for k, m in optimizers if (g := self._first(m)) is not None}

    def has_new(self, key: int, members: tuple[int, ...]) -> bool:
        """Whether an optimizer's parameters have a gradient that was not there."""
        now, seen = self._first(members), self._seen.get(key)
        return now is not None and (seen is None or seen() is not now)

    def _first(self, members: tuple[int, ...]) -> Tensor | None:
        for index in members:
            parameter = self._parameters[index]()
            if parameter is not None and parameter.grad is not None:
                return parameter.grad
        return None
