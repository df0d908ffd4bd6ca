"""Gradient noise scale B_simple = S / |G|², in samples, with a 90 % interval: value, low, high.

From the first of K micro-batches of b samples and the whole step of B = K·b, or under DDP from the
batches of K ranks before the reduction and after it, by their mean gradients:
|G|² = (B |g_B|² − b |g_b|²) / (B − b) and S = (|g_b|² − |g_B|²) / (1/b − 1/B) have the right
expectations; each is averaged over up to 256 readings, and then divided. The interval is that of a ratio of
means, by the delta method; high is inf where |G|² can't be told from 0.

Sources: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training", 2018,
arXiv:1812.06162.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from torchbp.monitor._diagnosis import Reading
from torchbp.monitor._quantity import Quantity

__all__ = ["QUANTITY"]

_HISTORY, _LEAST, _Z = 256, 20, 1.645


def finish(reading: Reading) -> NDArray[np.float64] | None:
    """Add this step's pair; None before there are 20."""
    values, whole = reading.values, reading.values.get("gradient_norm")
    pairs = reading.memory.setdefault("pairs", deque(maxlen=_HISTORY))
    if whole is None or "batch" not in values:
        return None
    if not values.keys() & {"local_square", "first_square"}:
        return None
    square, micro = float(np.square(whole).sum()), float(values["backwards"][0])
    b = float(values["batch"][0])
    if (
        "local_square" in values
    ):  # DDP has averaged over ranks; each rank's micro-batches are summed
        batches, b = float(values["ranks"][0]), b * micro
        small, total = float(values["local_square"][0]), square
    else:
        batches, small, total = micro, float(values["first_square"][0]), square / micro**2
    if not np.isfinite(small + total) or batches < 2:
        return None
    signal = (batches * total - small) / (batches - 1)
    noise = (small - total) / (1 / b - 1 / (b * batches))
    pairs.append((noise, signal))
    if len(pairs) < _LEAST or not reading.sampled:
        return None
    noises, signals = np.array(pairs).T
    count, power = len(pairs), signals.mean()
    if power <= _Z * signals.std(ddof=1) / np.sqrt(count):
        low = noises.mean() / (power + _Z * signals.std(ddof=1) / np.sqrt(count))
        return np.array([np.inf, max(low, 0.0), np.inf])
    value = noises.mean() / power
    error = _Z * (noises - value * signals).std(ddof=1) / (np.sqrt(count) * power)
    return np.array([value, max(value - error, 0.0), value + error])


QUANTITY = Quantity(
    name="noise_scale",
    title="gradient noise scale, with its 90 % interval",
    unit="samples",
    axis="estimate",
    at="derived",
    finish=finish,
    looks_back=True,
    logarithm=True,
)
