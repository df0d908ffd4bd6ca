"""Finds how a tensor is made again, from the node of autograd's graph that made it.

Two kinds of nodes tell: those of torchbp's ops by the note they carry, those of torch's own cheap ops by what they
save (_torch.py). A tensor that a node saves is found among the saved; another, an operand, along the edge to its own
node. Of an operand there is no tensor to look at, so that it was not written to meanwhile must be known: from a version
that an op of ours has noted, from the witness of the node that made it, or, of a leaf, from its version as the scope
was opened.
"""

from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from torchbp.ops import _recipe
from torchbp.ops._recipe import Edge, Note, Saved
from torchbp.recompute._budget import Forward
from torchbp.recompute._kept import Kept, Made, Recipe, Share
from torchbp.recompute._leaves import is_as_read
from torchbp.recompute._torch import DEAR, OVER, RULES, VIEWS, Operand

__all__ = ["kept_or_share"]

# Below this, what is kept weighs less than the recipe.
small = 16 << 10

# No chain takes more calls than this: what they make is there at once. Residual networks would reach from end to end.
longest = 8

_KEY = "torchbp"  # in the metadata of torch's own nodes
_DENSE = (Tensor, nn.Parameter)


class Reading(NamedTuple):
    """What a tensor was when an op read it."""

    version: int
    storage: int
    dtype: torch.dtype
    device: torch.device

    def is_of(self, version: int, storage: int) -> bool:
        """Whether it was this version of what stands there."""
        return self[:2] == (version, storage)


def kept_or_share(t: Tensor, forward: Forward | None = None) -> Kept | Share:
    """Return what is kept for ``t``, which a node wants to save: a share of what can be made again, or ``t`` itself.

    Args:
        t: Whatever autograd saves.
        forward: Says which of the outputs that are dear to make again are let go; ``None`` for none.
    """
    if type(t) not in _DENSE:
        return _as_it_is(t)
    node = t.grad_fn
    if node is None or t.layout is not torch.strided or t.is_nested:
        kept = Kept(t, itself=type(t) is nn.Parameter)
        if forward is not None and not t.requires_grad and t.layout is torch.strided:
            forward.keep(kept)  # a mask, say
        return kept
    if t.numel() * t.element_size() < small:
        return Kept(t)
    base = t
    if t._is_view():
        node, base = _whole(t)
    item = _output(node, base, forward)
    if isinstance(item, Kept):
        return item if base is t else Kept(t, item)
    if t.dtype == base.dtype and not t.is_neg() and not t.is_conj():
        return Share(item, t, checked=True)
    return Kept(t)


def _whole(t: Tensor) -> tuple[Any, Tensor]:
    """Return the output that the view ``t`` is of, and its node; where that can't be told, ``t`` and its own."""
    base = t._base
    if base is not None and base.grad_fn is not None:
        return base.grad_fn, base
    # A Function's output that is a view of what it made inside, as F.linear gives it for three dimensions.
    node: Any = t.grad_fn
    while type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    note = _note(node)
    if note is None or node is t.grad_fn or note.storage != t.untyped_storage()._cdata:
        return t.grad_fn, t
    return node, t.detach().as_strided(*note.geometry)


def _as_it_is(t: Tensor) -> Kept:
    with torch._C.DisableTorchFunctionSubclass():
        return Kept(t)


def _output(node: Any, base: Tensor, forward: Forward | None) -> Made | Kept:
    """Return how ``base``, the output of ``node``, is made again; itself if it can't be, or isn't worth it."""
    found = _registered(node, base.output_nr)
    if found is not None and found.untouched():
        return found
    item = None if found is not None else _made(node, base, forward)
    if item is None:
        item = Kept(base)
        if forward is not None:
            forward.keep(item)
    _register(node, item, base.output_nr)
    return item


def _made(node: Any, base: Tensor, forward: Forward | None) -> Made | None:
    if (
        forward is None
        and type(node).__name__ not in RULES
        and not isinstance(node, BackwardCFunction)
    ):
        return None
    storage = base.untyped_storage()
    if storage.nbytes() != base.numel() * base.element_size():
        return None  # holes, or a part of something larger
    reading = Reading(base._version, storage._cdata, base.dtype, base.device)
    how = _how(node, base.output_nr, reading, base)
    if how is None or how[0].steps > longest:
        if forward is None:
            return None
        how = how or _how(node, base.output_nr, reading, base, forward)
        if how is None or not forward.drops(how[0], base):
            return None
        how[0].steps = 0  # chains count from here, as where it is kept
    made = Made(base, *how)
    if forward is not None:
        forward.make(made)
    return made


def _how(
    node: Any, nr: int, reading: Reading | None, output: Tensor | None, dear: Forward | None = None
) -> tuple[Recipe, Tensor | None] | None:
    """Return how output ``nr`` of ``node`` is made again, and its witness if there is one.

    Args:
        node: Of the graph.
        nr: Which output; ops of several are known by their first.
        reading: The version and storage it had when it was read; ``None`` where nobody noted them.
        output: The tensor itself, where it is at hand.
        dear: That in which it, and operands that nobody keeps, may be dear to make again; ``None`` where they may not.
    """
    note = _note(node)
    if note is None:
        found = None
        if nr == 0 and reading is not None:
            found = _of_torch(node, reading, output, dear)
        return None if found is None else (found, None)
    if nr or note.arguments is None or (note.flops and dear is None):
        return None
    if reading is None and note.witness._version != note.version:
        return None
    if reading is not None and not reading.is_of(note.version, note.storage):
        return None
    parts = _arguments(node, note.arguments, dear)
    if parts is None or not _last(parts):
        return None
    args = (note.again, tuple(parts), note.autocast, note.device, note.flops, note.over)
    return Recipe(*args), note.witness


