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
from torchbp.monitor._row import Row

__all__ = ["Sums", "harvest", "reduced"]

Vector = NDArray[np.float64]


@dataclass
class Sums:
    """One row on the host, in the order of registration.

    Attributes:
        row: Where it comes from, for its step and time.
        parameters: By quantity, sums ``(P,)``.
        layers: By quantity, sums and numbers of elements ``(L,)``.
        host: The host's numbers.
    """

    row: Row
    parameters: dict[str, Vector] = field(default_factory=dict)
    layers: dict[str, tuple[Vector, Vector]] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)


def harvest(rows: Sequence[Row], parameters: int, layers: int) -> Callable[[], list[Sums]]:
    """Start the copy of ``rows``; the function that is returned waits for it.

    Args:
        rows: The rows.
        parameters: Number of parameters P.
        layers: Number of layers L.
    """
    tensors = [tensor for row in rows for tensor in _tensors(row)]
    shapes = [(tensor.device, tensor.numel()) for tensor in tensors]
    devices = dict.fromkeys(device for device, _ in shapes)
    waits = {device: _send([t for t in tensors if t.device == device]) for device in devices}

    def receive() -> list[Sums]:
        parts: dict[torch.device, Iterator[Vector]] = {}
        for device, wait in waits.items():
            ends = np.cumsum([n for d, n in shapes if d == device])
            parts[device] = iter(np.split(wait(), ends[:-1]))
        values = (next(parts[device]) for device, _ in shapes)
        return [_fill(row, values, parameters, layers) for row in rows]

    return receive


def _tensors(row: Row) -> Iterator[Tensor]:
    """Yield the tensors of a row; :func:`_fill` takes them in the same order."""
    for pieces in (*row.parameters.values(), *row.earlier):
        for _, values in pieces:
            yield values
    for places in row.layers.values():
        for parts in places.values():
            for total, _, _ in parts:
                yield total
    yield from _host_tensors(row)


def _host_tensors(row: Row) -> Iterator[Tensor]:
    for value in (row.scale, *row.host.values()):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                yield item


def _fill(row: Row, values: Iterator[Vector], parameters: int, layers: int) -> Sums:
    sums = Sums(row)
    for name, pieces in row.parameters.items():
        sums.parameters[name] = _scattered(pieces, values, parameters)
    earlier = [_scattered(pieces, values, parameters) for pieces in row.earlier]
    for name, places in row.layers.items():
        total, count, power = np.zeros(layers), np.zeros(layers), all_quantities()[name].power
        for place, parts in places.items():
            for _, factor, size in parts:
                total[place] += (factor * next(values)[0]) ** power
                count[place] += size
        sums.layers[name] = (total, count)
    scale = 1.0 if row.scale is None else float(next(values)[0])
    for name, value in row.host.items():
        items = value if isinstance(value, list) else [value]
        numbers = [float(next(values)[0]) if isinstance(v, Tensor) else float(v) for v in items]
        sums.host[name] = np.array(numbers)
    _unscale(sums, scale)
    _look_back(sums, earlier)
    row.parameters, row.layers, row.earlier = {}, {}, []  # let the device's memory go
    return sums


def _scattered(pieces: Any, values: Iterator[Vector], size: int) -> Vector:
    vector = np.zeros(size)
    for indices, _ in pieces:
        vector[list(indices)] = next(values)
    return vector


def _unscale(sums: Sums, scale: float) -> None:
    """Divide out what a GradScaler multiplied the loss by; the sums are of squares."""
    for name in ("gradient_norm",):
        if name in sums.parameters:
            sums.parameters[name] /= scale**2
    if "error_signal" in sums.layers:
        total, count = sums.layers["error_signal"]
        sums.layers["error_signal"] = (total / scale**2, count)


def _look_back(sums: Sums, earlier: list[Vector]) -> None:
    """Keep what the first micro-batch had; count the backward passes a GradScaler threw away."""
    skipped = sum(not np.isfinite(vector).all() for vector in earlier)
    if earlier and not skipped:
        sums.host["first_square"] = np.array([earlier[0].sum()])
    found_inf = sums.host.pop("found_inf", None)
    if found_inf is not None and found_inf[0]:
        skipped += 1
        sums.parameters.clear()
        sums.layers.clear()
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
        parts = [np.array([sums.row.step, sums.row.step**2], float)]
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
        pieces = iter(np.split(whole[2:], np.cumsum(sizes)[:-1]))
        here = {name: next(pieces) for name in of_parameters}
        there = {name: (next(pieces), next(pieces)) for name in of_layers}
        sums.parameters = {n: here[n] for n in sums.parameters if agreed}
        sums.layers = {n: v for n, v in there.items() if agreed and v[1].any()}
    return rows
