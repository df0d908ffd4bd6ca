"""What the recurrent Modules share: checks of arguments, layers, directions, packing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import recorded
from torchbp.ops.dropout.dropout import dropout
from torchbp.ops.recurrent._recurrence import Sizes

__all__ = ["cell", "check_cell", "check_dtypes", "layers"]

# Of each layer and direction; read once, for a parametrization makes each anew.
Weights = Sequence[Sequence[Tensor]]
Layer = Callable[[Tensor, tuple[Any, ...], Sequence[Any], Sizes, bool], tuple[Tensor, ...]]


def check_cell(
    op: str, gates: int, input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> None:
    """Raise, of torch's types, where the tensors of a cell of ``gates`` gates do not fit together."""
    w_ih, w_hh, *biases = weights
    if w_ih is None or w_hh is None:
        raise TypeError(wrong(op, "two weights", None, "only a bias may be left out"))
    for name, t in (("input", input), *((f"state {i}", s) for i, s in enumerate(states))):
        if not isinstance(t, Tensor):
            raise TypeError(wrong(op, f"{name} to be a tensor", type(t).__name__, "pass one"))
        if t.dim() != 2:
            kind = IndexError if t.dim() < 2 else RuntimeError
            raise kind(wrong(op, f"{name} of shape (N, features)", shape(t), "add a dimension N"))
    n, hidden = input.shape[0], w_hh.shape[1]
    for name, t, rule in (
        ("input", input, (n, w_ih.shape[1])),
        *((f"state {i}", s, (n, hidden)) for i, s in enumerate(states)),
        ("w_ih", w_ih, (gates * hidden, w_ih.shape[1])),
        ("w_hh", w_hh, (gates * hidden, hidden)),
        *(("bias", b, (gates * hidden,)) for b in biases if b is not None),
    ):
        if tuple(t.shape) != rule:
            advice = "N sequences, and the features of the weights"
            raise RuntimeError(wrong(op, f"{name} of shape {rule}", shape(t), advice))


def check_dtypes(op: str, input: Tensor, weights: Sequence[Tensor | None]) -> None:
    """Raise where a weight has another dtype than the rows it meets; half precision would hide it."""
    for w in weights:
        if w is not None and w.dtype != input.dtype:
            raise RuntimeError(wrong(op, f"weights of {input.dtype}", w.dtype, "convert one"))


def cell(
    function: Callable[..., Any],
    module: nn.RNNCellBase,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    *,
    states: int,
) -> Any:
    """Run a cell's Module form: states of zeros by default, and input without a batch dimension."""
    if recorded():
        return _as_torchs(module, input, hx)
    if states == 1 and isinstance(hx, (tuple, list)):
        got = type(hx).__name__
        raise AttributeError(wrong(_name(module), "hx to be a tensor", got, "it has no cell state"))
    given = [hx] if isinstance(hx, Tensor) else list(hx or ())
    for what, t in (("input", input), *(("hidden", s) for s in given)):
        if t.dim() not in (1, 2):
            rule = f"{what} of 1 or 2 dimensions"
            advice = "(N, features) or (features,)"
            raise ValueError(wrong(_name(module), rule, t.dim(), advice))
    batched = input.dim() == 2
    rows = input if batched else input.unsqueeze(0)
    if hx is None:
        size = (rows.shape[0], module.hidden_size)
        given = [rows.new_zeros(()).expand(size) for _ in range(states)]
    elif not batched:
        given = [s.unsqueeze(0) for s in given]
    weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    result = function(rows, given if states > 1 else given[0], *weights)
    if batched:
        return result
    return result.squeeze(0) if states == 1 else tuple(s.squeeze(0) for s in result)


def layers(layer: Layer, module: nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any]:
    """Run the Module form of a recurrent op: all its layers and directions.

    Args:
        layer: ``(x, states, weights, sizes, reverse) -> (y, *final states)``, one layer in one direction; the weights
            are W_ih, W_hh, b_ih, b_hh, ``None`` where there is no bias, and what follows.
        module: The constructor's arguments and the parameters are read from it.
        input: A padded batch, one sequence, or a ``PackedSequence``.
        hx: The initial state as the Module takes it: a tensor, a pair for LSTM, or ``None`` for zeros.

    Returns:
        What the Module returns: output, final states.
    """
    if recorded():
        return _as_torchs(module, input, hx)
    if isinstance(input, PackedSequence):
        output, final = _packed(layer, module, input, hx)
    else:
        output, final = _padded(layer, module, input, hx)
    return output, final if isinstance(module, nn.LSTM) else final[0]


