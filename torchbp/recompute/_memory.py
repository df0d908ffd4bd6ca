"""memory(): what a step keeps for backward, by layer and op: as torch, converted, and lean."""

import copy
import gc
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from torchbp import swap
from torchbp._random import forked
from torchbp.ops._errors import wrong
from torchbp.recompute._layer import RunningLayer
from torchbp.recompute._lean import lean, lean_scope, revert
from torchbp.recompute._live import Live, Storage, storages
from torchbp.recompute._memory_table import table

__all__ = ["Memory", "Usage", "memory"]


@dataclass(frozen=True)
class Usage:
    """What one way of running the step takes, beyond parameters, buffers and inputs.

    Attributes:
        kept: What is alive between forward and backward, kept for backward: one entry a storage.
        peak: The most bytes that were alive at once in the whole step: activations, temporaries, gradients.
        flops: Floating-point operations of the step's matrix products, convolutions and attention.
    """

    kept: tuple[Storage, ...]
    peak: int
    flops: int

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for backward."""
        return sum(s.nbytes for s in self.kept)


@dataclass(frozen=True)
class Memory:
    """What :func:`memory` found. ``print`` it.

    Attributes:
        ways: Name of the way -> what it takes.
        parameters: Bytes of parameters and buffers.
        inputs: Bytes of the inputs.
        groups: Name of a layer -> that of all layers like it, ``blocks.*.norm`` say.
    """

    ways: dict[str, Usage]
    parameters: int
    inputs: int
    groups: dict[str, str]

    def rows(self, each: bool = True) -> dict[tuple[str, str], dict[str, int]]:
        """Return the bytes kept by (layer, op) and way, in the order of the forward.

        Args:
            each: Whether the layers of ``blocks.0`` and ``blocks.1`` are apart, not one row ``blocks.*``.
        """
        found: dict[str, dict[str, Counter[str]]] = {}
        for way, usage in self.ways.items():
            for s in filter(lambda s: s.nbytes, usage.kept):
                layer = s.layer if each else self.groups.get(s.layer, s.layer)
                found.setdefault(layer, {}).setdefault(s.op, Counter())[way] += s.nbytes
        return {(layer, op): dict(c) for layer, ops in found.items() for op, c in ops.items()}

    def table(self, each: bool = False) -> str:
        """Return the report for a terminal: a table, the sums, a bar for each way.

        Args:
            each: As in :meth:`rows`.
        """
        return table(self, each)

    def to_json(self) -> str:
        """Return everything as JSON; sizes in bytes."""
        rows = [
            {"layer": layer, "op": op, "kept": kept} for (layer, op), kept in self.rows().items()
        ]
        ways = {
            way: {"kept": u.kept_bytes, "peak": u.peak, "flops": u.flops}
            for way, u in self.ways.items()
        }
        about = {"parameters": self.parameters, "inputs": self.inputs, "ways": ways, "rows": rows}
        return json.dumps(about, indent=1)

    def __str__(self) -> str:
        return self.table()


def memory(
    model_or_fn: Callable[..., Any],
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    budgets: Sequence[float] = (),
    **kwargs: Any,
) -> Memory:
    """Measure what one step keeps for backward and its peak: by layer and op, as torch, as torchbp, and lean.

    The step is a forward and a backward. Kept is what is alive between the two, by distinct storages; each counts where
    it was made: the layer that was running, and the op. Parameters, buffers and inputs are apart. Nothing is changed:
    a copy of the model runs, and the random state is put back.

    Args:
        model_or_fn: A model, which runs reverted ("torch"), converted ("torchbp") and ``lean``; or a function, which
            runs as it is ("plain") and in a ``lean_scope``.
        inputs: Its arguments. Tensors are copied.
        loss: Gives the scalar to differentiate from the output; the sum of the output's tensors by default.
        budgets: The model runs ``lean`` within each of these, too: the curve of bytes against operations.
        kwargs: Its keyword arguments.

    Returns:
        The report; ``print`` it. It has ``rows()``, ``to_json()``, and ``ways`` with bytes.

    Raises:
        TypeError: ``model_or_fn`` cannot be called.
        ValueError: Nothing in the output requires grad, the loss is no scalar, or a function has ``budgets``.

    Example:
        >>> import torch, torchbp
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> report = torchbp.memory(model, torch.randn(256, 64))
        >>> {way: usage.kept_bytes for way, usage in report.ways.items()}
        {'torch': 131072, 'torchbp': 131072, 'lean': 65536}
    """
    if not callable(model_or_fn):
        rule = "a model or a function"
        raise TypeError(wrong("memory", rule, type(model_or_fn).__name__, "pass the model itself"))
    ways: dict[str, Usage] = {}
    model = model_or_fn if isinstance(model_or_fn, nn.Module) else None
    arguments = (inputs, kwargs)
    if model is not None:
        changes: dict[str, Callable[[nn.Module], nn.Module]] = {
            "torch": revert,
            "torchbp": _converted,
            "lean": lean,
            **{f"lean {b:g}": partial(lean, budget=b) for b in budgets},
        }
        for way, change in changes.items():
            changed = change(copy.deepcopy(model))
            if way not in ("torch", "torchbp", "lean"):  # its first forward measures
                _step(changed, changed, arguments, loss)
            ways[way] = _step(changed, changed, arguments, loss)
            del changed
    elif budgets:
        rule = "a model where there are budgets"
        raise ValueError(wrong("memory", rule, "a function", "a lean_scope has no budget"))
    else:
        ways["plain"] = _step(model_or_fn, None, arguments, loss)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "lean_scope:"
            )  # that it let nothing go: the report says it
            ways["lean_scope"] = _step(model_or_fn, None, arguments, loss, lean_scope)
    state = [] if model is None else [*model.parameters(), *model.buffers()]
    groups = {} if model is None else _groups(model)
    return Memory(ways, _bytes(state), _bytes(_tensors(arguments)), groups)


def _groups(model: nn.Module) -> dict[str, str]:
    """Return each layer's name with ``*`` for the number of a block: of a numbered module that has modules inside."""
    groups = {"": ""}
    for name, module in model.named_modules():
        head, dot, last = name.rpartition(".")
        numbered = last.isdigit() and next(module.children(), None) is not None
        groups[name] = groups[head] + dot + ("*" if numbered else last)
    return groups


