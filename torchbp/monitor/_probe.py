"""Without an optimizer: whether a backward adds to the gradients of the one before."""

import weakref

from torch import Tensor

from torchbp.monitor._catalogue import Catalogue

__all__ = ["Probe"]


class Probe:
    """Remembers one parameter and its gradient, with their versions.

    Args:
        catalogue: The parameters.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._seen: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int, int] | None = None

    def set(self) -> None:
        """Take note of the state after a backward."""
        for _, parameter in self._catalogue.alive():
            grad = parameter.grad
            if grad is not None:
                versions = parameter._version, grad._version  # noqa: SLF001
                self._seen = (weakref.ref(parameter), weakref.ref(grad), *versions)
                return
        self._seen = None

    def accumulates(self) -> bool:
        """Whether since then neither the parameter was changed nor its gradient reset."""
        if self._seen is None:
            return False
        parameter, grad = self._seen[0](), self._seen[1]()
        if parameter is None or grad is None or parameter.grad is not grad:
            return False
        versions = parameter._version, grad._version  # noqa: SLF001
        return versions == (self._seen[2], self._seen[3] + 1)
