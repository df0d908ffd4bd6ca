"""What a call of the function under test has to do at another size, counted before it is done.

Inputs and outputs that fit do not tell: a matrix of all pairs of 2053 rows lies between them, or a product of two such
matrices. So a call at a size that nobody gave is ended before it does too much. Operations are counted, no time is
taken: the same sizes are tried on every machine.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchbp.verify.tensors import tensors_in

__all__ = ["Bounded", "TooMuch"]

MOST = 2**26  # elements made: a quarter of a second, which a check takes twenty times
OPERATION = 2**13  # elements take as long as an operation, however small, that is counted
SMALL = 2**12  # elements that are not counted
PRODUCT = 1 / 16  # elements take as long as a multiplication in a product of matrices
DECOMPOSED = ("linalg_", "_linalg_", "cholesky", "triangular_solve", "lu_")  # n times as much

_aten = torch.ops.aten
_PRODUCTS = {  # and where their two matrices are among the arguments
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.baddbmm: (1, 2),
}


class TooMuch(Exception):  # noqa: N818  # an outcome, not an error
    """A call would do more than is worth while."""


class Bounded(TorchDispatchMode):
    """Ends a call, or a backward, before it makes ``times`` ``MOST`` elements, or takes as long as these."""

    only_watches = True  # torchbp runs under it as without

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.done = 0.0
        self.most = times * MOST

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled what is compiled; that is not looked into."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count(func, OPERATION)
        if func.is_view or _at_most(args) <= SMALL:
            return func(*args, **(kwargs or {}))
        due = _work(func, args)
        self._count(func, due)
        result = func(*args, **(kwargs or {}))
        made = max((t.numel() for t in tensors_in(result)), default=0)
        self._count(func, max(made - due, 0))
        return result

    def _count(self, func: Any, work: float) -> None:
        self.done += work
        if self.done > self.most:
            raise TooMuch(f"{func}: more than {self.most} elements in one call")


def _at_most(args: Any) -> int:
    """Return a bound for what an operation makes or multiplies, quickly: loops have many, each of little."""
    n = 1
    for a in args:
        for x in a if isinstance(a, (list, tuple)) else (a,):
            if isinstance(x, Tensor):
                n *= x.numel() or 1
            elif isinstance(x, int) and x > 1:
                n *= x
    return n


def _work(func: Any, args: Any) -> float:
    """Return how many elements are about to be made, so far as arguments tell, or how many take as long."""
    sizes = [math.prod(a) for a in args if isinstance(a, (list, tuple)) and _are_sizes(a)]
    # Of a nested tensor torch tells no shape: an exception here would end the process.
    shapes = [torch.Size([t.numel()]) if t.is_nested else t.shape for t in tensors_in(args)]
    if func.overloadpacket in _PRODUCTS:
        a, b = (args[k].shape for k in _PRODUCTS[func.overloadpacket])
        return max(a[:-1].numel(), PRODUCT * a.numel()) * b[-1]
    largest = max([*sizes, *(s.numel() for s in shapes)], default=0)
    if func.overloadpacket.__name__.startswith(DECOMPOSED):
        return PRODUCT * largest * max(n for s in shapes for n in (1, *s[-2:]))
    try:
        return max(largest, torch.Size(torch.broadcast_shapes(*shapes)).numel())
    except RuntimeError:
        return largest


def _are_sizes(values: Any) -> bool:
    return all(isinstance(n, int) and n >= 0 for n in values)