def _converted(model: nn.Module) -> nn.Module:
    return swap.convert(revert(model))


def _step(
    function: Callable[..., Any],
    model: nn.Module | None,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    loss: Callable[[Any], Tensor] | None,
    scope: Callable[[], Any] = nullcontext,
) -> Usage:
    args, kwargs = tree_map(lambda t: _copied(t) if isinstance(t, Tensor) else t, arguments)
    state = [] if model is None else [*model.parameters(), *model.buffers()]
    if model is not None:
        model.zero_grad()
    running = RunningLayer(model)
    live = Live(running.name, [*state, *_tensors((args, kwargs))])
    with _random_state(state), torch.enable_grad(), running.watched(), live:
        with scope():
            output = function(*args, **kwargs)
            value = _summed(output) if loss is None else loss(output)
        _check(value)
        del output
        gc.collect()
        its_own = {key for key, _ in storages(value)}
        kept = tuple(s for key, s in live.alive() if key not in its_own)
        if model is not None:
            value.backward()
        else:  # of somebody's parameters: no .grad is written
            torch.autograd.grad(value, _leaves(value))
    return Usage(kept, live.peak, live.flops)


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def _summed(output: Any) -> Tensor:
    parts = [t.sum() for t in _tensors(output) if t.requires_grad]
    if not parts:
        rule = "an output that requires grad"
        raise ValueError(wrong("memory", rule, "none", "nothing is kept without; check the inputs"))
    return torch.stack([p.to(parts[0].dtype) for p in parts]).sum() if parts[1:] else parts[0]


def _check(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        rule = "a scalar loss that requires grad"
        raise ValueError(wrong("memory", rule, got, "let loss= reduce the output"))


def _leaves(value: Tensor) -> list[Tensor]:
    """Return every tensor whose ``.grad`` a backward would write."""
    leaves, seen, open_nodes = [], set(), [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)  # pyright: ignore[reportAttributeAccessIssue]
        open_nodes += [following for following, _ in node.next_functions]
    return leaves


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_iter(values) if isinstance(t, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    return sum({key: s.nbytes() for t in tensors for key, s in storages(t)}.values())


@contextmanager
def _random_state(state: list[Tensor]) -> Iterator[None]:
    devices = {t.device for t in state if t.device.type not in {"cpu", "cuda"}}
    with ExitStack() as stack:
        stack.enter_context(forked())
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        yield
