"""What the records of the recurrent ops share: the samples of a cell, and what it is compared with."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from torchbp.ops._autocast import autocasts
from torchbp.ops._function import is_half
from torchbp.ops._samples import Make, Sample, over_tensors

__all__ = [
    "cell_benchmark",
    "cell_errors",
    "cell_rounded_once",
    "cell_samples",
    "cell_saved_bytes",
    "layer_samples",
]


def cell_rounded_once(cell: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's cell, in float32 for half precision and rounded at the end: torch rounds each of its steps.

    ``_op.rounded_once`` is of a function of tensors; a cell takes and returns states, which may be tuples.
    """

    def reference(input: Tensor, hx: Any, *weights: Tensor | None, **named: Tensor | None) -> Any:
        if not input.is_cpu and "b_hh" in named and len(weights) == 2:
            # The GPU's fused cells (torch 2.11) leave out b_hh where there is no b_ih.
            named = {"b_ih": torch.zeros_like(named["b_hh"]), **named}  # pyright: ignore[reportArgumentType]
        if not is_half(input) or autocasts(input.device.type):
            return cell(input, hx, *weights, **named)
        args, kwargs = over_tensors(Tensor.float, ((input, hx, *weights), named))
        return over_tensors(lambda y: y.to(input.dtype), cell(*args, **kwargs))

    return reference


def cell_samples(gates: int, states: int) -> Callable[[Make], Iterator[Sample]]:
    """Return the samples of a cell of ``gates`` gates that carries ``states`` states."""

    def samples(make: Make) -> Iterator[Sample]:
        def hx(n: int) -> Any:
            made = tuple(make.normal(n, 2) for _ in range(states))
            return made if states > 1 else made[0]

        def weights(**options: bool) -> tuple[Tensor, ...]:
            shapes = ((gates * 2, 3), (gates * 2, 2), (gates * 2,), (gates * 2,))
            return tuple(make.normal(*s, **options) for s in shapes)

        yield Sample((make.normal(4, 3), hx(4), *weights()), name="4x3")
        b_hh = {"b_hh": weights()[3]}
        yield Sample((make.normal(1, 3), hx(1), *weights()[:2]), b_hh, name="one-bias")
        yield Sample((make.normal(0, 3), hx(0), *weights()[:2]), name="no-rows")
        frozen = weights(requires_grad=False)
        yield Sample((make.normal(4, 3), hx(4), *frozen), name="frozen-weights")
        data = make.normal(4, 3, requires_grad=False)
        yield Sample((data, hx(4), *weights()), name="data-input")

    return samples


def layer_samples(
    make: Make, module: type[nn.RNNBase]
) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    """Yield constructor arguments of a recurrent Module, 3 features to 5 units, with an input for each."""

    def hx(*shape: int) -> Any:
        return (
            (make.normal(*shape), make.normal(*shape))
            if issubclass(module, nn.LSTM)
            else make.normal(*shape)
        )

    x = make.normal(3, 4, 3)
    yield module, Sample((3, 5)), Sample((x, hx(1, 4, 5)), name="states")
    yield module, Sample((3, 5), {"bias": False}), Sample((x,), name="no-bias")
    first = {"batch_first": True}
    yield module, Sample((3, 5), first), Sample((x, hx(1, 3, 5)), name="batch-first")
    yield module, Sample((3, 5)), Sample((make.normal(3, 3), hx(1, 5)), name="one-sequence")
    deep = Sample((3, 5, 2), {"bidirectional": True, "dropout": 0.5})
    yield module, deep, Sample((x[:2], hx(4, 4, 5)), name="layers-directions")
    packed = pack_padded_sequence(x, torch.tensor([1, 3, 2, 2]), enforce_sorted=False)
    yield module, deep, Sample((packed, hx(4, 4, 5)), name="packed")


def cell_errors(gates: int, states: int) -> Callable[[Make], Iterator[Sample]]:
    """Return what no cell of ``gates`` gates and ``states`` states takes."""

    def errors(make: Make) -> Iterator[Sample]:
        def hx(*shape: int) -> Any:
            made = tuple(make.normal(*shape) for _ in range(states))
            return made if states > 1 else made[0]

        x, w_ih, w_hh = make.normal(4, 3), make.normal(gates * 2, 3), make.normal(gates * 2, 2)
        yield Sample((make.normal(4, 2), hx(4, 2), w_ih, w_hh), name="features")
        yield Sample((x, hx(4, 3), w_ih, w_hh), name="hidden-size")
        yield Sample((x, hx(3, 2), w_ih, w_hh), name="batch")
        yield Sample((x, hx(4, 2), w_ih, make.normal(gates * 2 + 1, 2)), name="gates")
        yield Sample((x, hx(4, 2), w_ih, w_hh, make.normal(gates * 2 + 1)), name="bias")
        yield Sample((x.float(), hx(4, 2), w_ih, w_hh), name="dtypes")
        yield Sample((x[0], hx(2), w_ih, w_hh), name="one-dimension")
        yield Sample((x, "text", w_ih, w_hh), name="text")

    return errors


def cell_benchmark(gates: int, states: int) -> Callable[[Make, int], Sample]:
    """Return the benchmark of a cell: rows of up to 128 features, as many units."""

    def benchmark(make: Make, n: int) -> Sample:
        width = min(128, max(8, math.isqrt(n)))
        rows = max(1, n // width)
        made = tuple(make.normal(rows, width) for _ in range(states))
        weights = (make.normal(gates * width, width), make.normal(gates * width, width))
        biases = (make.normal(gates * width), make.normal(gates * width))
        return Sample(
            (make.normal(rows, width), made if states > 1 else made[0], *weights, *biases)
        )

    return benchmark


def cell_saved_bytes(units: int, *, reads_h: bool) -> Callable[..., int]:
    """Return the bytes a cell keeps: what came in, and in full precision ``units`` values a unit of the state.

    Args:
        units: Of the output, the state c, the gates, as kept.
        reads_h: Whether h is kept for more than the gradient of W_hh.
    """

    def saved_bytes(
        x: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> int:
        h, *c = (hx,) if isinstance(hx, Tensor) else hx
        kept = [x, h, *c, w_ih, w_hh, b_ih, b_hh]
        made = 0
        if not is_half(x):
            kept = [
                x if w_ih.requires_grad else None,
                h if w_hh.requires_grad or reads_h else None,
                *c,
                w_ih if x.requires_grad else None,
                w_hh if h.requires_grad else None,
            ]
            made = units * h.numel() * h.element_size()
        return made + sum(t.numel() * t.element_size() for t in kept if t is not None)

    return saved_bytes
