"""How the outputs of torch's own cheap ops are made again, by the names of their nodes in autograd's graph.

A node of torch's keeps its attributes under ``_saved_<name>``. A rule reads them, and names the operands: by what the
node saves them as, or, where it doesn't, by the edge they came along. Such a node was made after autocast's casts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["DEAR", "OVER", "RULES", "VIEWS", "Operand"]

aten = torch.ops.aten


class Operand(NamedTuple):
    """An operand of a node: the edge it came along, and the name it is saved under, if it is."""

    edge: int
    saved: str | None = None


Operands = Sequence[Operand] | Callable[[Any], Sequence[Operand]] | None


class Output(Protocol):
    """What is known of a node's output."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it was."""
        ...


class Rule(NamedTuple):
    """How the output of a kind of node is made again.

    Attributes:
        read: Called with the node, and what is known of the output; gives what makes the output from the operands, or
            ``None`` if that can't be told.
        operands: Of the call, in order, or what tells them from the node; ``None``: one along each edge.
        may_write: Whether the op has an in-place form, into its first operand, with the same node.
        flops: Floating-point operations of the call, from the node and the output; ``None`` where it is cheap.
    """

    read: Callable[[Any, Output], Callable[..., Tensor] | None]
    operands: "Operands"
    may_write: bool = False
    flops: Callable[[Any, Tensor], int] | None = None


def _unary(call: Callable[..., Tensor], *attributes: str) -> Rule:
    """Return the rule of an op of one tensor, which its node saves, and attributes that are named alike."""

    def read(node: Any, _: Output) -> Callable[..., Tensor]:
        values = [getattr(node, f"_saved_{name}") for name in attributes]
        return lambda x: call(x, *values)

    return Rule(read, (Operand(0, "self"),))


def _always(call: Callable[..., Tensor]) -> Callable[[Any, Output], Callable[..., Tensor]]:
    return lambda _node, _output: call


def _with_alpha(call: Callable[..., Tensor]) -> Rule:
    def read(node: Any, _: Output) -> Callable[..., Tensor]:
        return call if node._saved_alpha == 1 else partial(call, alpha=node._saved_alpha)

    return Rule(read, (Operand(0), Operand(1)), may_write=True)


def _cat(node: Any, _: Output) -> Callable[..., Tensor]:
    dim = node._saved_dim
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim  # a negative one reads as unsigned
    return lambda *tensors: torch.cat(tensors, dim)


def _cast(_: Any, output: Output) -> Callable[..., Tensor]:
    dtype, device = output.dtype, output.device
    return lambda x: x.to(device, dtype)


def _gelu(node: Any, _: Output) -> Callable[..., Tensor]:
    return partial(aten.gelu, approximate=node._saved_approximate)


# Nodes whose output is a view of their input.
VIEWS = {
    f"{name}Backward0"
    for name in (
        *(
            "Alias",
            "AsStrided",
            "Diagonal",
            "Expand",
            "Narrow",
            "Permute",
            "ReshapeAlias",
            "Select",
        ),
        *("Slice", "Split", "SplitWithSizes", "Squeeze", "T", "Transpose", "Unbind", "Unfold"),
        *("UnsafeSplit", "UnsafeView", "Unsqueeze", "View"),
    )
} | {"SqueezeBackward1", "SqueezeBackward2"}

_of_result = (Operand(0),)
_of_both = (Operand(0, "self"), Operand(1, "other"))

