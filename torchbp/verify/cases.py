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

__all__ = ["BackwardRaised", "Case", "Plain", "build", "is_deliberate", "reason"]

_DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
_TORCH = str(Path(torch.__file__).parent)


class BackwardRaised(Exception):  # noqa: N818  # carries the user's exception to the driver
    """The backward of the function under test raised; ``__cause__`` is what."""


@dataclass(frozen=True)
class Plain:
    """Forward and backward as everybody runs them: what other ways of running are compared with."""

    outputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


class Case:
    """A function, its differentiable leaves, and everything else it is called with.

    Attributes:
        name: How the function is called in reports.
        leaves: The differentiable tensors, detached: inputs in order, then a Module's parameters.
        names: One name a leaf: ``input 0``, ``input 1['w']``, ``parameter weight``.
        differentiable: Which outputs require a gradient, by position among the output tensors.
        forwards: Forward calls made so far.
        backwards: Backward calls made so far.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str = "",
        seed: int = 0,
        double: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name or name_of(func)
        self.seed = seed
        self.double = double
        self.options = dict(options or {})
        self.forwards = self.backwards = 0
        self.original = (func, inputs, kwargs)
        flat, self._spec = pytree.tree_flatten((tuple(inputs), dict(kwargs or {})))
        paths = [
            _path(keys)
            for keys, _ in pytree.tree_flatten_with_path((tuple(inputs), dict(kwargs or {})))[0]
        ]
        self._flat = [self._cast(x) for x in flat]
        self._where = [i for i, x in enumerate(flat) if _is_differentiable(x)]
        self.names = [paths[i] for i in self._where]
        self.leaves = [self._flat[i] for i in self._where]
        self.requires_copy = False
        self._module(func)
        if not self.leaves:
            raise ValueError(
                "gradcheck: expected an input that requires grad, got none; "
                "pass floating-point or complex tensors with requires_grad=True"
            )

    def _module(self, func: Callable[..., Any]) -> None:
        self._parameters: list[str] = []
        self._buffers: dict[str, Tensor] = {}
        if not isinstance(func, nn.Module):
            self.func = lambda _, *args, **kwargs: func(*args, **kwargs)
            return
        module = copy.deepcopy(func)
        self._buffers = {n: self._cast(b) for n, b in module.named_buffers()}
        frozen = {}
        for n, p in module.named_parameters():
            if p.requires_grad:
                self._parameters.append(n)
                self.names.append(f"parameter {n}")
                self.leaves.append(self._cast(p))
            else:
                frozen[n] = self._cast(p)

        def call(parameters: Sequence[Tensor], *args: object, **kwargs: object) -> object:
            buffers = {n: b.clone() for n, b in self._buffers.items()}
            named = dict(zip(self._parameters, parameters, strict=True))
            return torch.func.functional_call(module, {**buffers, **frozen, **named}, args, kwargs)

        self.module = module
        self.func = call

    def _cast(self, x: object) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        return x.to(_DOUBLE.get(x.dtype, x.dtype)) if self.double else x

    # ------------------------------------------------------------------------------- calling
    def fresh(self) -> list[Tensor]:
        """Return new leaves that require grad."""
        return [leaf.clone().requires_grad_() for leaf in self.leaves]

    def call(self, leaves: Sequence[Tensor], *, seeded: bool = True) -> object:
        """Call the function on ``leaves``; every call draws the same random numbers."""
        self.forwards += 1
        flat = list(self._flat)
        if self.requires_copy:
            leaves = [leaf.clone() for leaf in leaves]
        for i, leaf in zip(self._where, leaves, strict=False):
            flat[i] = leaf
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        if seeded:
            torch.manual_seed(self.seed)
        try:
            return self.func(leaves[len(self._where) :], *args, **kwargs)
        finally:
            if seeded:  # what runs after a forward, its backward first of all, meets another state each time
                torch.manual_seed(self.seed + self.forwards)

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
        self.backwards += 1
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

    # ------------------------------------------------------------------------ what is trusted
    @cached_property
    def differentiable(self) -> tuple[int, ...]:
        """Which outputs require grad, by position; an input is copied first for a function that writes in it."""
        try:
            outputs = tensors_in(self.call(self.fresh()))
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
            self.requires_copy = True
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
    def epsilon(self) -> float:
        """Precision the function works in: that of its outputs, or float32's where they hold no more bits."""
        eps = 0.0
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
) -> Case:
    """Return the case in float64; in the sample's own precision where the function refuses float64."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, (tuple, list)):
        inputs = (inputs,)
    case = Case(func, inputs, kwargs, seed=seed, options=options)
    native = Case(func, inputs, kwargs, seed=seed, options=options, double=False)
    if all(a.dtype == b.dtype for a, b in zip(case.leaves, native.leaves, strict=True)):
        return case
    try:
        _ = case.differentiable
    except Exception:  # whatever it is, the sample as given decides
        return native
    return case


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
