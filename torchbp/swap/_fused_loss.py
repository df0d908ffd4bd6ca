"""fuse_loss(): a language model of transformers learns without ever holding its logits."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp.ops.linear.linear import Linear, linear
from torchbp.ops.losses.linear_cross_entropy import linear_cross_entropy
from torchbp.swap import _transformers
from torchbp.swap._hooks import remove_hooks

__all__ = ["fuse_loss", "separate_loss"]

M = TypeVar("M", bound=nn.Module)


def fuse_loss(model: M) -> M:
    """Compute the output layer and the cross entropy of a causal language model in one, chunk by chunk.

    For models of Hugging Face's transformers, in training mode, called with ``labels=``: the loss is that of the
    model's own ``loss_function``, the output's ``logits`` are None, and the tokens × vocabulary of them are never held.
    Without labels, and in evaluation mode, nothing changes. :func:`torchbp.revert` undoes it.

    Args:
        model: With ``get_output_embeddings()``, a plain linear layer, and the loss ``ForCausalLMLoss``.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` has another output layer or loss.
        RuntimeError: In forward, where the model changes its logits before the loss (caps, scales or casts them).

    Example:
        >>> from torchbp.swap import fuse_loss
        >>> model = fuse_loss(model)  # doctest: +SKIP
        >>> model(input_ids=tokens, labels=tokens).loss.backward()  # doctest: +SKIP
    """
    loss: Any = getattr(model, "loss_function", None)
    if isinstance(loss, _FusedLoss):
        return model
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) not in (nn.Linear, Linear) or getattr(loss, "__name__", "") != "ForCausalLMLoss":
        message = (
            "fuse_loss: expected a causal language model of transformers with a plain linear output layer, got "
            f"{type(model).__name__}; use torchbp.nn.LinearCrossEntropyLoss in a model of your own"
        )
        raise TypeError(message)
    head.__class__ = _transformers.twin_of(nn.Linear, _head)
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)
    vars(model)["_loss_function"] = _FusedLoss(head, loss)
    return model


def separate_loss(model: nn.Module) -> None:
    """Undo :func:`fuse_loss` in ``model`` and its parts; the head is another's to put back."""
    for module in model.modules():
        if isinstance(vars(module).get("_loss_function"), _FusedLoss):
            del vars(module)["_loss_function"]
    remove_hooks(model, lambda hook: hook is _enter or hook is _leave)


class _State(threading.local):
    """Of the forward that runs in this thread: whether head and loss are one, and what the head passed on."""

    fused = False
    passed: Tensor | None = None


_state = _State()


def _enter(module: nn.Module, _: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    wanted = kwargs.get("labels") is not None and kwargs.get("return_dict") is not False
    _state.fused = wanted and module.training


def _leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    fused, _state.fused, _state.passed = _state.fused, False, None
    if not fused or output is None:
        return output
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


def _head(head: nn.Linear, x: Tensor) -> Tensor:
    """Be the linear layer, or pass its input on to the loss that does its work."""
    if not _state.fused:
        return linear(x, head.weight, head.bias)
    _state.passed = x
    return x


class _FusedLoss:
    """``model.loss_function`` of what the head has passed on.

    Args:
        head: The output layer.
        separate: The model's own loss function, of logits.
    """

    def __init__(self, head: nn.Linear, separate: Callable[..., Tensor]) -> None:
        self.head, self.separate = head, separate

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the mean over the tokens, or the sum divided by ``num_items_in_batch``, as transformers does."""
        if not _state.fused:
            return self.separate(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if logits is not _state.passed:
            message = (
                "fuse_loss: expected the output layer's logits to reach the loss as they are, got others: the model "
                "caps, scales or casts them; torchbp.revert(model), and leave its loss separate"
            )
            raise RuntimeError(message)
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        total = linear_cross_entropy(
            logits.flatten(0, -2),
            self.head.weight,
            shift_labels.flatten().to(logits.device),
            linear_bias=self.head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return total
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
