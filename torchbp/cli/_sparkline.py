"""Sparklines: a row of blocks for a row of numbers."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: NDArray[np.float32]) -> list[str]:
    """Return a line for each column of ``values``, all on one logarithmic scale.

    Args:
        values: float32 ``(steps, lines)``, not negative.

    Returns:
        One string a line: a block a value, ``·`` for 0, ``!`` for inf and NaN, ``?`` for absent.

    Example:
        >>> import numpy as np
        >>> sparkline(np.array([[1e-8, 0.0], [1e-5, 1.0], [1.0, np.inf]], np.float32))
        ['▁▄█', '·█!']
    """
    from torchbp.tensorboard import is_absent

    absent = is_absent(np.ascontiguousarray(values))
    finite = np.isfinite(values) & (values > 0)
    logs = np.log10(np.where(finite, values, 1), dtype=np.float64)
    low, high = (logs[finite].min(), logs[finite].max()) if finite.any() else (0.0, 0.0)
    top = len(_BLOCKS) - 1
    heights = np.rint((logs - low) / max(high - low, 1e-9) * top).clip(0, top).astype(int)
    lines = []
    for column in range(values.shape[1]):
        letters = (
            _BLOCKS[height] if good else "?" if gone else "·" if value == 0 else "!"
            for value, good, gone, height in zip(
                *(part[:, column] for part in (values, finite, absent, heights)), strict=True
            )
        )
        lines.append("".join(letters))
    return lines
