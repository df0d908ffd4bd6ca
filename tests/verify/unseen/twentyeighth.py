"""Twenty-eighth set: solvers, geometry, graphs, statistics, finance, signals, physics and special functions.

Hand-written derivatives as they stand in scientific and graphics code, each with one fault, in the manner of a mutation
benchmark. `trigger` says where the fault shows. Facts, neither code nor sentences, were taken from these reports: a
rotation beyond the trace's branch (kornia 1653), atoms that fall on atoms (Curt-Park/rainbow-is-all-you-need 76),
actions that are not legal (trl 7251), the axis of a fisheye lens (momentum 1013).
"""

from functools import partial

import torch

from tests.verify.unseen import TWENTYEIGHTH, twentieth
from tests.verify.unseen.twentieth import check, finite, indices, same, sized
from tests.verify.unseen.twentyfirst import positive
from tests.verify.unseen.twentysecond import read

__all__ = [
    "add",
    "add_bare",
    "check",
    "finite",
    "indices",
    "logarithm_ratio",
    "one_dtype",
    "positive",
    "read",
    "regular",
    "same",
    "sized",
]

add = partial(twentieth.add, into=TWENTYEIGHTH, ending="28")
add_bare = partial(twentieth.add_bare, into=TWENTYEIGHTH, ending="28")


def one_dtype(*tensors):
    """Refuse tensors of several dtypes, and half types."""
    dtypes = {t.dtype for t in tensors}
    wide = (torch.float32, torch.float64, torch.complex64, torch.complex128)
    if len(dtypes) > 1 or dtypes - set(wide):
        raise TypeError(f"expected tensors of one dtype, single or double, got {dtypes}")


def regular(matrix):
    """Refuse a matrix that is singular, or nearly so."""
    worst = 1e-2 / torch.finfo(matrix.dtype).eps
    check(bool(torch.linalg.cond(matrix) < worst), "expected a regular system")


def logarithm_ratio(u):
    """log(1 + u) / u with its limit 1 at 0, smooth to any order."""
    small = u.abs() < 0.05
    near = torch.where(small, u, 0)
    series = torch.zeros_like(u)
    for k in reversed(range(16)):
        series = series * near + (-1) ** k / (k + 1)
    far = torch.where(small, 1, u)
    return torch.where(small, series, torch.log1p(far) / far)