RULES = {
    "AddBackward0": _with_alpha(torch.add),
    "SubBackward0": _with_alpha(torch.sub),
    "NegBackward0": Rule(_always(torch.neg), _of_result),
    "MulBackward0": Rule(_always(torch.mul), _of_both),
    "DivBackward0": Rule(_always(torch.div), _of_both),
    "CatBackward0": Rule(_cat, None),
    "ToCopyBackward0": Rule(_cast, _of_result),
    "GeluBackward0": Rule(_gelu, (Operand(0, "self"),)),
    "SiluBackward0": _unary(aten.silu),
    "MishBackward0": _unary(aten.mish),
    "LeakyReluBackward0": _unary(aten.leaky_relu, "negative_slope"),
    "HardswishBackward0": _unary(aten.hardswish),
    "HardsigmoidBackward0": _unary(aten.hardsigmoid),
    "SoftplusBackward0": _unary(aten.softplus, "beta", "threshold"),
    "EluBackward0": _unary(aten.elu, "alpha", "scale", "input_scale"),
    "PowBackward0": _unary(aten.pow.Tensor_Scalar, "exponent"),
    "ReluBackward0": Rule(_always(torch.relu), _of_result),
    "SigmoidBackward0": Rule(_always(torch.sigmoid), _of_result),
    "TanhBackward0": Rule(_always(torch.tanh), _of_result),
}

# What writes a call's output over its first argument.
OVER = {
    torch.add: Tensor.add_,
    torch.sub: Tensor.sub_,
    torch.mul: Tensor.mul_,
    torch.div: Tensor.div_,
    torch.neg: Tensor.neg_,
    torch.relu: Tensor.relu_,
    torch.sigmoid: Tensor.sigmoid_,
    torch.tanh: Tensor.tanh_,
}


# ------------------------------------------------------------------------------------------------ dear ones


def _convolution(node: Any, _: Output) -> Callable[..., Tensor]:
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    more = (node._saved_transposed, node._saved_output_padding, node._saved_groups)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return aten.convolution(x, weight, bias, stride, padding, dilation, *more)

    return call


def _of_convolution(node: Any) -> Sequence[Operand]:
    bias = (Operand(2),) if any(node._saved_bias_sym_sizes_opt or ()) else ()
    return (Operand(0, "input"), Operand(1, "weight"), *bias)


def _convolution_flops(node: Any, output: Tensor) -> int:
    weight = node._saved_weight  # (O, I / groups, *), transposed (I, O / groups, *)
    if not node._saved_transposed:
        return 2 * output.numel() * weight[0].numel()
    per_output = weight.shape[0] // node._saved_groups
    for stride, size in zip(node._saved_stride, weight.shape[2:], strict=True):
        per_output = per_output * size // stride
    return 2 * output.numel() * per_output


def _attention(kernel: Callable[..., Any], *before: object) -> Rule:
    """Return the rule of an attention without mask and dropout; ``before``: what a kernel takes behind q, k, v."""

    def read(node: Any, _: Output) -> Callable[..., Any] | None:
        masks = (getattr(node, f"_saved_{name}", None) for name in ("attn_mask", "attn_bias"))
        if node._saved_dropout_p or any(mask is not None for mask in masks):
            return None
        causal, scale = node._saved_is_causal, node._saved_scale
        return lambda q, k, v: kernel(q, k, v, *before, 0.0, causal, scale=scale)

    operands = (Operand(0, "query"), Operand(1, "key"), Operand(2, "value"))
    return Rule(read, operands, flops=_attention_flops)


def _attention_flops(node: Any, output: Tensor) -> int:
    return 4 * output.numel() * output.shape[-2] // (1 + node._saved_is_causal)


def _product_flops(_: Any, output: Tensor) -> int:
    return 2 * output.numel() * output.shape[-1]


_of_product = (Operand(0, "self"), Operand(1, "mat2"))

DEAR = {
    "ConvolutionBackward0": Rule(_convolution, _of_convolution, flops=_convolution_flops),
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention(
        aten._scaled_dot_product_flash_attention_for_cpu
    ),
    "ScaledDotProductFlashAttentionBackward0": _attention(aten._scaled_dot_product_flash_attention),
    "ScaledDotProductEfficientAttentionBackward0": _attention(
        aten._scaled_dot_product_efficient_attention, None, True
    ),
    "ScaledDotProductCudnnAttentionBackward0": _attention(
        aten._scaled_dot_product_cudnn_attention, None, True
    ),
    "MmBackward0": Rule(_always(torch.mm), _of_product, flops=_product_flops),
    "BmmBackward0": Rule(_always(torch.bmm), _of_product, flops=_product_flops),
}
