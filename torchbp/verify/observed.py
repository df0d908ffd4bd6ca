"""A second call of the function under test, watched: does it give the same, what does it write to, does it reseed?"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchbp.verify.modules import LEAVES
from torchbp.verify.raised import ForwardRaised
from torchbp.verify.signatures import signature_of
from torchbp.verify.tensors import counts, is_dense, tensors_in

if TYPE_CHECKING:
    from torchbp.verify.cases import Case

__all__ = ["Observed", "Write", "observe"]

DATA = re.compile(r"target|label|truth|mask|weight|logit|predict|quer|^[qkvxyz]$")
OTHER_SEED = 11  # further than the case's own


@dataclass(frozen=True)
class Write:
    """One tensor that forward or backward wrote to, at the first element that changed.

    ``index`` is None where it wrote what was there: a number within the bounds of a clamp; and where it gave the tensor
    another ``shape``. It may be ``meant`` where a state is written to, and no data.
    """

    phase: str
    name: str
    index: tuple[int, ...] | None
    was: float | complex = 0.0
    now: float | complex = 0.0
    shape: str = ""
    meant: bool = False


@dataclass(frozen=True)
class Observed:
    """What the second call gave and did.

    Attributes:
        outputs: As in the first call.
        grads: For the same grad_output.
        writes: What was written to that others hold.
        states: Of the random generators after forward.
        added: Names of what the function holds, to whose ``.grad`` backward wrote.
    """

    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    writes: tuple[Write, ...]
    states: Sequence[Any]
    added: tuple[str, ...] = ()


def observe(case: "Case") -> Observed:
    """Call once more on the sample, and run its backward, with saved tensors in sight where forward allows hooks."""
    try:
        return _observe(case, hooked=True)
    except ForwardRaised:  # torch.func inside of forward refuses saved-tensor hooks
        return _observe(case, hooked=False)


def _observe(case: "Case", *, hooked: bool) -> Observed:
    leaves, fixed, saved = case.fresh(), [], []

    def keep(t: Tensor) -> Tensor:
        fixed.append(t.clone())
        return fixed[-1]

    def pack(t: Tensor) -> Tensor:
        if is_dense(t):
            saved.append(t.detach())
        return t.detach() if t.grad_fn is not None else t

    seed = case.seed if case.draws else case.seed + OTHER_SEED
    new = [t._version for t in leaves]  # noqa: SLF001  # no public way to ask whether it was written to
    if hooked:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = tensors_in(case.call(leaves, seed=seed, fixed=keep))
    else:
        result = tensors_in(case.call(leaves, seed=seed, fixed=keep))
    states = case.states_after
    outputs = tuple(result[i] for i in case.differentiable)
    values = tuple(y.detach().clone() for y in outputs)
    forward = [] if case.copies_leaves else list(zip(case.names, leaves, case.leaves, strict=True))
    kept = [i for i, x in enumerate(case.flat) if isinstance(x, Tensor)]
    constants = [
        (i, (case.name_at[i], t, case.flat[i]))
        for i, t in zip(kept, fixed, strict=False)
        if i < case.size and i not in case.where
    ]
    data = {i for i, (_, t, _) in constants if counts(t)}.union(_data(case))
    writes = [*_changed("forward", forward, new)]
    writes += _changed("forward", [c for i, c in constants if i in data])
    others = _changed("forward", [c for i, c in constants if i not in data])
    writes += [replace(write, meant=True) for write in others]
    v = [t.clone() for t in case.plain.cotangents]
    numbers = [f"grad_output {i}" if len(v) > 1 else "grad_output" for i in range(len(v))]
    backward = [
        *zip(numbers, v, case.plain.cotangents, strict=True),
        *((name, t, t.detach().clone()) for name, t in zip(case.names, leaves, strict=True)),
        *(("an argument", t, t.clone()) for t in fixed),
        *((f"saved tensor {i}", t, t.clone()) for i, t in enumerate(saved)),
    ]
    before = [t._version for _, t, _ in backward]  # noqa: SLF001
    if not case.options.get("check_backward_ad", True):
        return Observed(values, case.plain.grads, tuple(writes), states)
    held = [(name, t, t.grad, _version(t.grad)) for name, t in case.memo.get(LEAVES, ())]
    grads = case.backward(outputs, leaves, v, exposed=True)
    writes += _changed("backward", backward, before)
    added = [name for name, t, g, n in held if t.grad is not g or _version(g) > n]
    return Observed(values, grads, tuple(writes), states, tuple(added))


def _version(t: Tensor | None) -> int:
    return 0 if t is None else t._version  # noqa: SLF001


def _data(case: "Case") -> list[int]:
    """Return the arguments that are data, by their names: not a state or statistics, which forward may be to write."""
    try:
        bound = case.bound(signature_of(case.func)).arguments
    except (TypeError, ValueError):
        return []
    data = {id(x) for name, x in bound.items() if DATA.search(name)}
    return [i for i, t in case.arguments if id(t) in data]


def _changed(
    phase: str, tensors: Sequence[tuple[str, Tensor, Tensor]], versions: Sequence[int | None] = ()
) -> Iterator[Write]:
    known = [*versions, *[None] * len(tensors)]
    for (name, now, before), version in zip(tensors, known, strict=False):
        a, b = now.detach(), before.detach()
        if a.shape != b.shape:
            shape = f", of shape {tuple(b.shape)}, to {tuple(a.shape)}"
            yield Write(phase, name, None, shape=shape)
            continue
        same = (a == b) | ((a != a) & (b != b))  # noqa: PLR0124  # NaN
        if not bool(same.all()):
            at = tuple((~same).nonzero()[0].tolist())
            yield Write(phase, name, at, b[at].item(), a[at].item())
        elif version is not None and now._version > version:  # noqa: SLF001
            yield Write(phase, name, None)
