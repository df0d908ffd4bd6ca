"""What the function under test is called with, and its neighbours: the same function at other samples."""

import copy
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchbp.verify.definite import Keep
from torchbp.verify.modules import copied
from torchbp.verify.signatures import function_of, signature_of
from torchbp.verify.tensors import apart, flatten, is_dense, kinds_in, name_of

__all__ = ["Sample"]

S = TypeVar("S", bound="Sample")


class _Held:
    """A constant that is handed on as it is, such as a sparse matrix: no check looks at its elements."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def beside(self, was: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Return the tensor, in ``dtype`` where it was given in the dtype of the leaves, which ``was`` theirs."""
        return self.tensor.to(dtype) if self.tensor.dtype == was else self.tensor


class Sample:
    """A function, its differentiable leaves, and everything else it is called with.

    Attributes:
        name: How the function is called in reports.
        flat: All that the function is called with: its arguments flattened, then a Module's tensors; detached.
        where: Positions of the leaves, the differentiable tensors, in ``flat``.
        names: One name a leaf: ``input 0``, ``input 1['w']``, ``parameter weight``.
        name_at: One name for each of ``flat``.
        origin: What the user gave, by its name, where this is a neighbour.
        memo: What checks work out about the sample and share.
        keep: Makes of every sample made from this one what is to stay so, told the position in ``flat``.
    """

    keep: Keep | None = None

    measured: tuple[str, ...] = ()  # cached properties that hold for one sample

    def __init__(
        self,
        func: Callable[..., Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.func = func
        self.name = name_of(func)
        self.seed = seed
        self.memo: dict[Any, Any] = {}
        named, self._spec = flatten(inputs, kwargs or {})
        self._arguments = len(named)
        self._module = copied(func) if isinstance(func, nn.Module) else None
        self._tensors: list[str] = []  # names of the Module's tensors, which follow the arguments
        if self._module is not None:
            state = [*self._module.named_parameters(), *self._module.named_buffers()]
            self._tensors = [n for n, _ in state]
            named += [(f"parameter {n}", x) for n, x in state]
        self.flat: list[Any] = [_held(name, x) for name, x in named]
        self.where = [
            i for i, (_, x) in enumerate(named) if isinstance(x, Tensor) and x.requires_grad
        ]
        self.name_at = [n for n, _ in named]
        self.names = [named[i][0] for i in self.where]
        self.origin = dict(zip(self.name_at, self.flat, strict=True))
        if not self.where:
            kinds = kinds_in((inputs, kwargs))
            raise ValueError(
                f"gradcheck: expected an input that requires grad, got none{f' ({kinds})' if kinds else ''}; "
                "pass floating-point or complex tensors with requires_grad=True"
            )
        self._was = self.leaves[0].dtype

    @property
    def leaves(self) -> list[Tensor]:
        """The differentiable tensors, detached: inputs in order, then a Module's parameters."""
        return [self.flat[i] for i in self.where]

    @property
    def size(self) -> int:
        """How many of ``flat`` are arguments."""
        return self._arguments

    @property
    def arguments(self) -> list[tuple[int, Tensor]]:
        """The tensors among the arguments, with their position in ``flat``."""
        return [(i, x) for i, x in enumerate(self.flat[: self._arguments]) if isinstance(x, Tensor)]

    @property
    def shapes(self) -> str:
        """The shapes of the tensors among the arguments, for a message."""
        return ", ".join(str(tuple(t.shape)) for _, t in self.arguments)

    @property
    def others(self) -> dict[int, Any]:
        """The arguments that are no tensors, by their position in ``flat``."""
        given = enumerate(self.flat[: self._arguments])
        return {i: x for i, x in given if not isinstance(x, Tensor)}

    def variant(self: S, change: Callable[[Tensor], Tensor], *, parameters: bool = False) -> S:
        """Return the same function at another sample.

        Args:
            change: Makes the new tensor of an old one.
            parameters: Change a Module's tensors too.
        """
        return self.edited(lambda _, x: change(x), parameters=parameters)

    def edited(self: S, change: Callable[[int, Tensor], Tensor], *, parameters: bool = False) -> S:
        """Return the same function at another sample; ``change`` is told the position in ``flat``."""
        other = copy.copy(self)
        for name in self.measured:
            other.__dict__.pop(name, None)
        end = len(self.flat) if parameters else self._arguments
        other.memo = {}
        other.flat = [
            change(i, x) if isinstance(x, Tensor) and i < end else x
            for i, x in enumerate(self.flat)
        ]
        if self.keep is not None:
            other.flat = [
                self.keep(i, x) if isinstance(x, Tensor) else x for i, x in enumerate(other.flat)
            ]
        return other

    def replaced(self: S, change: Mapping[int, Any]) -> S:
        """Return the same function with other arguments at these positions of ``flat``."""
        other = self.variant(lambda t: t)
        for i, x in change.items():
            other.flat[i] = x
        return other

    def asking(self: S, positions: Sequence[int]) -> S:
        """Return the same function with the tensors at these positions of ``flat`` among its leaves."""
        other = self.variant(lambda t: t)
        other.where = sorted({*self.where, *positions})
        other.names = [self.name_at[i] for i in other.where]
        return other

    def without(self: S, position: int) -> S:
        """Return the same function with None for the tensor at this position of ``flat``."""
        other = self.variant(lambda t: t)
        other.flat[position] = None
        other.where = [i for i in self.where if i != position]
        other.names = [self.name_at[i] for i in other.where]
        return other

    def with_argument(self: S, name: str, value: Any) -> S:
        """Return the same function with one argument more, which follows the others in ``flat``.

        By its name; of a Function's ``apply``, which takes none, by its place, behind the defaults of those before it.
        """
        args, kwargs = pytree.tree_unflatten(self.flat[: self._arguments], self._spec)
        more = {name: value}
        if function_of(self.func):
            left = list(signature_of(self.func).parameters.values())[len(args) :]
            behind = [p.name for p in left].index(name)
            more = {p.name: p.default for p in left[:behind]} | more
            _, spec = flatten((*args, *more.values()), kwargs)
        else:
            _, spec = flatten(args, {**kwargs, name: value})
        n = self._arguments
        other = self.variant(lambda t: t)
        other._spec = spec  # noqa: SLF001  # another of this class
        other._arguments = n + len(more)  # noqa: SLF001
        other.flat = [*self.flat[:n], *more.values(), *self.flat[n:]]
        other.name_at = [*self.name_at[:n], *(f"argument {m}" for m in more), *self.name_at[n:]]
        other.where = [i + len(more) * (i >= n) for i in self.where]
        return other

    def in_mode(self: S, training: bool) -> S:
        """Return the case of the same Module in train or eval mode."""
        other = self.variant(lambda t: t)
        if self._module is not None:
            other._module = copied(self._module).train(training)  # noqa: SLF001  # another of this class
        return other

    def turn(self, training: bool) -> None:
        """Turn the Module that is called to train or eval mode: of a case that shares it with no other."""
        if self._module is not None:
            self._module.train(training)

    def with_attributes(self: S, change: Mapping[str, Any]) -> S:
        """Return the case of the same Module with other values of its attributes, or its submodules' (``norm.eps``)."""
        other = self.variant(lambda t: t)
        if self._module is not None:
            other._module = module = copied(self._module)  # noqa: SLF001  # another of this class
            for path, value in change.items():
                prefix, _, name = path.rpartition(".")
                setattr(module.get_submodule(prefix), name, value)
        return other

    def _filled(self, leaves: Sequence[Tensor], others: Mapping[int, Tensor]) -> list[Any]:
        given = {**others, **dict(zip(self.where, leaves, strict=True))}
        return [given.get(i, x) for i, x in enumerate(self.flat)]

    def bound(self, signature: inspect.Signature) -> inspect.BoundArguments:
        """Return the arguments by the names that ``signature`` has for them; raise TypeError where they don't fit."""
        args, kwargs = self.opened(self.flat)
        return signature.bind(*args, **kwargs)

    def structure(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as they were given; the leaves require grad."""
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]
        return self.opened(self._filled(leaves, {}))

    def opened(self, flat: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, of the values of ``flat``, in the structure in which they were given."""
        return pytree.tree_unflatten(self._freed(flat)[: self._arguments], self._spec)

    def _freed(self, flat: list[Any]) -> list[Any]:
        """Return ``flat`` with the tensors that are held."""
        dtype = flat[self.where[0]].dtype
        return [x.beside(self._was, dtype) if isinstance(x, _Held) else x for x in flat]

    def invoke(self, flat: list[Any], func: Callable[..., Any] | None = None) -> Any:
        """Call the function, or another, with the values of ``flat``."""
        args, kwargs = self.opened(flat)
        if func is not None or self._module is None:
            return (func or self.func)(*args, **kwargs)
        return torch.func.functional_call(self._module, self._state(flat), args, kwargs)

    def with_state(self, leaves: Sequence[Tensor], run: Callable[[], Any]) -> Any:
        """Return what ``run`` gives while the Module, if it is one, has its tensors from ``leaves``.

        A backward that calls parts of the Module again, as a checkpoint's does, finds those of its forward.
        """
        if self._module is None:
            return run()
        tensors = range(self._arguments, len(self.flat))
        others = {i: self.flat[i].clone() for i in tensors if isinstance(self.flat[i], Tensor)}
        state = self._state(self._filled(leaves, others))
        inner = {f"module.{name}": t for name, t in state.items()}
        return torch.func.functional_call(_Holding(self._module), inner, (run,))

    def _state(self, flat: list[Any]) -> dict[str, Any]:
        """Return the tensors of the Module among the values of ``flat``, by name."""
        return dict(zip(self._tensors, self._freed(flat)[self._arguments :], strict=True))

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator that depends on the seed and on ``purpose`` only."""
        return torch.Generator().manual_seed(self.seed + zlib.crc32(purpose.encode()))


class _Holding(nn.Module):
    """Runs something while the tensors of a Module are replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _held(name: str, x: Any) -> Any:
    """Return ``x`` as it stands in ``flat``."""
    if not isinstance(x, Tensor):
        return x
    if is_dense(x):
        return apart(x)
    if x.requires_grad:
        layout = "nested tensor" if x.is_nested else str(x.layout)
        raise TypeError(
            f"gradcheck: expected strided tensors, got {layout} in {name}; "
            "pass a dense tensor and convert it inside of the function"
        )
    return _Held(x)
