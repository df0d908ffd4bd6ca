"""The function under test and its sample, in one form that every check can call."""

import copy
import dis
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "BackwardRaised",
    "Case",
    "ForwardRaised",
    "Plain",
    "build",
    "double",
    "is_deliberate",
    "reason",
]

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_TORCH = str(Path(torch.__file__).parent)


class ForwardRaised(Exception):  # noqa: N818  # carries the user's exception to the driver
    """The function under test raised; ``__cause__`` is what."""


class BackwardRaised(Exception):  # noqa: N818  # carries the user's exception to the driver
    """The backward of the function under test raised; ``__cause__`` is what."""


@dataclass(frozen=True)
class Plain:
    """Forward and backward as everybody runs them: what other ways of running are compared with."""

    outputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


@dataclass
class Calls:
    """How often the function was called, its variants counted in."""

    forward: int = 0
    backward: int = 0


class Case:
    """A function, its differentiable leaves, and everything else it is called with.

    Attributes:
        name: How the function is called in reports.
        flat: All that the function is called with: its arguments flattened, then a Module's tensors; detached.
        where: Positions of the leaves, the differentiable tensors, in ``flat``.
        names: One name a leaf: ``input 0``, ``input 1['w']``, ``parameter weight``.
        differentiable: Which outputs require a gradient, by position among the output tensors.
        calls: Calls made so far.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.func = func
        self.name = name_of(func)
        self.seed = seed
        self.options = dict(options or {})
        self.calls = Calls()
        self.copies_leaves = False
        self.memo: dict[str, Any] = {}  # what checks work out about the sample and share
        self.given = self  # the case in the sample's own precision
        structure = (tuple(inputs), dict(kwargs or {}))
        paths, self._spec = pytree.tree_flatten_with_path(structure)
        named = [(_path(keys), x) for keys, x in paths]
        self._arguments = len(named)
        self._module = copy.deepcopy(func) if isinstance(func, nn.Module) else None
        self._tensors: list[str] = []  # names of the Module's tensors, which follow the arguments
        if self._module is not None:
            state = [*self._module.named_parameters(), *self._module.named_buffers()]
            self._tensors = [n for n, _ in state]
            named += [(f"parameter {n}", x) for n, x in state]
        self.flat: list[Any] = [x.detach() if isinstance(x, Tensor) else x for _, x in named]
        self.where = [i for i, (_, x) in enumerate(named) if _is_differentiable(x)]
        self.names = [named[i][0] for i in self.where]
        if not self.where:
            raise ValueError(
                "gradcheck: expected an input that requires grad, got none; "
                "pass floating-point or complex tensors with requires_grad=True"
            )
        strange = [
            n
            for n, i in zip(self.names, self.where, strict=True)
            if self.flat[i].layout != torch.strided
        ]
        if strange:
            raise TypeError(
                f"gradcheck: expected strided tensors, got another layout in {strange[0]}"
            )

    @property
    def leaves(self) -> list[Tensor]:
        """The differentiable tensors, detached: inputs in order, then a Module's parameters."""
        return [self.flat[i] for i in self.where]

    def variant(self, change: Callable[[Tensor], Tensor], *, parameters: bool = False) -> "Case":
        """Return the same function at another sample.

        Args:
            change: Makes the new tensor of an old one.
            parameters: Change a Module's tensors too.
        """
        return self.edited(lambda _, x: change(x), parameters=parameters)

    def edited(
        self, change: Callable[[int, Tensor], Tensor], *, parameters: bool = False
    ) -> "Case":
        """Return the same function at another sample; ``change`` is told the position in ``flat``."""
        other = copy.copy(self)
        for memo in ("differentiable", "plain", "epsilon", "draws", "steady"):
            other.__dict__.pop(memo, None)
        end = len(self.flat) if parameters else self._arguments
        other.memo = {}
        other.flat = [
            change(i, x) if isinstance(x, Tensor) and i < end else x
            for i, x in enumerate(self.flat)
        ]
        return other

    @property
    def arguments(self) -> list[tuple[int, Tensor]]:
        """The tensors among the arguments, with their position in ``flat``."""
        return [(i, x) for i, x in enumerate(self.flat[: self._arguments]) if isinstance(x, Tensor)]

    # ------------------------------------------------------------------------------- calling
    def fresh(self) -> list[Tensor]:
        """Return new leaves that require grad."""
        return [leaf.clone().requires_grad_() for leaf in self.leaves]

    def call(
        self,
        leaves: Sequence[Tensor],
        *,
        seeded: bool = True,
        func: Callable[..., Any] | None = None,
        fixed: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> Any:
        """Call the function on ``leaves``; every call draws the same random numbers.

        Args:
            leaves: One tensor a leaf.
            seeded: ``False`` leaves the random state as it is.
            func: Another function of the same arguments.
            fixed: Makes what is passed of a tensor that is not a leaf; by default a copy, for functions that write.
        """
        self.calls.forward += 1
        if self.copies_leaves:
            leaves = [leaf.clone() for leaf in leaves]
        others = {i: fixed(x) for i, x in enumerate(self.flat) if isinstance(x, Tensor)}
        flat = self._filled(leaves, others)
        if seeded:
            torch.manual_seed(self.seed)
        try:
            return self._invoke(flat, func)
        except Exception as error:
            raise ForwardRaised(reason(error)) from error
        finally:
            if seeded:  # what runs after a forward, its backward first of all, meets another state each time
                torch.manual_seed(self.seed + 1 + self.calls.forward)

    def _filled(self, leaves: Sequence[Tensor], others: Mapping[int, Tensor]) -> list[Any]:
        given = {**others, **dict(zip(self.where, leaves, strict=True))}
        return [given.get(i, x) for i, x in enumerate(self.flat)]

    def _invoke(self, flat: list[Any], func: Callable[..., Any] | None = None) -> Any:
        args, kwargs = pytree.tree_unflatten(flat[: self._arguments], self._spec)
        if func is not None or self._module is None:
            return (func or self.func)(*args, **kwargs)
        state = dict(zip(self._tensors, flat[self._arguments :], strict=True))
        return torch.func.functional_call(self._module, state, args, kwargs)

    def bare(self) -> Callable[[Sequence[Tensor]], Any]:
        """Return the function of the leaves alone, with nothing of ours around it that a tracer would meet."""

        def run(leaves: Sequence[Tensor]) -> Any:
            return self._invoke(self._filled(leaves, {}))

        return run

    def in_mode(self, training: bool) -> "Case":
        """Return the case of the same Module in train or eval mode."""
        other = self.variant(lambda t: t)
        other._module = copy.deepcopy(self._module)  # noqa: SLF001  # another of this class
        if other._module is not None:  # noqa: SLF001
            other._module.train(training)  # noqa: SLF001
        return other

    def forward_of(self, module: nn.Module) -> list[Tensor]:
        """Return the outputs of ``module``, with its own parameters, on the sample."""
        flat = self._filled(self.fresh(), {})[: self._arguments]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        return tensors_in(module(*args, **kwargs))

    def forward(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the output tensors that require grad on the sample."""
        outputs = tensors_in(self.call(leaves))
        return tuple(outputs[i] for i in self.differentiable)

    def backward(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        *,
        retain_graph: bool = False,
        create_graph: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return the gradient of every leaf, zeros where there is none.

        Raises:
            BackwardRaised: From whatever the function's backward raised.
        """
        self.calls.backward += 1
        pairs = [
            (y, v)
            for y, v in zip(outputs, cotangents, strict=True)
            if v is not None and y.requires_grad
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        try:
            grads = torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [v for _, v in pairs],
                retain_graph=retain_graph or create_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        except Exception as error:
            raise BackwardRaised(reason(error)) from error
        given = iter(grads)
        full = [next(given) if leaf.requires_grad else None for leaf in leaves]
        return tuple(
            torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, full, strict=True)
        )

    def vjp(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Forward and backward on the sample."""
        leaves = self.fresh()
        return self.backward(self.forward(leaves), leaves, cotangents)

    def vjps(self, several: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor, ...]]:
        """One forward, several backwards; a forward each where the graph can be run once only."""
        leaves = self.fresh()
        outputs = self.forward(leaves)
        found = [self.backward(outputs, leaves, several[0], retain_graph=True)]
        for cotangents in several[1:]:
            try:
                found.append(self.backward(outputs, leaves, cotangents, retain_graph=True))
            except BackwardRaised:  # noqa: PERF203
                found.append(self.vjp(cotangents))
        return found

    # ------------------------------------------------------------------------ what is trusted
    @cached_property
    def differentiable(self) -> tuple[int, ...]:
        """Which outputs require grad, by position; an input is copied first for a function that writes in it."""
        try:
            outputs = tensors_in(self.call(self.fresh()))
        except ForwardRaised as error:
            if "leaf Variable" not in str(error.__cause__):
                raise
            self.copies_leaves = True
            outputs = tensors_in(self.call(self.fresh()))
        self.all_outputs = [y.detach() for y in outputs]
        return tuple(i for i, y in enumerate(outputs) if y.requires_grad)

    @cached_property
    def plain(self) -> Plain:
        """One forward, one backward with a random signed, contiguous grad_output."""
        leaves = self.fresh()
        outputs = self.forward(leaves)
        cotangents = self.cotangents(outputs, "plain")
        grads = self.backward(outputs, leaves, cotangents)
        return Plain(tuple(y.detach() for y in outputs), cotangents, grads)

    @cached_property
    def draws(self) -> bool:
        """Whether forward draws from torch's random numbers."""
        torch.manual_seed(self.seed)
        before = torch.get_rng_state()
        self.call(self.fresh(), seeded=False)
        return not torch.equal(before, torch.get_rng_state())

    @cached_property
    def steady(self) -> bool:
        """Whether forward gives the same values twice, but for rounding."""
        again = self.forward(self.fresh())
        return all(
            torch.allclose(a, b, rtol=1e3 * self.epsilon, atol=1e3 * self.epsilon, equal_nan=True)
            for a, b in zip(again, self.plain.outputs, strict=True)
        )

    @cached_property
    def epsilon(self) -> float:
        """Precision the function works in: that of its outputs, or float32's where they hold no more bits."""
        eps = torch.finfo(torch.float64).eps
        for y in self.plain.outputs:
            eps = max(eps, torch.finfo(y.dtype).eps)
            real = torch.view_as_real(y) if y.is_complex() else y
            whole = real.numel() == 0 or bool((real == real.round()).all())
            if (
                real.dtype == torch.float64
                and not whole
                and torch.equal(real, real.float().double())
            ):
                eps = max(eps, torch.finfo(torch.float32).eps)
        return eps

    # ------------------------------------------------------------------------- random numbers
    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator that depends on the seed and on ``purpose`` only."""
        return torch.Generator().manual_seed(self.seed + zlib.crc32(purpose.encode()))

    def cotangents(self, outputs: Sequence[Tensor], purpose: str) -> tuple[Tensor, ...]:
        """Return a random grad_output for each output."""
        generator = self.generator(purpose)
        return tuple(signed_like(y, generator) for y in outputs)


def build(
    func: Callable[..., Any],
    inputs: object,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> tuple[Case, Case]:
    """Return the case to check, in float64 where the function accepts that, and the case as given."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, (tuple, list)):
        inputs = (inputs,)
    given = Case(func, inputs, kwargs, seed=seed, options=options)
    case = given.variant(double, parameters=True)
    if all(a.dtype == b.dtype for a, b in zip(case.leaves, given.leaves, strict=True)):
        return given, given
    try:
        _ = case.differentiable
    except ForwardRaised:  # whatever it is, the sample as given decides
        return given, given
    return case, given


def double(t: Tensor) -> Tensor:
    """Return a floating-point or complex tensor in double precision."""
    return t.to(_DOUBLE.get(t.dtype, t.dtype))


def signed_like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Return values of both signs, none near 0: |v| is in [0.5, 1.5). They hide nothing by being small."""

    def draw() -> Tensor:
        r = torch.rand(t.shape, generator=generator, dtype=torch.float64)
        sign = torch.randint(2, t.shape, generator=generator) * 2 - 1
        return sign * (r + 0.5)

    value = torch.complex(draw(), draw()) if t.is_complex() else draw()
    return value.to(device=t.device, dtype=t.dtype)


def tensors_in(structure: object) -> list[Tensor]:
    """Return the tensors of a nested structure, in order."""
    return [x for x in pytree.tree_leaves(structure) if isinstance(x, Tensor)]


def name_of(func: object) -> str:
    """Return how a person would call ``func``."""
    owner = getattr(func, "__self__", None)  # Function.apply is a bound method of the class
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.{getattr(func, '__name__', 'apply')}"
    name = getattr(func, "__qualname__", None) or type(func).__name__
    return name.rpartition("<locals>.")[2].removeprefix("_VariableFunctionsClass.")


def reason(error: BaseException) -> str:
    """Return an exception in one line."""
    if isinstance(error, (BackwardRaised, ForwardRaised)):
        return str(error)
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:200].rstrip(": ")


def is_deliberate(error: BaseException) -> bool:
    """Whether ``error`` was meant: NotImplementedError, or a ``raise`` written outside of torch."""
    if isinstance(error, NotImplementedError) or "once_differentiable" in str(error):
        return True
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code.co_filename.startswith(_TORCH):
        return False
    code = last.tb_frame.f_code
    return any(
        i.opname == "RAISE_VARARGS" and i.offset == last.tb_lasti
        for i in dis.get_instructions(code)
    )


def _is_differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _path(keys: Sequence[Any]) -> str:
    part, first, *rest = keys
    tail = pytree.keystr(tuple(rest))
    if getattr(part, "idx", 0) == 1:
        return f"argument {getattr(first, 'key', first)}{tail}"
    return f"input {getattr(first, 'idx', first)}{tail}"
