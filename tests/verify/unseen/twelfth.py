"""Twelfth set: functions as projects write them, about two thirds of the bugs out of the sample's sight.

A factory builds a public function from its Function, so a wrong function and its right twin have one signature and one
docstring. `trigger` says in which situation the gradient is wrong.
"""

from functools import wraps

import torch
from torch.amp import custom_bwd, custom_fwd

from tests.device import DEVICE
from tests.verify.unseen import TWELFTH, pair

recorded = custom_fwd(device_type=DEVICE)  # tells as_forward whether forward ran under autocast
as_forward = custom_bwd(device_type=DEVICE)


def in_float32(function):
    """Return the function as it computes under autocast: in float32, its inputs cast before."""

    @wraps(function)
    def call(*args, **kwargs):
        if torch.is_autocast_enabled(DEVICE):
            args = [cast(a) for a in args]
            kwargs = {name: cast(a) for name, a in kwargs.items()}
        with torch.autocast(DEVICE, enabled=False):
            return function(*args, **kwargs)

    def cast(a):
        return wide(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    return call


def add(name, factory, wrong, right, make, *, bug, trigger, missed=""):
    text = f"{bug}; shows with {trigger}"
    pair(f"{name}_12", factory(wrong), factory(right), make, text, into=TWELFTH, missed=missed)


def softmax_backward(p, g, dim=-1):
    """The gradient of the logits whose softmax is p."""
    return p * (g - (g * p).sum(dim, keepdim=True))


def wide(x):
    """x in float32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