def _of_torch(
    node: Any, reading: Reading, output: Tensor | None, dear: Forward | None
) -> Recipe | None:
    """Return how the output of a node of torch's own is made again."""
    name = type(node).__name__
    rule = RULES.get(name)
    if rule is None and dear is not None:
        rule = DEAR.get(name)
    if rule is None:
        return None
    first = None
    if reading.version:
        # Written to since it was made; all is well if by the op itself, as `x += y` does to its first operand.
        if reading.version > 1 or not rule.may_write:
            return None
        first = reading._replace(version=reading.version - 1)
    call = rule.read(node, reading)
    if call is None:
        return None
    operands = rule.operands(node) if callable(rule.operands) else rule.operands
    operands = operands or [Operand(i) for i in range(len(node.next_functions))]
    parts: list[Any] = []
    for operand in operands:
        part = _operand(node, operand, first, dear)
        if part is None:
            return None
        parts.append(part)
        first = None
    if not _last(parts):
        return None
    flops = 0 if rule.flops is None or output is None else rule.flops(node, output)
    return Recipe(call, tuple(parts), None, reading.device.type, flops, OVER.get(call))


def _operand(
    node: Any, operand: Operand, reading: Reading | None, dear: Forward | None
) -> Kept | Share | Recipe | None:
    """Return an operand of a node of torch's own, as a part."""
    saved = operand.saved
    part = None if saved is None else _part(getattr(node, f"_raw_saved_{saved}"))
    return _along(node, operand.edge, reading, dear) if part is None else part


def _arguments(node: Any, arguments: tuple[Any, ...], dear: Forward | None) -> list[Any] | None:
    """Return the arguments that a note names, ready for a recipe; ``None`` if one is not there."""
    parts: list[Any] = []
    saved = node._raw_saved_tensors
    for a in arguments:
        part = a
        if type(a) is Saved:
            part = _part(saved[a.place])
        elif type(a) is Edge:
            part = _along(node, a.place, Reading(*a[1:]), dear)
        elif isinstance(a, Tensor):
            part = Kept(a)
        elif a is None:
            parts.append(None)
            continue
        if part is None:
            return None
        parts.append(part)
    return parts


def _along(
    node: Any, place: int, reading: Reading | None, dear: Forward | None
) -> Kept | Share | Recipe | None:
    """Return the operand that came along an edge, as a part."""
    source, nr = node.next_functions[place]
    if source is None:
        return None
    if type(source).__name__ == "AccumulateGrad":
        leaf = source.variable
        if reading is None:
            same = is_as_read(leaf, node, dear is not None and dear.measures)
        else:
            same = reading.is_of(leaf._version, leaf.untyped_storage()._cdata)
        return Kept(leaf) if same else None
    found = _registered(source, nr)
    if found is None:
        how = _how(source, nr, reading, None, dear)
        return None if how is None else how[0]
    if reading is None:
        as_read = found.untouched()
    else:
        as_read = found.version is not None and reading.is_of(found.version, found.storage)
    if not as_read:
        return None
    return Share(found, None, checked=False) if isinstance(found, Made) else found


def _part(saved: Any) -> Kept | Share | None:
    """Return what a node keeps for a saved tensor, as a part; ``None`` if it saved it outside, or under other hooks."""
    data = saved.data
    if type(data) is Kept or type(data) is Share:
        return data.part()
    if type(data) is Tensor and not (data.dim() or data._version or data.is_complex()):
        return Kept(data)  # a number, which autograd shows to no hooks
    return None


def _last(parts: list[Any]) -> bool:
    """Whether the parts are there in backward, whenever it is.

    FSDP frees the memory of parameters after forward, and gathers them again for their own layer's backward: too late
    for the layer behind it, which asks for its input first. The small ones were copied as they were noted.
    """
    return not (_recipe.sharded and any(type(p) is Kept and p.parameter for p in parts))


def _note(node: Any) -> Note | None:
    if not isinstance(node, BackwardCFunction):
        return None
    note = getattr(node, "note", None)
    return note if type(note) is Note else None


def _registered(node: Any, nr: int) -> Kept | Made | None:
    """Return what is kept for an output of ``node``, if somebody saved it, and it is still there."""
    if nr:
        return None
    if isinstance(node, BackwardCFunction):
        note = _note(node)
        item = None if note is None else note.item
    else:
        item = node.metadata.get(_KEY)
    return None if item is None else item()


def _register(node: Any, item: Kept | Made, nr: int) -> None:
    if nr:
        return
    if not isinstance(node, BackwardCFunction):
        node.metadata[_KEY] = ref(item)
    elif (note := _note(node)) is not None:
        note.item = ref(item)
