r"""Linear and cross entropy in one: ℓ = -Σ_c v_c log p_c with p = softmax(z), z = x Wᵀ + b, then reduced.

Row n of x (N, D) has the logits z[n] (C,), and the target distribution v[n]: class weights, smoothing and ignored rows
are in it (cross_entropy.py defines them). "softcap" is the activation of that name; "z_loss" is in _z_loss.py. The
logits of some rows at a time are made and used up; all N·C of them, which with their gradient are most of the memory of
a language model's step, never exist.

Derivation, with V = Σ_c v_c, Z = log Σ_c exp(z_c), s and s' the gradients of each ℓ and of each Z²:
    ℓ        = V Z - Σ_c v_c z_c;     grad_z_c = g_c = p_c (s V + 2 s' Z) - s v_c             (1)
    grad_x   = g W                                                                            (2)
    grad_W   = gᵀ x                                                                           (3)
    grad_b   = Σ_n g                                                                          (4)
    softcap, z = c tanh(u / c):  g is multiplied by 1 - (z / c)²                              (5)
    tangent  = Σ_c g_c tangent_u_c with s = 1, where tangent_u is that of x Wᵀ + b            (6)

Saves:
    x, W, b, the target and w, which are there anyway. Where there are many logits, also the gradients for them, made in
    the forward and scaled by the incoming gradient in the backward: (N + C) D elements instead of N C. "none", and few
    logits: the backward makes the logits again. Second derivatives are always those of the formula, from the inputs.

Edge values:
    As in cross entropy: all ignored, or N = 0: the mean is NaN, the gradient 0.   In half precision the logits, the
    loss and every sum are float32, rounded once.

Sources:
    Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv:2410.10989 (the gradient in the
    forward); Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.
    Shards: Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from torchbp.ops._autocast import autocasts
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    eager,
    entry,
    fused,
    in_autocast_dtype,
    plain,
    public,
    visible,
)
from torchbp.ops._op import Op
from torchbp.ops._reduction import named
from torchbp.ops._samples import Make, Sample
from torchbp.ops.linear.linear import linear
from torchbp.ops.losses import _linear_cross_entropy_samples as samples
from torchbp.ops.losses._chunked_logits import chunk_rows
from torchbp.ops.losses._linear_cross_entropy import (
    Settings,
    by_chunks,
    gradient_of_logits,
    of_products,
    values_by_formula,
    wide,
)
from torchbp.ops.losses._linear_cross_entropy_arguments import NAME, check, check_dtypes
from torchbp.ops.losses._linear_cross_entropy_compiled import opaque
from torchbp.ops.losses._linear_cross_entropy_loss import LinearCrossEntropyLoss as TorchsLoss
from torchbp.ops.losses._shards import Shard
from torchbp.ops.losses.cross_entropy import cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearCrossEntropyFunction", "LinearCrossEntropyLoss", "linear_cross_entropy"]

_MANY = 1 << 16  # logits: with fewer, making them again costs no time that one could measure
_of_autograd: Any = getattr(torch._C, "_autograd", None)  # torch's C++ module; private
_keep_graph = getattr(_of_autograd, "_get_current_graph_task_keep_graph", lambda: True)


class TokenLosses(NamedTuple):
    """What :func:`linear_cross_entropy` returns with ``return_tokens=True``; only ``loss`` is differentiable.

    Attributes:
        loss: The loss, reduced.
        values: The loss of each position, the penalty of ``z_loss`` included, in the target's shape.
        predictions: The class of the largest logit of each position, int64.
        accuracy: The share of the positions that count whose prediction is the target's (largest) class.
    """

    loss: Tensor
    values: Tensor
    predictions: Tensor
    accuracy: Tensor


class LinearCrossEntropyFunction(Function):
    """Linear and cross entropy. Call it through :func:`linear_cross_entropy`.

    Outputs: the loss; with "tokens" each position's value and prediction; the gradients of "early". Only the loss is
    differentiable. It is float32 for half precision.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        w: Tensor | None,
        *settings: Any,
    ) -> tuple[Tensor, ...]:  # (N, D), (C, D), (C,), (N,) int64 or (N, C), (C,) -> () or (N,), ...
        given = Settings(*settings)
        if given.group is None and not fused(x, weight, half=True):
            return values_by_formula(x, weight, bias, target, w, given)
        one = torch.ones((), dtype=wide(x), device=x.device) if any(given.early) else None
        made, loss, values = by_chunks(x, weight, bias, target, w, given, one, given.early)
        values = values.clone() if values is loss else values  # two outputs are two tensors
        tokens = (values, made.predictions) if given.tokens else ()
        return tuple(t for t in (loss, *tokens, made.x, made.weight, made.bias) if t is not None)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.given = inputs[:5], Settings(*inputs[5:])
        extras = output[1:]
        early = extras[2:] if ctx.given.tokens else extras
        ctx.extras = len(extras)
        ctx.set_materialize_grads(False)  # they would be zeros of the size of W
        ctx.mark_non_differentiable(*extras)
        ctx.save_for_backward(*tensors, *early)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, w, *early = ctx.saved_tensors
        need, given = ctx.needs_input_grad[:3], ctx.given
        others: list[None] = [None] * (2 + len(Settings._fields))
        if grad is None:
            return None, None, None, *others
        # Under forward-mode AD what was made in the forward has no tangent.
        plain = fused(grad, x, weight, half=True) and forward_ad._current_level < 0
        if early and plain:
            scaled = (_scaled(t, grad, x.dtype) for t in early)
            return *(next(scaled) if made else None for made in given.early), *others
        if given.group is not None and not plain:
            rule = "one backward, without create_graph, where there is a process_group"
            raise RuntimeError(wrong(NAME, rule, "another", "gather the weight first"))
        if plain:
            made = by_chunks(x, weight, bias, target, w, given, grad, need)[0]
            gradients = (made.x, made.weight, made.bias)
            return *(None if t is None else t.to(x.dtype) for t in gradients), *others
        g = gradient_of_logits(x, weight, bias, target, w, grad, given)
        low = g.to(of_products(x))
        grad_x = (low @ weight.to(low.dtype)).to(x.dtype) if need[0] else None  # (2)
        grad_weight = (low.mT @ x.to(low.dtype)).to(weight.dtype) if need[1] else None  # (3)
        grad_bias = g.sum(0).to(x.dtype) if need[2] else None  # (4)
        return grad_x, grad_weight, grad_bias, *others

    @staticmethod
    def jvp(ctx: Context, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.given.group is not None:
            rule = "no forward mode with a process_group"
            raise RuntimeError(wrong(NAME, rule, "a tangent", "gather the weight first"))
        x, weight, bias, target, w = ctx.saved_tensors
        tangent_x, tangent_weight, tangent_bias = tangents[:3]
        given = ctx.given
        one = torch.ones((), dtype=wide(x), device=x.device)
        g = gradient_of_logits(x, weight, bias, target, w, one, given)
        tangent = torch.zeros_like(g)
        if tangent_x is not None:
            tangent = tangent + F.linear(tangent_x, weight)
        if tangent_weight is not None:
            tangent = tangent + F.linear(x, tangent_weight)
        if tangent_bias is not None:
            tangent = tangent + tangent_bias
        product = g * tangent  # (6)
        value = product.sum(1) if given.reduction == "none" else product.sum()
        return value, *((None,) * ctx.extras)


def _scaled(made: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``made`` times ``grad``; written into it where this is its last use, as it may be as large as W."""
    if _keep_graph():  # another backward may follow
        return (made * grad).to(dtype)
    if not (visible(grad) and grad.item() == 1):
        made.mul_(grad)
    return made.to(dtype)


_linear_cross_entropy = entry(LinearCrossEntropyFunction)


@public
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_tokens: bool = False,
    process_group: "ProcessGroup | None" = None,
) -> Any:
    r"""Cross entropy of the logits :math:`x W^T + b`, which are never held: :math:`\ell = -\log p_t`, reduced.

    For the loss of a language model: hidden states in, loss out. Some hundred rows of logits are held at a time, under
    ``torch.compile`` too; under ``torch.func``, forward mode and double backward all of them stand for a moment.

    Args:
        input: Hidden states ``(D,)``, ``(N, D)`` or ``(N, L, ..., D)``, floating point.
        linear_weight: ``(C, D)``, of the dtype of ``input``; that of the embedding where they are tied. Or
            ``(C, d1, ..., D)`` for a loss of several dimensions, which goes through the logits.
        target: Class indices of the shape of ``input`` without ``D``, ``()`` or ``(1,)`` for one, int64 or uint8; or
            probabilities of the logits' shape, floating point. Where they require grad, it goes through the logits.
        linear_bias: ``(C,)``, or ``(C, d1, ...)``.
        weight: A factor of each class, ``(C,)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; the mean is weighted.
        ignore_index: The class index whose positions count for nothing; -100 if ``None``.
        label_smoothing: The share of the target that is spread evenly over all classes, in ``[0, 1]``.
        options: Torch's ``LinearCrossEntropyOptions``. Its ``batch_chunk_size`` is taken, where given, else chosen from
            the shapes; nothing else in it makes a difference here.
        z_loss: The factor of :math:`\log^2 \sum_c e^{z_c}`, added at each position that counts and reduced like the
            loss, but without class weights.
        softcap: The bound c, positive, of the logits: :math:`c \tanh(z / c)` takes their place.
        return_tokens: Whether to return a named tuple ``(loss, values, predictions, accuracy)``, of which only ``loss``
            is differentiable: each position's loss and most probable class, and the share of the positions that count
            where that is the target's.
        process_group: The ``torch.distributed`` processes over which the classes are sharded: rank r's
            ``linear_weight``, ``linear_bias``, ``weight`` and probabilities are those of its classes, behind those of
            rank r - 1; ``input`` and class indices are the same everywhere. Every rank has the loss, the whole gradient
            of ``input``, and that of its shard.

    Returns:
        The loss in nats: a scalar, or the shape of ``input`` without ``D`` for ``"none"``.

    Raises:
        IndexError: A class index outside ``[0, C)``, on a CPU.
        ValueError: ``target`` of another batch size, an unknown reduction, or a ``softcap`` that is not positive.
        NotImplementedError: Integer or complex input.
        RuntimeError: Other shapes or dtypes that do not fit; a smoothing outside ``[0, 1]``; ``ignore_index`` with
            probabilities; a ``weight`` that requires grad with indices; a second derivative with ``process_group``.

    Example:
        >>> import torch
        >>> from torchbp.functional import linear_cross_entropy
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> linear_cross_entropy(hidden, weight, torch.tensor([1, 0]))
        tensor(0.4100)
    """
    reduction = named(NAME, reduction, None, None)
    soft = check(
        input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing, softcap
    )
    value_dtype = torch.promote_types(input.dtype, target.dtype) if soft else input.dtype
    if autocasts(input.device.type):
        value_dtype = wide(input)
        input, linear_weight, linear_bias = in_autocast_dtype(input, linear_weight, linear_bias)
    check_dtypes(input, linear_weight, linear_bias)

    classes, *places = linear_weight.shape[:-1]
    count = math.prod(input.shape[:-1])
    x = input.reshape(count, input.shape[-1])
    flat = target.reshape((count, classes, *places) if soft else (count, *places))
    ignored = -100 if ignore_index is None else ignore_index
    counts = None if soft else flat != ignored
    trained = soft and any(_differentiated(t) for t in (target, weight))
    if process_group is not None and (places or trained or not eager()):
        rule = (
            "eager mode, a weight (C, D), and no gradient of target and weight with a process_group"
        )
        raise RuntimeError(wrong(NAME, rule, shape(linear_weight), "gather the weight first"))
    if not (places or trained or _of_other_classes(x, linear_weight, flat)):
        rows = getattr(options, "batch_chunk_size", None) or chunk_rows(*x.shape)
        early = _early(x, linear_weight, linear_bias, reduction, process_group)
        given = Settings(
            *(reduction, ignored, label_smoothing, z_loss, softcap),
            *(rows, early, return_tokens, process_group),
        )
        tensors = (x, linear_weight, linear_bias, flat, weight)
        traced = torch.compiler.is_compiling()
        constant = not any(_wanted(x, linear_weight, linear_bias))
        if (traced and torch._C._are_functorch_transforms_active()) or torch.jit.is_tracing():
            # Dynamo (torch 2.13) differentiates the forward there, and through a Function loses the weight's gradient;
            # a size, as torch.jit.trace has it, is a tensor, which a Function would not take
            value, *tokens = values_by_formula(*tensors, given)
            outputs = (value, *(t.detach() for t in tokens))
        elif traced and (any(early) or (constant and not _exporting())):
            outputs = opaque(*tensors, *given[:-1])
        else:
            outputs = _linear_cross_entropy(*tensors, *given)
    else:
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = linear(x, linear_weight.flatten(0, -2), bias)
        logits = logits.reshape(count, classes, *places)
        loss = partial(
            cross_entropy,
            logits,
            flat,
            weight,
            ignore_index=ignored,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
        tokens = (loss(reduction="none").detach(), logits.argmax(1)) if return_tokens else ()
        outputs = (loss(reduction=reduction), *tokens)
    of_all = (*input.shape[:-1], *places)
    loss = outputs[0].to(value_dtype)
    loss = loss.reshape(of_all) if reduction == "none" else loss
    if not return_tokens:
        return loss
    values, predictions = outputs[1:3]
    accuracy = _accuracy(predictions, flat, counts, process_group)
    return TokenLosses(loss, values.reshape(of_all), predictions.reshape(of_all), accuracy)


def _of_other_classes(*tensors: Tensor) -> bool:
    """Whether a class of its own computes for a tensor, as a distributed one: chunks are written to plain memory."""
    return eager() and not all(map(plain, tensors))


def _differentiated(t: Tensor | None) -> bool:
    """Whether a gradient or a tangent of ``t`` is asked for."""
    if t is None:
        return False
    if t.requires_grad and torch.is_grad_enabled():
        return True
    if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(t):
        return _differentiated(get_unwrapped(t))  # a batched one doesn't say so
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _early(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reduction: str,
    group: "ProcessGroup | None",
) -> tuple[bool, bool, bool]:
    """Return which gradients the forward makes: where "none" leaves that open, and where they are worth their bytes.

    The gradients are no larger than the logits and their gradient would be. In a group, every rank has to decide alike.
    """
    wanted = _wanted(x, weight, bias)
    logits = x.shape[0] * weight.shape[0]
    made = sum(t.numel() for t, want in zip((x, weight), wanted, strict=False) if want)
    first_order = not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
    worth = group is not None or (first_order and not _exporting() and _worth(logits, made))
    of_x, of_weight, of_bias = (want and worth and reduction != "none" for want in wanted)
    return of_x, of_weight, of_bias


def _wanted(*tensors: Tensor | None) -> list[bool]:
    """Return which of ``tensors`` autograd asks the gradient of."""
    return [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]


def _exporting() -> bool:
    """Whether ``torch.export`` traces; dynamo of torch 2.11 answers ``is_exporting()`` with True wherever it traces."""
    return torch.compiler._is_exporting_flag


def _worth(logits: int, gradients: int) -> bool:
    if (
        torch.compiler.is_dynamo_compiling()
    ):  # of any size they are made, and the size is not bound by an answer
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        few = statically_known_true(logits < _MANY)
        return not (few or statically_known_true(gradients > 2 * logits))
    return logits >= _MANY and gradients <= 2 * logits


def _accuracy(
    predictions: Tensor, target: Tensor, counts: Tensor | None, group: "ProcessGroup | None"
) -> Tensor:
    with torch.no_grad():
        if counts is None:
            largest, classes = target.max(1)
            shard = Shard(target.shape[1], group, target.device)
            return (predictions == shard.where_largest(largest, classes)).float().mean()
        return ((predictions == target) & counts).sum() / counts.sum()


class LinearCrossEntropyLoss(TorchsLoss):
    """Module form of :func:`linear_cross_entropy`; holds the linear layer, initialised as :class:`Linear`."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, -1),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    x = make.normal(5, 3)
    yield LinearCrossEntropyLoss, Sample((3, 4)), Sample((x, make.labels(5, classes=4)))
    kwargs = {"weight": make.uniform(4), "label_smoothing": 0.1, "ignore_index": 2, "bias": True}
    every = Sample((x, make.labels(5, classes=4)), name="all-arguments")
    yield LinearCrossEntropyLoss, Sample((3, 4), kwargs), every
    places = Sample((x, make.labels(5, 2, 3, classes=4)), name="places")
    yield LinearCrossEntropyLoss, Sample((3, 4), {"out_features": (2, 3), "bias": True}), places


OP = Op(
    function=linear_cross_entropy,
    modules=(LinearCrossEntropyLoss,),
    reference=samples.reference,
    samples=samples.samples,
    module_samples=_module_samples,
    errors=samples.errors,
    saved_bytes=samples.saved_bytes,
    benchmark=samples.benchmark,
)
