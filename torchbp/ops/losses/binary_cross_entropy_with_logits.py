r"""Binary cross entropy of logits: ℓ = w · [(1 - t) · softplus(x) + c · t · softplus(-x)], then reduced.

x is the logit, t the target probability, c the weight of positives ("pos_weight"), w that of each element.

Derivation, with softplus'(x) = σ(x) and s the gradient of each ℓ (grad for "none" and "sum", grad / N for "mean"):
    grad_x = s · w · [(1 - t) · σ(x) - c · t · σ(-x)]                                         (1)
    grad_t = s · w · [c · softplus(-x) - softplus(x)]                                         (2)
    tangent_ℓ = (1) · tangent_x + (2) · tangent_t with s = 1                                  (3)
    Two sigmoids in (1), not σ(x) - t: for t = 1 the latter rounds to 0 from x = 17 on in float32.
    With one, of many elements, with H = [x > 0] and u = σ(-|x|), c = w = 1 (_kept_gradient.py):
    ℓ = (H - t) · x - log(1 - u)                                                              (4)
    grad_x = s · g,  g = (H - t) - (2H - 1) · u,  in this order                               (5)
    ∂g/∂x = σ(x) σ(-x) = (g + t) · (1 - t - g)                                                (6)

Saves:
    x and t, which are inputs, and the weights. Of 2¹⁴ to 2²³ float32 or float64
    logits, with a gradient for x alone and without weights, the mean and the sum keep g instead of x.

Edge values:
    x → +∞: ℓ → ∞ and grad_x → s · w · (1 - t), but for t = 1 both → 0; x → -∞: the same, with t = 0 (torch: NaN).
    No elements: the mean is NaN.

Sources:
    Good, "Rational Decisions", 1952, doi:10.1111/j.2517-6161.1952.tb00104.x (the logarithmic score).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.function import Function

from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import (
    Context,
    as_dtype,
    entry,
    in_autocast_float32,
    is_half,
    kernel,
    public,
    scale_fresh,
    visible_in_backward,
)
from torchbp.ops._numbers import constant
from torchbp.ops._op import Op
from torchbp.ops._pieces import alike, in_pieces, length_written, pieces
from torchbp.ops._reduction import (
    REDUCTIONS,
    WIDE,
    in_common_dtype,
    laid_out,
    named,
    reduce,
    reduced,
    reduced_in_one_kernel,
    spread,
)
from torchbp.ops._samples import Make, Sample, square
from torchbp.ops.kernels import in_one_loop, many
from torchbp.ops.losses._kept_gradient import Formula, suits_kept_gradient, with_kept_gradient
from torchbp.ops.losses._limits import product, with_limits
from torchbp.ops.losses._log_sums import FEW, minus_log1p_sum, reduced_softplus

__all__ = [
    "BCEWithLogitsLoss",
    "BCEWithLogitsLossFunction",
    "binary_cross_entropy_with_logits",
]

_NAME = "binary_cross_entropy_with_logits"
_FEW = 1 << 10  # elements; up to these the number of calls counts
_softplus_into = kernel("softplus", "out")
_softplus_backward = kernel("softplus_backward")
_softplus_backward_into = kernel("softplus_backward", "grad_input")
_leaky_relu_backward_into = kernel("leaky_relu_backward", "grad_input")


class BCEWithLogitsLossFunction(Function):
    """Binary cross entropy with hand-written gradients. Call it through :func:`binary_cross_entropy_with_logits`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
    ) -> Tensor:
        if not x.is_floating_point():
            how = REDUCTIONS[reduction]
            return torch.binary_cross_entropy_with_logits(x, target, weight, pos_weight, how)

        if weight is None is pos_weight:
            loss = reduced_in_one_kernel(_values_with_limits, reduction, x, target)
            if loss is not None:
                return loss

        def plain() -> Tensor:
            few = not (many(x, _FEW + 1) or is_half(x))
            if (few and x.dtype == target.dtype) or pos_weight is not None:
                how = REDUCTIONS[reduction]
                return torch.binary_cross_entropy_with_logits(x, target, weight, pos_weight, how)
            if weight is None:
                if reduction != "none" and not is_half(x) and many(x, FEW + 1) and alike(x, target):
                    return reduced_softplus(_parts, reduction, x, target)
                return reduced(_values, reduction, x, target, into=_values_into, spare=1)
            values = in_pieces(_values, x, target, into=_values_into, spare=1)
            return reduce(values * weight, reduction)

        def limits() -> Tensor:
            c = () if pos_weight is None else (pos_weight,)
            values = in_pieces(_values_with_limits, x, target, *c)
            return reduce(values if weight is None else values * weight, reduction)

        return with_limits(plain, limits, x)

    @staticmethod
    def setup_context(
        ctx: Context,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, str],
        output: Tensor,
    ) -> None:
        x, target, weight, pos_weight, ctx.reduction = inputs
        ctx.save_for_backward(x, target, weight, pos_weight)

    @staticmethod
    def backward(
        ctx: Context, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, target, weight, pos_weight = ctx.saved_tensors
        need_x, need_target, _, _, _ = ctx.needs_input_grad
        unweighted = weight is None is pos_weight
        one = unweighted and not need_target and ctx.reduction != "none"
        if one and _few_alike(x, target, grad):
            s = grad.item() / (x.numel() if ctx.reduction == "mean" else 1)
            return _gradient_x_of_one(x, target, s), None, None, None, None
        s = spread(grad, ctx.reduction, x.numel())
        s = s if weight is None else s * weight
        c = () if pos_weight is None else (pos_weight,)
        grad_x = None
        if need_x and not c and _few_alike(x, target, s):
            grad_x = _gradient_x_of_few(x, target, s)
        elif need_x and not c:
            grad_x = in_one_loop(_times_gradient, x, target, s)
        if need_x and grad_x is None:
            into = None if c else _gradient_x_into
            grad_x = in_pieces(_gradient_x, x, target, s, *c, into=into, spare=1)
            grad_x = as_dtype(grad_x, x.dtype)
        grad_target = in_pieces(_gradient_target, x, s, *c) if need_target else None
        grad_target = None if grad_target is None else grad_target.to(target.dtype)
        return grad_x, grad_target, None, None, None

    @staticmethod
    def jvp(
        ctx: Context, tangent_x: Tensor | None, tangent_target: Tensor | None, *_: None
    ) -> Tensor:
        x, target, weight, pos_weight = ctx.saved_tensors
        c = () if pos_weight is None else (pos_weight,)
        tangent = torch.zeros_like(x)  # (3)
        if tangent_x is not None:
            tangent = tangent + in_pieces(_gradient_x, x, target, tangent_x, *c)
        if tangent_target is not None:
            tangent = tangent + in_pieces(_gradient_target, x, tangent_target, *c)
        return reduce(tangent if weight is None else tangent * weight, ctx.reduction)


def _values(x: Tensor, target: Tensor) -> Tensor:
    """Return (1 - t) x - log σ(x), which is the loss since softplus(x) = x + softplus(-x)."""
    return x - x * target - F.softplus(x, -1, 40)  # log σ(x), in one pass and one tensor


def _values_into(value: Tensor, log: Tensor, x: Tensor, target: Tensor) -> None:
    _softplus_into(x, -1, 40, out=log)
    torch.addcmul(x, x, target, value=-1, out=value).sub_(log)


def _values_with_limits(x: Tensor, target: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the loss as what is linear in |x| and softplus(-|x|)."""
    positive = target if c is None else c * target
    linear = product(torch.where(x > 0, 1 - target, positive), x.abs())
    rest = F.softplus(-x.abs())
    return linear + (rest if c is None else (1 - target + positive) * rest)


def _parts(linear: Tensor, z: Tensor, x: Tensor, target: Tensor) -> None:
    """Write max(x, 0) - t x, and |x|: softplus(x) = max(x, 0) + log(1 + exp(-|x|))."""
    torch.clamp(x, min=0, out=linear).addcmul_(x, target, value=-1)
    torch.abs(x, out=z)


def _gradient_x(x: Tensor, target: Tensor, s: Tensor, c: Tensor | float = 1) -> Tensor:
    of_positive = c * target * torch.sigmoid(-x)
    return scale_fresh((1 - target) * torch.sigmoid(x) - of_positive, s)  # (1)


def _gradient_x_into(grad_x: Tensor, p: Tensor, x: Tensor, target: Tensor, s: Tensor) -> None:
    torch.neg(x, out=grad_x).sigmoid_().neg_()
    # lerp starts from the nearer end: for t = 1 nothing of σ(-x) is lost
    torch.lerp(torch.sigmoid(x, out=p), grad_x, target, out=grad_x).mul_(s)


def _few_alike(x: Tensor, target: Tensor, s: Tensor) -> bool:
    """Whether there are few elements, of one dtype, and ``s`` may be looked at."""
    return (
        s.dtype is x.dtype is target.dtype in WIDE
        and visible_in_backward(x)
        and x.numel() <= _FEW
        and not is_legacy_batchedtensor(s)
    )


def _gradient_x_of_one(x: Tensor, target: Tensor, s: float) -> Tensor:
    """Return (1) as :func:`_gradient_x_of_few` does, for one s."""
    of_one, of_minus = constant(s, x.dtype), constant(-s, x.dtype)
    positive = _softplus_backward(of_one, x, 1.0, 40.0)  # s · σ(x)
    minus = _softplus_backward(of_minus, x, -1.0, 40.0)  # -s · σ(-x)
    return torch.lerp(positive, minus, target)


def _gradient_x_of_few(x: Tensor, target: Tensor, s: Tensor) -> Tensor:
    """Return (1) as :func:`_gradient_x_into` writes it, in as few calls as there can be."""
    minus = _softplus_backward(constant(-1.0, x.dtype), x, -1.0, 40.0)  # -σ(-x) in one pass
    return torch.lerp(torch.sigmoid(x), minus, target).mul_(s)


def _gradient_target(x: Tensor, s: Tensor, c: Tensor | float = 1) -> Tensor:
    return scale_fresh(F.logsigmoid(-x) - c * F.logsigmoid(x), s)  # (2); logσ(x) = -softplus(-x)


def _with_gradient(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _values_with_limits(x, target), _gradient_of_one_sigmoid(x, target)


def _gradient_of_one_sigmoid(x: Tensor, target: Tensor) -> Tensor:
    e = (-x.abs()).exp()
    u = e / (1 + e)
    return torch.where(x > 0, (1 - target) - u, u - target)  # (5)


def _times_gradient(x: Tensor, target: Tensor, s: Tensor) -> Tensor:
    return _gradient_of_one_sigmoid(x, target) * s


def _write_gradient(gradient: Tensor, x: Tensor, target: Tensor) -> list[Tensor]:
    """Write g, and return the parts of Σ ℓ: both from one sigmoid."""
    length = min(x.numel(), 2 * length_written(x))
    room, spare, one = x.new_empty(length), x.new_empty(length // 2), constant(1.0, x.dtype)
    sums = []
    for g, x_part, t_part in pieces(gradient, x, target, length=length):
        n = g.numel()
        u = torch.abs(x_part, out=room[:n])
        # exp(-|x|) / (exp(-|x|) + 1), of smaller error than 1 / (1 + exp(|x|)), a sigmoid's
        _softplus_backward_into(one, u, -1.0, 40.0, grad_input=u)
        a = torch.gt(x_part, 0, out=g).sub_(t_part)
        sums += [torch.dot(x_part, a), minus_log1p_sum(u, spare[: n // 2])]  # (4)
        a.sub_(_leaky_relu_backward_into(u, x_part, -1.0, False, grad_input=u))  # (5)
    return sums


def _curvature(g: Tensor, target: Tensor) -> Tensor:
    return (g + target) * (1 - target - g)  # (6)


def _with_limits(x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return BCEWithLogitsLossFunction.forward(x, target, None, None, reduction)


_keeping_gradient = Formula(_with_gradient, _write_gradient, _curvature, _with_limits)
_binary_cross_entropy_with_logits = entry(BCEWithLogitsLossFunction)


@public
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of logits: :math:`\ell = -[t \log \sigma(x) + (1 - t) \log \sigma(-x)]`, reduced.

    Args:
        input: Logits, any shape ``(*)``, floating point.
        target: Probabilities in ``[0, 1]``, the shape of ``input``, floating point.
        weight: A factor of each element, of a shape that can be broadcast to ``(*)``.
        size_average: Deprecated in torch; see ``reduction``.
        reduce: Deprecated in torch; see ``reduction``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        pos_weight: A factor of the positive term, of a shape that can be broadcast to ``(*)``.

    Returns:
        The loss in nats: a scalar, or ``(*)`` for ``"none"``.

    Raises:
        ValueError: ``target`` of another shape, or an unknown reduction.
        RuntimeError: ``weight`` or ``pos_weight`` requires grad, or has a wrong shape; integer ``input``.

    Example:
        >>> import torch
        >>> from torchbp.functional import binary_cross_entropy_with_logits
        >>> binary_cross_entropy_with_logits(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor(0.4100)
    """
    reduction = named(_NAME, reduction, size_average, reduce)
    if target.size() != input.size():
        rule = f"target of the input's shape {shape(input)}"
        raise ValueError(wrong(_NAME, rule, shape(target), "reshape one of them"))
    for name, factor in (("weight", weight), ("pos_weight", pos_weight)):
        if factor is not None and factor.requires_grad and torch.is_grad_enabled():
            rule = f"{name} without requires_grad, as in torch"
            raise RuntimeError(wrong(_NAME, rule, "one that requires it", "detach it"))
    dtype = target.dtype
    if not (input.dtype is dtype in WIDE):
        input, target = in_autocast_float32(input, target)
        dtype = target.dtype  # of the result, as in torch
        if input.is_floating_point() and not target.is_floating_point():
            raise RuntimeError(wrong(_NAME, "floating-point target", dtype, "cast it"))
        input, target = in_common_dtype(input, target)
    if weight is None is pos_weight and suits_kept_gradient(input, target, reduction):
        return with_kept_gradient(input, target, reduction, _keeping_gradient)
    loss = _binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)
    return laid_out(as_dtype(loss, dtype), target)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """Module form of :func:`binary_cross_entropy_with_logits`; the weights are buffers."""

    __module__ = "torchbp.nn"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


def _samples(make: Make) -> Iterator[Sample]:
    for dims in ((3, 4), (), (1,), (2, 3, 2)):
        for reduction in ("mean", "sum", "none"):
            name = f"{'x'.join(map(str, dims)) or 'scalar'}-{reduction}"
            args = (make.normal(*dims), make.uniform(*dims, requires_grad=True))
            yield Sample(args, {"reduction": reduction}, name)
    for reduction in ("sum", "none"):
        args = (make.normal(0, 3), make.uniform(0, 3))
        yield Sample(args, {"reduction": reduction}, f"empty-{reduction}")
    args = (make.normal(3, 4), make.uniform(3, 4))
    factors = {"weight": make.uniform(3, 1), "pos_weight": make.uniform(4, high=3)}
    yield Sample(args, factors, "weights")
    yield Sample(args, {"pos_weight": make.uniform(3, 4, high=3)}, "pos-weight")
    yield Sample(args, {"weight": make.uniform(3, 4), "reduction": "none"}, "weight-none")
    data = make.normal(3, 4, requires_grad=False)
    yield Sample((data, make.uniform(3, 4, requires_grad=True)), name="data-input")


def _module_samples(make: Make) -> Iterator[tuple[type[nn.Module], Sample, Sample]]:
    sample = Sample((make.normal(3, 4), make.uniform(3, 4)))
    yield BCEWithLogitsLoss, Sample(), sample
    factors = {"weight": make.uniform(4), "pos_weight": make.uniform(4), "reduction": "sum"}
    yield BCEWithLogitsLoss, Sample((), factors), Sample(sample.args, name="weights")


def _errors(make: Make) -> Iterator[Sample]:
    x, target = make.normal(3, 4), make.uniform(3, 4)
    yield Sample((x, target[0]), name="shape")
    yield Sample((x, target), {"reduction": "average"}, name="reduction")
    yield Sample((x, target), {"weight": make.uniform(5)}, name="weight")
    yield Sample((x, target), {"pos_weight": make.uniform(4, requires_grad=True)}, name="grad")
    integers = make.labels(3, classes=2)
    yield Sample((integers, integers), name="integers")


def _benchmark(make: Make, n: int) -> Sample:
    (x,) = square(make, n).args
    return Sample((x, make.uniform(*x.shape)))


def _saved_bytes(*args: Tensor, **kwargs: object) -> int:
    tensors = [*args, *(v for v in kwargs.values() if isinstance(v, Tensor))]
    return sum(t.numel() * t.element_size() for t in tensors)


OP = Op(
    function=binary_cross_entropy_with_logits,
    modules=(BCEWithLogitsLoss,),
    reference=F.binary_cross_entropy_with_logits,
    samples=_samples,
    module_samples=_module_samples,
    errors=_errors,
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
)
