"""A drain: rows of sums on devices become rows of numbers on the host.

One copy a device, asynchronous on CUDA. Over several ranks one all_reduce: every rank adds its
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

__all__ = ["Sums", "harvest", "reduced"]

Vector = NDArray[np.float64]


@dataclass
class Sums:
    """One row on the host, in the order of registration.

    Attributes:
        row: Where it comes from, for its step and time.
        parameters: By quantity, sums ``(P,)``.
        layers: By quantity, sums and numbers of elements ``(L,)``.
        times: By layer, norms of what came back to it at each time step ``(T,)``.
        host: The host's numbers.
    """

    row: Row
    parameters: dict[str, Vector] = field(default_factory=dict)
    layers: dict[str, tuple[Vector, Vector]] = field(default_factory=dict)
    times: list[tuple[int, Vector]] = field(default_factory=list)
    host: dict[str, Any] = field(default_factory=dict)


def harvest(rows: Sequence[Row], parameters: int, layers: int) -> Callable[[], list[Sums]]:
    """Start the copy of ``rows``; the function that is returned waits for it.

    Args:
        rows: The rows.
        parameters: Number of parameters P.
        layers: Number of layers L.
    """
    tensors = [value for row in rows for value in _values(row) if isinstance(value, Tensor)]
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    waits = {device: _send([t for t in tensors if t.device == device]) for device in devices}
    shapes = [(tensor.device, tensor.numel()) for tensor in tensors]
    del tensors

    def receive() -> list[Sums]:
        parts: dict[torch.device, Iterator[Vector]] = {}
        for device, wait in waits.items():
            ends = np.cumsum([n for d, n in shapes if d == device])
            parts[device] = iter(np.split(wait(), ends[:-1]))
        arrived = (next(parts[device]) for device, _ in shapes)

        def take(value: Any) -> Any:
            return next(arrived) if isinstance(value, Tensor) else value

        return [_fill(row, take, parameters, layers) for row in rows]

    return receive


def _values(row: Row) -> Iterator[Any]:
    """Yield what a row holds, tensors and numbers; :func:`_fill` takes them in the same order."""
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


def _fill(row: Row, take: Callable[[Any], Any], parameters: int, layers: int) -> Sums:
    quantities, sums = all_quantities(), Sums(row)
    for name, pieces in row.parameters.items():
        vector = _scattered(pieces, take, parameters)
        sums.parameters[name] = np.square(vector) if quantities[name].power == 2 else vector
    earlier = [_scattered(pieces, take, parameters) for pieces in row.earlier]
    unreduced = _scattered(row.unreduced, take, parameters) if row.unreduced else None
    for name, parts in row.layers.items():
        columns: Any = zip(*((p, take(v), f, take(n)) for p, v, f, n in parts), strict=True)
        places, values, factors, counts = map(np.concatenate, columns)
        totals = np.multiply(values, factors, dtype=np.float64) ** quantities[name].power
        total, count = (np.bincount(places, w, layers).astype(float) for w in (totals, counts))
        sums.layers[name] = (total, count)
    sums.times = [(place, np.asarray(take(values), np.float64)) for place, values in row.times]
    scale = take(row.scale)
    for name, value in row.host.items():
        items = value if isinstance(value, list) else (value,)
        sums.host[name] = np.array([_number(take(item)) for item in items])
    _unscale(sums, 1.0 if scale is None else _number(scale))
    _look_back(sums, earlier)
    if unreduced is not None:
        divisor = 1.0 if scale is None else _number(scale)
        sums.host["local_square"] = np.array([np.square(unreduced / divisor).sum()])
    # Let the memory go.
    row.parameters, row.layers, row.times, row.earlier, row.unreduced = {}, {}, [], [], []
    return sums


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, np.ndarray) else value)


def _scattered(pieces: Pieces, take: Callable[[Any], Any], size: int) -> Vector:
    if len(pieces) == 1 and len(pieces[0][0]) == size:
        return np.asarray(take(pieces[0][1]), np.float64)
    vector = np.zeros(size)
    for indices, values in pieces:
        vector[list(indices)] = take(values)
    return vector


def _unscale(sums: Sums, scale: float) -> None:
    """Divide out what a GradScaler multiplied the loss by; the sums are of squares."""
    if scale == 1:
        return
    if "gradient_norm" in sums.parameters:
        sums.parameters["gradient_norm"] /= scale**2
    if "error_signal" in sums.layers:
        total, count = sums.layers["error_signal"]
        sums.layers["error_signal"] = (total / scale**2, count)
    sums.times = [(place, values / scale) for place, values in sums.times]


def _look_back(sums: Sums, earlier: list[Vector]) -> None:
    """Keep what the first micro-batch had; count the backward passes a GradScaler threw away."""
    skipped = sum(not np.isfinite(vector).all() for vector in earlier)
    if earlier and not skipped:
        sums.host["first_square"] = np.array([np.square(earlier[0]).sum()])
    found_inf = sums.host.pop("found_inf", None)
    if found_inf is not None and found_inf[0]:
        skipped += 1
        sums.parameters.clear()
        sums.layers.clear()
        sums.times.clear()
    sums.host["skipped"] = np.array([float(skipped)])


def _send(tensors: list[Tensor]) -> Callable[[], Vector]:
    """Start the copy of the tensors of one device; the function that is returned waits for it."""
    joined = torch.cat([t.detach().reshape(-1).to(precise(t)) for t in tensors])
    if joined.device.type != "cuda":
        host = joined.cpu()
        return lambda: host.double().numpy()
    pinned = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
    pinned.copy_(joined, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Vector:
        event.synchronize()
        return pinned.double().numpy()

    return wait


def reduced(
    rows: list[Sums], mine: NDArray[np.bool_], layers: int, device: torch.device
) -> list[Sums]:
    """Return ``rows`` summed over all ranks, by one all_reduce.

    Args:
        rows: This rank's rows. All ranks call this with equally many.
        mine: bool ``(P,)``: the parameters whose sums this rank adds.
        layers: Number of layers L.
        device: Where the process group works.
    """
    of_parameters = [q.name for q in all_quantities().values() if q.axis == "parameter"]
    of_layers = [q.name for q in all_quantities().values() if q.axis == "layer"]
    zeros = np.zeros(len(mine)), np.zeros(layers)
    table = []
    for sums in rows:
        local = sums.host.get("local_square", [np.nan])[0]
        parts = [np.array([sums.row.step, sums.row.step**2, local], float)]
        parts += [np.where(mine, sums.parameters.get(n, zeros[0]), 0) for n in of_parameters]
        for name in of_layers:
            parts += sums.layers.get(name, (zeros[1], zeros[1]))
        table.append(np.concatenate(parts))
    tensor = torch.from_numpy(np.stack(table)).to(device)
    torch.distributed.all_reduce(tensor)
    ranks = torch.distributed.get_world_size()
    for sums, whole in zip(rows, tensor.cpu().numpy(), strict=True):
        agreed = whole[0] == ranks * sums.row.step and whole[1] == ranks * sums.row.step**2
        sizes = [len(mine)] * len(of_parameters) + [layers] * (2 * len(of_layers))
        pieces = iter(np.split(whole[3:], np.cumsum(sizes)[:-1]))
        here = {name: next(pieces) for name in of_parameters}
        there = {name: (next(pieces), next(pieces)) for name in of_layers}
        sums.host.pop("first_square", None)  # of micro-batches of one rank, and the sum of all
        if "local_square" in sums.host:
            sums.host["local_square"] = whole[2:3] / ranks
        sums.host["ranks"] = np.array([float(ranks)])
        sums.parameters = {n: here[n] for n in sums.parameters if agreed}
        sums.layers = {n: v for n, v in there.items() if agreed and v[1].any()}
    return rows
