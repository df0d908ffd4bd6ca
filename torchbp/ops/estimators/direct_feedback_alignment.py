r"""Direct feedback alignment: the output's error goes to every hidden layer at once, through fixed random matrices.

Derivation (a rule, not a derivative), with y (*, E) the output, h_k (*, H_k) what the k-th layer above the first takes
in, B_k (E, H_k):
    grad_y = e, the error at the output, as the loss gives it                                  (1)
    grad_h_k = e · B_k, in the place of what would come down through the layers above          (2)
    tangent = tangent_y + Σ_k tangent_h_k · B_kᵀ, the transposed map                           (3)
    The B_k get no gradient. Complex ones are conjugated in (2).

    In the graph this is one node, at the output: y passes, and the h_k hang on it as further inputs; the layers compute
    with h_k.detach(). So the error reaches all hidden layers by edges of autograd itself, as soon as the output's
    gradient is there and whatever the order of the rest: no state outlives the forward pass, and several forwards a
    step, retain_graph, gradient accumulation, hooks and double backward work as everywhere.

Saves:
    The B_k, which live anyway. Nothing of y and h_k.

Edge values:
    None of its own. In half precision every sum is accumulated in float32.

Sources:
    Nøkland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016, arXiv:1609.01596.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

from torchbp.ops import _samples
from torchbp.ops._errors import shape, wrong
from torchbp.ops._function import Context, entry, handed_on, public
from torchbp.ops._op import Op
from torchbp.ops._samples import Make, Sample, stored
from torchbp.ops.linear.linear import linear

__all__ = [
    "DirectFeedbackAlignment",
    "DirectFeedbackAlignmentFunction",
    "DirectFeedbackAlignmentLinear",
    "direct_feedback_alignment",
]

_NAME = "direct_feedback_alignment"


class DirectFeedbackAlignmentFunction(Function):
    """Identity of y that sends y's gradient to other tensors too. Call it through :func:`direct_feedback_alignment`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, count: int, *hs_and_bs: Tensor) -> Tensor:  # (*, E), (*, H_k), (E, H_k)
        return handed_on(y)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, count, *rest = inputs
        hs, bs = rest[:count], rest[count:]
        ctx.dtypes = [h.dtype for h in hs]
        needed = ctx.needs_input_grad[2 : 2 + count]
        ctx.save_for_backward(*(b if n else None for b, n in zip(bs, needed, strict=True)))
        ctx.save_for_forward(*bs)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        bs = ctx.saved_tensors
        to_hidden = [
            None if b is None else (grad_y @ b.conj().to(grad_y.dtype)).to(dtype)  # (2)
            for b, dtype in zip(bs, ctx.dtypes, strict=True)
        ]
        return grad_y, None, *to_hidden, *([None] * len(bs))  # (1)

    @staticmethod
    def jvp(ctx: Context, tangent_y: Tensor | None, _: None, *tangents: Tensor | None) -> Tensor:
        bs = ctx.saved_tensors
        terms = [] if tangent_y is None else [tangent_y]
        for tangent_h, b in zip(tangents, bs, strict=False):  # after the tangents of h those of B
            if tangent_h is not None:
                terms.append(F.linear(tangent_h, b.to(tangent_h.dtype)))
        return sum(terms[1:], terms[0].view_as(terms[0]))  # (3)


_direct_feedback_alignment = entry(DirectFeedbackAlignmentFunction)


@public
def direct_feedback_alignment(
    output: Tensor, hidden: Sequence[Tensor], feedback: Sequence[Tensor]
) -> Tensor:
    r"""Pass ``output`` on; its gradient :math:`e` goes back to it, and :math:`e B_k` to every ``hidden[k]``.

    The layers above ``hidden[k]`` are to compute with ``hidden[k].detach()``: nothing else must come down to it.
    :class:`~torchbp.nn.DirectFeedbackAlignment` does all that for a model.

    Args:
        output: The network's output :math:`y`, ``(*, E)``, floating point: where the loss begins.
        hidden: Activations :math:`h_k`, each ``(*, H_k)`` with the leading dimensions of ``output``.
        feedback: The matrices :math:`B_k`, each ``(E, H_k)``. They get no gradient.

    Returns:
        A view of ``output``; in forward mode a copy.

    Raises:
        ValueError: Shapes, or the numbers of ``hidden`` and ``feedback``, do not fit.

    Example:
        >>> import torch
        >>> from torchbp.functional import direct_feedback_alignment
        >>> h = torch.zeros(1, 2, requires_grad=True)
        >>> y = h.detach() @ torch.tensor([[5.0], [6.0]])
        >>> y = direct_feedback_alignment(y, [h], [torch.tensor([[0.5, -0.5]])])
        >>> ((y - 1) ** 2).sum().backward()  # e = -2
        >>> h.grad
        tensor([[-1.,  1.]])
    """
    if len(hidden) != len(feedback):
        got = f"{len(hidden)} and {len(feedback)}"
        raise ValueError(wrong(_NAME, "as many feedback as hidden", got, "one matrix for each"))
    for h, b in zip(hidden, feedback, strict=True):
        if not output.dim() or h.shape[:-1] != output.shape[:-1]:
            rule = f"hidden of the leading dimensions of output {shape(output)}"
            raise ValueError(wrong(_NAME, rule, shape(h), "one row of hidden for each of output"))
        if b.shape != (output.shape[-1], h.shape[-1]):
            rule = f"feedback of shape {(output.shape[-1], h.shape[-1])}"
            raise ValueError(wrong(_NAME, rule, shape(b), "from the output's width to hidden's"))
    return _direct_feedback_alignment(output, len(hidden), *hidden, *feedback)


