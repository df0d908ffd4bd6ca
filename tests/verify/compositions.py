"""Right functions that nobody chose: torch's own, put together by lot, whose gradients autograd makes.

Left out is what has a wrong gradient by autograd's rules, or torch's: exponentials, whose overflow is multiplied with
0; squares of what has a kink; powers, whose second derivative is wrong for an exponent of 0; logcumsumexp, whose is
where an output has a gradient of 0; hypot, whose gradient at the origin is NaN.
"""

import random

import torch
import torch.nn.functional as F

__all__ = ["composition"]

UNARY = {
    "center": lambda x: x - x.mean(-1, keepdim=True),
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "cos": torch.cos,
    "cummax": lambda x: x.cummax(-1).values,
    "cumsum": lambda x: x.cumsum(-1),
    "diff": lambda x: x.diff(dim=-1) if x.shape[-1] > 1 else x,
    "elu": F.elu,
    "flip": lambda x: x.flip(-1),
    "gelu": F.gelu,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "leaky_relu": F.leaky_relu,
    "normalize": lambda x: F.normalize(x, dim=-1),
    "outer": lambda x: x @ x.transpose(-1, -2) if x.dim() > 1 else x,
    "pad": lambda x: F.pad(x, (1, 1)),
    "roll": lambda x: x.roll(1, -1),
    "shifted": lambda x: x - x.amax(-1, keepdim=True),
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "softmax": lambda x: x.softmax(-1),
    "softplus": F.softplus,
    "sort": lambda x: x.sort(-1).values,
    "stairs": lambda x: x + 0.1 * x.detach().round(),
    "tanh": torch.tanh,
    "transpose": lambda x: x.transpose(0, -1).contiguous(),
}
BINARY = {
    "add": torch.add,
    "atan2": lambda x, y: torch.atan2(x, y + 3),
    "div": lambda x, y: x / (1 + y * y),
    "logaddexp": torch.logaddexp,
    "matmul": lambda x, y: x @ y.transpose(-1, -2) if x.dim() > 1 else x * y,
    "maximum": torch.maximum,
    "mul": torch.mul,
    "sub": torch.sub,
}
LAST = {
    "all": lambda x: x,
    "amax": lambda x: x.amax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "mean": torch.mean,
    "norm": lambda x: x.norm(dim=-1),
    "std": lambda x: x.std(-1) if x.shape[-1] > 1 else x,
    "sum": lambda x: x.sum(-1),
    "two": lambda x: (x, x.sum()),
}
SHAPES = ((3, 4), (5,), (2, 3, 3), (4, 4), (6, 1), (1, 5))


def composition(seed):
    """Return what it is made of, the function and its inputs; the same for the same seed. ``None`` where none fit."""
    draw = random.Random(seed)
    before = draw.choices(list(UNARY), k=draw.randint(0, 3))
    with_other = draw.choice([None, *BINARY] if draw.random() < 0.5 else [None])
    after = draw.choices(list(UNARY), k=draw.randint(0, 2))
    last, shape = draw.choice(list(LAST)), draw.choice(SHAPES)

    def call(x, *other):
        for name in before:
            x = UNARY[name](x)
        if with_other:
            x = BINARY[with_other](x, *other)
        for name in after:
            x = UNARY[name](x)
        return LAST[last](x)

    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for _ in range(2 if with_other else 1)
    ]
    inputs[0].requires_grad_()
    if with_other and draw.random() < 0.7:
        inputs[1].requires_grad_()
    parts = [*before, *filter(None, [with_other]), *after, last]
    try:
        call(*inputs)
    except (IndexError, RuntimeError):  # shapes that do not go together
        return None
    return f"{' '.join(parts)} of {shape}", call, tuple(inputs)
