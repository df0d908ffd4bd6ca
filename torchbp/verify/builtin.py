"""What torch's own functions give instead of a gradient: none on purpose, or one of few bits.

An embedding leaves out the row of its padding. In low precision, on a CPU, some sum over rows in that precision, and
autograd itself adds up in it what a tensor that is read many times is given.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from torchbp.verify.cases import Case
from torchbp.verify.tensors import graph, signed_like

__all__ = ["inexact", "low_sum", "padding", "tangent"]

EMBEDS = "whether the function calls torch's embedding"
INEXACT_OWN = "what of torch in the function has a gradient of a few digits"
PADDED = "EmbeddingBackward"  # begin of its node's name
# What sums over rows in the precision of its input, by the begin of its node's name.
SUMS = {
    "NativeLayerNormBackward": "layer_norm",
    "EmbeddingBackward": "embedding",
}
# What is right to so many digits only, in float64 too: the slope of hardsigmoid is 1 / 6 in float32.
INEXACT = {"HardsigmoidBackward": ("hardsigmoid", 1e-7)}
MANY = 64  # times that a tensor is read: a running sum of so many has lost bits of bfloat16


def padding(case: Case) -> dict[int, Tensor]:
    """Return, by leaf, which of its elements torch's embedding gives no gradient: a flat mask."""
    known = case.given.memo
    if not known.get(EMBEDS, True):
        return {}
    leaves, outputs = case.kept
    nodes = [n for n in _nodes(outputs) if n.name().startswith(PADDED)]
    known[EMBEDS] = bool(nodes)
    found = {}
    for node in nodes:
        row = node._saved_padding_idx  # noqa: SLF001  # the only place where it is to be read
        which = _leaf_behind(node, leaves)
        if which is None or row >= len(leaves[which]):  # none is -1, without its sign
            continue
        rows = torch.zeros(leaves[which].shape, dtype=torch.bool)
        rows[row] = True
        found[which] = rows.reshape(-1)
    return found


def _nodes(outputs: Sequence[Tensor]) -> list[Any]:
    """Return the nodes of torch's own functions."""
    return [node for node in graph(outputs) if _is_torchs(node)]


def _is_torchs(node: Any) -> bool:
    """Whether a node is one of torch's own functions: a Function may have the same name."""
    return not isinstance(node, BackwardCFunction)


def _leaf_behind(node: Any, leaves: Sequence[Tensor]) -> int | None:
    before = node.next_functions[0][0]
    return next((i for i, t in enumerate(leaves) if _accumulates(before, t)), None)


def _accumulates(node: Any, leaf: Tensor) -> bool:
    return getattr(node, "variable", None) is leaf


def tangent(case: Case, generator: torch.Generator) -> list[Tensor]:
    """Return a random tangent for each leaf; 0 for what torch's embedding gives no gradient."""
    u = [signed_like(leaf, generator) for leaf in case.leaves]
    for i, rows in padding(case).items():
        u[i][rows.view(u[i].shape).to(u[i].device)] = 0
    return u


def inexact(case: Case) -> tuple[str, float]:
    """Return what of torch in the function has a gradient of a few digits only, and how far that is off, relatively."""
    if INEXACT_OWN not in case.given.memo:
        names = [node.name() for node in _nodes(case.kept[1])]
        found = [told for begin, told in INEXACT.items() if any(n.startswith(begin) for n in names)]
        case.given.memo[INEXACT_OWN] = found[0] if found else ("", 0.0)
    return case.given.memo[INEXACT_OWN]


def low_sum(case: Case, which: int) -> str:
    """Return what of torch sums the gradient of a leaf in the precision of that leaf; nothing, if other code does."""
    leaves, outputs = case.kept
    readers = [
        node
        for node in graph(outputs)
        for before, _ in node.next_functions
        if _accumulates(before, leaves[which])
    ]
    if len(readers) >= MANY:
        return f"autograd, of a tensor that is read {len(readers)} times,"
    torchs = [
        what
        for node in readers
        for begin, what in SUMS.items()
        if _is_torchs(node) and node.name().startswith(begin)
    ]
    return f"torch's {torchs[0]}" if readers and len(torchs) == len(readers) else ""