class _Forward(threading.local):
    """The forward pass of a :class:`DirectFeedbackAlignment` that runs in this thread, if any."""

    met: list[tuple[Tensor, Tensor]] | None = None


_forward = _Forward()


class DirectFeedbackAlignmentLinear(nn.Linear):
    """Linear layer whose input is taught by the network's output: :func:`direct_feedback_alignment`.

    For every linear layer but the first (whose input is data), inside :class:`DirectFeedbackAlignment`. The fixed
    random ``feedback``, from the output's error to the layer's input, is a buffer and saved in the ``state_dict``.
    Weight and bias are initialised as :class:`torch.nn.Linear`'s, which are drawn first; the feedback uniform in ±1/√I.

    Args:
        in_features: I, size of the input: what the error is sent to.
        out_features: O, size of the layer's own output.
        error_features: E, size of the whole network's output.
        bias: Whether to add one.
        device: Of the parameters and the feedback.
        dtype: Of the parameters and the feedback.

    Raises:
        RuntimeError: At a forward outside of :class:`DirectFeedbackAlignment` with an input that requires grad.
    """

    __module__ = "torchbp.nn"
    feedback: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        error_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        feedback = torch.empty(error_features, in_features, device=device, dtype=dtype)
        self.register_buffer("feedback", feedback)
        self.reset_feedback()

    def reset_feedback(self) -> None:
        """Draw the feedback anew."""
        nn.init.kaiming_uniform_(self.feedback, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, error_features={self.feedback.shape[0]}"

    def forward(self, input: Tensor) -> Tensor:
        if _forward.met is not None:
            _forward.met.append((input, self.feedback))
        elif input.requires_grad and torch.is_grad_enabled():
            rule = "to run inside DirectFeedbackAlignment, which brings it the error at the output"
            advice = "wrap the model: DirectFeedbackAlignment(model)"
            raise RuntimeError(wrong(type(self).__name__, rule, "a call outside", advice))
        return linear(input.detach(), self.weight, self.bias)


class DirectFeedbackAlignment(nn.Module):
    """A model whose :class:`DirectFeedbackAlignmentLinear` layers learn from the error at its output.

    Nothing changes in a training loop: ``loss.backward()`` and any optimizer of torch's. Use it once, around the whole
    network; one inside another sends its own output's error to its own layers.

    Args:
        module: The model: takes anything, returns a tensor ``(*, E)``.

    Raises:
        TypeError: At a forward, ``module`` returned several tensors.

    Example:
        >>> import torch
        >>> from torchbp import nn
        >>> model = nn.DirectFeedbackAlignment(
        ...     nn.Sequential(
        ...         nn.Linear(64, 100),
        ...         nn.Tanh(),
        ...         nn.DirectFeedbackAlignmentLinear(100, 50, error_features=10),
        ...         nn.Tanh(),
        ...         nn.DirectFeedbackAlignmentLinear(50, 10, error_features=10),
        ...     )
        ... )
        >>> model(torch.randn(8, 64)).sum().backward()
    """

    __module__ = "torchbp.nn"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outer, _forward.met = _forward.met, []
        try:
            output = self.module(*args, **kwargs)
            met = _forward.met
        finally:
            _forward.met = outer
        if isinstance(output, (tuple, list, dict)):
            got, advice = type(output).__name__, "wrap the part that ends in the output"
            raise TypeError(wrong(type(self).__name__, "module to return one tensor", got, advice))
        return direct_feedback_alignment(output, [h for h, _ in met], [b for _, b in met])


def _rule(output: Tensor, hidden: Sequence[Tensor], feedback: Sequence[Tensor]) -> Tensor:
    paths = [F.linear(h, b.detach()) for h, b in zip(hidden, feedback, strict=True)]
    return output + sum(((p - p.detach()).to(output.dtype) for p in paths), 0)


def _all_samples(make: Make) -> Iterator[Sample]:
    for dims in ((4,), (), (2, 3), (0,)):
        widths = (5, 2) if dims == (4,) else (5,)
        hidden = [make.normal(*dims, w) for w in widths]
        feedback = [make.normal(3, w, requires_grad=False) for w in widths]
        name = "x".join(map(str, (*dims, 3)))
        yield Sample((make.normal(*dims, 3), hidden, feedback), name=name)
    yield Sample((make.normal(4, 3), [], []), name="no-hidden")
    data = [make.normal(4, 5, requires_grad=False)]
    feedback = [make.normal(3, 5, requires_grad=False)]
    yield Sample((make.normal(4, 3), data, feedback), name="data-hidden")


def _benchmark(make: Make, n: int) -> Sample:
    (y,) = _samples.square(make, n).args
    width = y.shape[-1]
    feedback = make.normal(width, width, requires_grad=False)
    return Sample((y, [make.normal(*y.shape)], [feedback]))


def _saved_bytes(output: Tensor, hidden: Sequence[Tensor], feedback: Sequence[Tensor]) -> int:
    return stored(*(b for h, b in zip(hidden, feedback, strict=True) if h.requires_grad))


OP = Op(
    function=direct_feedback_alignment,
    modules=(DirectFeedbackAlignmentLinear, DirectFeedbackAlignment),
    reference=_rule,
    samples=_all_samples,
    module_samples=lambda make: (),  # noqa: ARG005  # no function of one layer: tests/ops/test_feedback_alignment.py
    saved_bytes=_saved_bytes,
    benchmark=_benchmark,
    estimator=True,
)
