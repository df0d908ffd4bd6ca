"""tanh of many elements by oneDNN, which torch brings along: in a third of the time that torch's own kernel takes.

A million float32 take 0.85 ms by it, two copies included, and 2.7 ms by torch's, on one thread of an AMD EPYC with
AVX-512. On Intel's own processors torch's takes 0.4: there it is MKL's, which knows them by name. oneDNN's error
is 1.2 ulps at most (0.25 in the mean), torch's 0.5 (0.25); ±0, ±∞, NaN and subnormal numbers are right, and the bits
do not depend on where an element stands, nor on the threads. So ``lean`` makes the same output again.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_compiling

__all__ = ["TORCHS_IS_FAST", "tanh"]

_MANY = 1 << 14  # elements; for fewer the copies' calls cost more
_TENSORS = (Tensor, nn.Parameter)


def _is_intels() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()[:1000]


TORCHS_IS_FAST = torch.backends.mkl.is_available() and _is_intels()
_AT_HAND = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    and not TORCHS_IS_FAST
)


def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent, for the inside of a Function: what autograd would have to follow is torch's.

    Args:
        x: Any shape and dtype; large float32 tensors on the CPU go to oneDNN where nothing traces, transforms or
            looks at single calls.
    """
    if (
        not _AT_HAND
        or is_compiling()
        or type(x) not in _TENSORS
        or x.numel() < _MANY
        or x.dtype != torch.float32
        or transforms_active()
        or not x.is_cpu
        or not x.is_contiguous()
        or _len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch.is_grad_enabled()
    ):
        return torch.tanh(x)
    flat = x.detach().view(-1)  # oneDNN's tensors have five dimensions at most
    return flat.to_mkldnn().tanh_().to_dense().view(x.shape)
