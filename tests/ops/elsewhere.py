"""Every op on a device that has no kernels: ``python -m tests.ops.elsewhere first`` prints what mixes devices or looks.

The device is a backend of Python alone, whose tensors are fake: of a shape, a dtype and a place. An operation on two
places raises, and so does whoever asks for a value, for which a real device would have to be waited for. What torch's
own function asks for, too, is left out. In a process of its own: a backend cannot be taken back.
"""

import logging
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from torchbp.ops import _function
from torchbp.ops._function import formula_only
from torchbp.ops._op import all_ops
from torchbp.ops._samples import Make, Sample, one_tensor

MANY = 1 << 13  # elements; more than every "few"
LOOKS = dict.fromkeys(("DataDependentOutputException", "DynamicOutputShapeException"), "looks")


def mixes(input):
    return input * torch.ones(input.shape)


def looks(input):
    return input if input.sum() > 0 else -input


def planted(function):
    return SimpleNamespace(
        name=function.__name__,
        function=function,
        torchs=torch.nn.functional.relu,
        samples=lambda make: [Sample((make.normal(3),))],
        benchmark=lambda make, n: Sample((make.normal(n),)),
    )


def run(function, sample: Sample, backward: bool) -> None:
    live = [t for t in sample.tensors() if t.requires_grad]
    y = one_tensor(function(*sample.args, **sample.kwargs))
    if y.requires_grad and backward:
        torch.autograd.grad(y, live, torch.ones_like(y), allow_unused=True)


def fault(function, sample: Sample, backward: bool = True) -> str | None:
    """Return what ``function`` raises on fakes of the sample that are elsewhere, or ``None``."""
    mode = FakeTensorMode()

    def placed(t: Tensor) -> Tensor:
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="elsewhere")
        return made.requires_grad_(t.requires_grad)

    try:
        with mode:
            run(function, sample.over_tensors(placed), backward)
    except Exception as error:
        return type(error).__name__
    return None


def faults(op, some: slice, ways):
    """Yield what goes wrong with one op and not with torch's."""
    for dtype in (torch.float32, torch.bfloat16):
        samples = list(op.samples(Make(dtype)))[some]
        if dtype == torch.float32:
            samples.append(op.benchmark(Make(dtype), MANY))
        for sample in samples:
            for way in ways:
                with way():
                    message = fault(op.function, sample)
                if message in (None, "NotImplementedError"):  # a kernel without a fake twin
                    continue
                theirs = None if op.torchs is None else fault(op.torchs, sample, backward=False)
                if LOOKS.get(message, message) != LOOKS.get(theirs, theirs):
                    yield f"{op.name} {sample.name} {dtype} {way.__name__}: {message}, {theirs}"


def main(samples: str) -> None:
    logging.disable()  # torch's own account of each error
    _setup_privateuseone_for_python_backend("elsewhere")
    _function._is_fake = lambda: False  # kernels, as on a real device: not what a compiler gets
    which, ways = {
        "first": (slice(1), [nullcontext]),
        "all": (slice(None), [nullcontext, formula_only]),
    }[samples]
    for op in (*all_ops().values(), planted(mixes), planted(looks)):
        for line in faults(op, which, ways):
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the device's thread for backward would abort the interpreter as it is torn down