def _packed(
    layer: Layer, module: nn.RNNBase, input: PackedSequence, hx: Any
) -> tuple[PackedSequence, tuple[Tensor, ...]]:
    rows, batch_sizes, sorting, unsorting = input
    sizes = tuple(batch_sizes.tolist())
    parameters = module.all_weights
    _check_input(module, rows, parameters, dims=2)
    states = _initial(module, rows, hx, sizes[0], dims=3)
    if sorting is not None:
        states = tuple(s.index_select(1, sorting) for s in states)
    output, final = _stacked(layer, module, parameters, rows, states, sizes)
    if unsorting is not None:
        final = tuple(s.index_select(1, unsorting) for s in final)
    return PackedSequence(output, batch_sizes, sorting, unsorting), final


def _padded(
    layer: Layer, module: nn.RNNBase, input: Tensor, hx: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    dims, batch = input.dim(), 0 if module.batch_first else 1
    if dims not in (2, 3):
        advice = "(L, N, features), or (L, features) for one sequence"
        raise ValueError(wrong(_name(module), "input of 2 or 3 dimensions", dims, advice))
    rows = input if dims == 3 else input.unsqueeze(batch)
    parameters = module.all_weights
    _check_input(module, rows, parameters, dims=3)
    rows = rows.transpose(0, 1) if module.batch_first else rows
    steps, n, features = rows.shape
    states = _initial(module, rows, hx, n, dims=dims)
    if not steps:
        advice = "leave out what is empty"
        raise RuntimeError(wrong(_name(module), "a sequence of at least one step", 0, advice))
    rows = rows.reshape(steps * n, features)
    output, final = _stacked(layer, module, parameters, rows, states, (n,) * steps)
    output = output.view(steps, n, output.shape[-1])
    output = output.transpose(0, 1) if module.batch_first else output
    if dims == 2:
        return output.squeeze(batch), tuple(s.squeeze(1) for s in final)
    return output, final


def _as_torchs(module: nn.Module, *inputs: Any) -> Any:
    """Run torch's own forward, one op for any length: of ours a trace or an export would note so many steps."""
    own = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
    return own.forward(module, *inputs)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _check_input(module: nn.RNNBase, rows: Tensor, parameters: Weights, *, dims: int) -> None:
    """Raise, of torch's types, where the input does not fit the weights."""
    dtype = parameters[0][0].dtype
    if rows.dtype != dtype and not autocasts(rows.device.type):
        advice = f"convert it with .to({dtype}), or the model"
        raise ValueError(wrong(_name(module), f"input of {dtype}", rows.dtype, advice))
    if rows.dim() != dims or rows.shape[-1] != module.input_size:
        rule = f"input of {dims} dimensions, the last of them {module.input_size}"
        raise RuntimeError(wrong(_name(module), rule, shape(rows), "the last holds the features"))


def _initial(module: nn.RNNBase, rows: Tensor, hx: Any, n: int, *, dims: int) -> tuple[Tensor, ...]:
    """Return the states, (layers · directions, N, width) each: those given, checked, or zeros."""
    widths = (module.hidden_size,)
    if isinstance(module, nn.LSTM):
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
    count = module.num_layers * (1 + module.bidirectional)
    if hx is None:
        return tuple(rows.new_zeros(()).expand(count, n, width) for width in widths)
    states = (hx,) if len(widths) == 1 else (hx[0], hx[1])
    for state, width in zip(states, widths, strict=True):
        rule = (count, n, width) if dims == 3 else (count, width)
        if state.dim() != dims or tuple(state.shape) != rule:
            advice = "layers times directions, sequences where the input has several, units"
            raise RuntimeError(wrong(_name(module), f"hx of shape {rule}", shape(state), advice))
    return states if dims == 3 else tuple(s.unsqueeze(1) for s in states)


def _stacked(
    layer: Layer,
    module: nn.RNNBase,
    parameters: Weights,
    rows: Tensor,
    states: tuple[Tensor, ...],
    sizes: Sizes,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run layer upon layer, each in all its directions, with dropout between them."""
    starts = list(zip(*(s.unbind(0) for s in states), strict=True))
    directions, final = 1 + module.bidirectional, []
    for which in range(module.num_layers):
        if which and module.training and module.dropout:
            rows = dropout(rows, module.dropout)
        outputs = []
        for reverse in range(directions):
            k = which * directions + reverse
            weights = parameters[k]
            if not module.bias:
                weights = (*weights[:2], None, None, *weights[2:])
            y, *after = layer(rows, starts[k], weights, sizes, bool(reverse))
            outputs.append(y)
            final.append(after)
        rows = torch.cat(outputs, -1) if module.bidirectional else outputs[0]
    return rows, tuple(torch.stack(s) for s in zip(*final, strict=True))
