"""A drain: rows of sums on devices become tables of numbers on the host.

One copy a device and dtype, asynchronous on CUDA. Over several ranks one all_reduce: every rank adds its
shards and its part of the batch; what all ranks hold alike, one of them adds. Each row carries its
step: one that the ranks don't agree on is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchbp.monitor._quantity import precise
from torchbp.monitor._registry import all_quantities
from torchbp.monitor._row import Pieces, Row

__all__ = ["Sums", "harvest", "reduced", "without_skipped"]

Vector = NDArray[np.float64]
Table = NDArray[np.float64]


@dataclass
class Sums:
    """R rows that hold the same quantities, on the host and in the order of registration.

    Attributes:
        rows: Where they come from, for their steps and times.
        places: Where each stood among the rows of the drain.
        parameters: By quantity, sums ``(R, P)``.
        layers: By quantity, sums and numbers of elements ``(R, L)``.
        times: For each row, by layer, norms of what came back to it at each time step ``(T,)``.
        host: The host's numbers ``(R, n)``.
        scale: What the loss was multiplied by, ``(R,)``; 0 without a GradScaler.
    """

    rows: list[Row]
    places: list[int]
    parameters: dict[str, Table] = field(default_factory=dict)
    layers: dict[str, tuple[Table, Table]] = field(default_factory=dict)
    times: list[list[tuple[int, Vector]]] = field(default_factory=list)
    host: dict[str, Table] = field(default_factory=dict)
    scale: Vector = field(default_factory=lambda: np.zeros(0))

    def part(self, chosen: NDArray[np.bool_]) -> "Sums":
        """Return some of the rows."""
        which = np.flatnonzero(chosen)
        return Sums(
            [self.rows[k] for k in which],
            [self.places[k] for k in which],
            {name: table[which] for name, table in self.parameters.items()},
            {name: (total[which], count[which]) for name, (total, count) in self.layers.items()},
            [self.times[k] for k in which],
            {name: table[which] for name, table in self.host.items()},
            self.scale[which],
        )


def harvest(
    rows: Sequence[Row],
    parameters: int,
    layers: int,
    *,
    apart: bool = False,
    streams: bool = False,
) -> Callable[[], list[Sums]]:
    """Start the copy of ``rows``; the function that is returned waits for it.

    Args:
        rows: The rows.
        parameters: Number of parameters P.
        layers: Number of layers L.
        apart: Leave every row of a backward by itself, to be summed over ranks.
        streams: They may have been made in another stream of a GPU than the one that is current now.
    """
    sent: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in (value for row in rows for value in _values(row)):
        if isinstance(value, Tensor):
            sent.setdefault((value.device, value.dtype), []).append(value)
    if streams:
        for device in {device for device, _ in sent if device.type == "cuda"}:
            torch.cuda.synchronize(device)
    waits = {kind: _send(found) for kind, found in sent.items()}
    kinds: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        kinds.setdefault(place if apart and row.backwards else row.kind, []).append(place)

    def receive() -> list[Sums]:
        arrived: dict[int, Vector] = {}
        for kind, wait in waits.items():
            ends = np.cumsum([t.numel() for t in sent[kind]])
            parts = np.split(wait(), ends[:-1])
            arrived.update(zip(map(id, sent[kind]), parts, strict=True))

        def take(value: Any) -> Any:
            return arrived[id(value)] if isinstance(value, Tensor) else value

        return [
            _filled([rows[i] for i in places], places, take, parameters, layers)
            for places in kinds.values()
        ]

    return receive


def _values(row: Row) -> Iterator[Any]:
    """Yield what a row holds, tensors and numbers."""
    for pieces in (*row.parameters.values(), *row.earlier, row.unreduced):
        for _, values in pieces:
            yield values
    for parts in row.layers.values():
        for _, values, _, counts in parts:
            yield values
            yield counts
    for _, values in row.times:
        yield values
    yield row.scale
    for value in row.host.values():
        yield from value if isinstance(value, list) else (value,)


def _filled(
    rows: list[Row],
    places: list[int],
    take: Callable[[Any], Any],
    parameters: int,
    layers: int,
) -> Sums:
    quantities, sums, first = all_quantities(), Sums(rows, places), rows[0]
    for name in first.parameters:
        table = _scattered([row.parameters[name] for row in rows], take, parameters)
        sums.parameters[name] = table * table if quantities[name].power == 2 else table
    for name in first.layers:
        pairs = [_joined(row.layers[name], take, quantities[name].power, layers) for row in rows]
        totals, counts = zip(*pairs, strict=True)
        sums.layers[name] = np.stack(totals), np.stack(counts)
    sums.times = [
        [(place, np.asarray(take(values), np.float64)) for place, values in row.times]
        for row in rows
    ]
    for name, value in first.host.items():
        if isinstance(value, list):
            numbers = [[_number(take(item)) for item in row.host[name]] for row in rows]
        else:
            numbers = [[_number(take(row.host[name]))] for row in rows]
        sums.host[name] = np.array(numbers)
    scales = [0.0 if row.scale is None else _number(take(row.scale)) for row in rows]
    sums.scale = np.array(scales)
    scale = np.where(sums.scale, sums.scale, 1.0)
    _unscale(sums, scale[:, None])
    _look_back(sums, take, parameters)
    if first.unreduced:
        unreduced = _scattered([row.unreduced for row in rows], take, parameters)
        sums.host["local_square"] = np.square(unreduced / scale[:, None]).sum(1, keepdims=True)
    # Let the memory go.
    for row in rows:
        row.parameters, row.layers, row.times, row.earlier, row.unreduced = {}, {}, [], [], []
        row.host, row.scale = dict.fromkeys(row.host), None
    return sums


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, np.ndarray) else value)


def _scattered(rows: Sequence[Pieces], take: Callable[[Any], Any], size: int) -> Table:
    """Return ``(R, size)``. All rows have pieces of the same indices."""
    table = np.zeros((len(rows), size))
    for k, (indices, _) in enumerate(rows[0]):
        table[:, list(indices)] = [take(pieces[k][1]) for pieces in rows]
    return table


def _joined(
    parts: Sequence[Any], take: Callable[[Any], Any], power: int, layers: int
) -> tuple[Vector, Vector]:
    columns: Any = zip(*((p, take(v), f, take(n)) for p, v, f, n in parts), strict=True)
    places, values, factors, counts = map(np.concatenate, columns)
    totals = np.multiply(values, factors, dtype=np.float64) ** power
    total, count = (np.bincount(places, w, layers).astype(float) for w in (totals, counts))
    return total, count


def _unscale(sums: Sums, scale: Table) -> None:
    """Divide out what a GradScaler multiplied the loss by, ``(R, 1)``; the sums are of squares."""
    if (scale == 1).all():
        return
    if "gradient_norm" in sums.parameters:
        sums.parameters["gradient_norm"] /= scale**2
    if "error_signal" in sums.layers:
        total, count = sums.layers["error_signal"]
        sums.layers["error_signal"] = (total / scale**2, count)
    sums.times = [
        [(place, values / divisor) for place, values in times]
        for times, divisor in zip(sums.times, scale[:, 0], strict=True)
    ]


def _look_back(sums: Sums, take: Callable[[Any], Any], parameters: int) -> None:
    """Keep what the first micro-batch had; count the backward passes a GradScaler threw away.

    A row of several, or one that may have been skipped, stands apart.
    """
    skipped = 0
    if earlier := sums.rows[0].earlier:
        norms = [_scattered([pieces], take, parameters)[0] for pieces in earlier]
        skipped = sum(not np.isfinite(vector).all() for vector in norms)
        if not skipped:
            sums.host["first_square"] = np.square(norms[:1]).sum(1, keepdims=True)
    sums.host["skipped"] = np.full((len(sums.rows), 1), float(skipped))


def without_skipped(found: Sequence[Sums]) -> list[Sums]:
    """Return ``found``, what the skipped steps would have been made with left out.

    A GradScaler skips the optimizers whose gradients are not finite: a fused one inside its step, one of
    several while others step. That is how it finds a scale, and no trouble. Below 1 it is: "something is
    likely wrong" (torch.amp.GradScaler.update).
    """
    parts: list[Sums] = []
    for sums in found:
        norms = sums.parameters.get("gradient_norm", np.zeros((len(sums.rows), 1)))
        skipped = (sums.scale >= 1) & ~np.isfinite(norms).all(1)
        if not skipped.any():
            parts.append(sums)
            continue
        parts.append(sums.part(~skipped))
        gone = sums.part(skipped)
        gone.parameters, gone.layers, gone.times = {}, {}, [[] for _ in gone.rows]
        gone.host["skipped"] += 1
        parts.append(gone)
    return [sums for sums in parts if sums.rows]


def _send(tensors: list[Tensor]) -> Callable[[], Vector]:
    """Start the copy of tensors of one device and dtype; the function that is returned waits for it."""
    joined = torch.cat([t.detach().reshape(-1) for t in tensors])
    joined = joined.to(precise(joined))
    if joined.device.type != "cuda":
        host = joined.cpu()
        return lambda: host.double().numpy()
    pinned = torch.empty(joined.shape, dtype=joined.dtype, device="cpu", pin_memory=True)
    pinned.copy_(joined, non_blocking=True)
    event = torch.cuda.Event(blocking=True)  # to sleep, and not to turn in a loop beside training
    # The stream of the tensor's device: the current one may be another.
    event.record(torch.cuda.current_stream(joined.device))

    def wait() -> Vector:
        event.synchronize()
        return pinned.double().numpy()

    return wait


def reduced(
    found: list[Sums],
    mine: NDArray[np.bool_],
    layers: int,
    device: torch.device,
    votes: Sequence[float],
) -> Vector:
    """Sum ``found``, one row each, over all ranks by one all_reduce; return the sums of ``votes``.

    Args:
        found: This rank's rows. All ranks call this with equally many.
        mine: bool ``(P,)``: the parameters whose sums this rank adds.
        layers: Number of layers L.
        device: Where the process group works.
        votes: At most three numbers of this rank.
    """
    of_parameters = [q.name for q in all_quantities().values() if q.axis == "parameter"]
    of_layers = [q.name for q in all_quantities().values() if q.axis == "layer"]
    zeros = np.zeros((1, len(mine))), np.zeros((1, layers))
    table = []
    for sums in found:
        local = sums.host.get("local_square", np.full((1, 1), np.nan))
        step = float(sums.rows[0].step)
        parts = [np.array([[step, step**2]]), local]
        parts += [np.where(mine, sums.parameters.get(n, zeros[0]), 0) for n in of_parameters]
        for name in of_layers:
            parts += sums.layers.get(name, (zeros[1], zeros[1]))
        table.append(np.concatenate(parts, axis=1))
    ballot = np.zeros((1, table[0].shape[1] if table else len(votes)))
    ballot[0, : len(votes)] = votes
    tensor = torch.from_numpy(np.concatenate([*table, ballot])).to(device)
    torch.distributed.all_reduce(tensor)
    ranks = torch.distributed.get_world_size()
    *wholes, ballots = tensor.cpu().numpy()[:, None]
    for sums, whole in zip(found, wholes, strict=True):
        step = sums.rows[0].step
        agreed = whole[0, 0] == ranks * step and whole[0, 1] == ranks * step**2
        sizes = [len(mine)] * len(of_parameters) + [layers] * (2 * len(of_layers))
        pieces = iter(np.split(whole[:, 3:], np.cumsum(sizes)[:-1], axis=1))
        here = {name: next(pieces) for name in of_parameters}
        there = {name: (next(pieces), next(pieces)) for name in of_layers}
        sums.host.pop("first_square", None)  # of micro-batches of one rank, and the sum of all
        if "local_square" in sums.host:
            sums.host["local_square"] = whole[:, 2:3] / ranks
        sums.host["ranks"] = np.array([[float(ranks)]])
        sums.parameters = {n: here[n] for n in sums.parameters if agreed}
        sums.layers = {n: v for n, v in there.items() if agreed and v[1].any()}
    return ballots[0, : len(votes)]
