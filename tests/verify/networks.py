"""Right networks that nobody chose: torch's own layers, put together by lot, with a loss or without.

Left out is what has a wrong gradient by torch: bicubic interpolation by a factor that leaves the size as it is. And
norms over two numbers, which are ±1 whatever these are: their gradient is what rounding leaves of a difference.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["network"]

SMOOTH = (nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.LogSigmoid, nn.Mish, nn.SELU, nn.Sigmoid)
BENT = (nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ReLU, nn.ReLU6, nn.Softshrink)
ACTIVATIONS = (*SMOOTH, *BENT, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink)
LOSSES = (nn.BCEWithLogitsLoss, nn.CrossEntropyLoss, nn.HuberLoss, nn.L1Loss, nn.MSELoss)


class Step(nn.Module):
    """A function, or a Module that takes more than one input or gives more than one output, as a layer."""

    def __init__(self, call, part=None):
        super().__init__()
        self.call, self.part = call, part

    def forward(self, x):
        return self.call(x) if self.part is None else self.call(self.part, x)


class Trained(nn.Module):
    """A network and its loss."""

    def __init__(self, body, loss):
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x, target):
        return self.loss(self.body(x), target)


def recurrent(kind, channels, hidden):
    part = kind(channels, hidden, batch_first=True)
    return Step(lambda layer, x: layer(x)[0], part)


def attention(channels):
    part = nn.MultiheadAttention(channels, 1 if channels % 2 else 2, batch_first=True)
    return Step(lambda layer, x: layer(x, x, x, need_weights=False)[0], part)


def encoder(channels):
    return nn.TransformerEncoderLayer(channels, 1, 4, dropout=0.0, batch_first=True)


def residual(channels, hidden):
    part = nn.Sequential(nn.Linear(channels, hidden), nn.Tanh(), nn.Linear(hidden, channels))
    return Step(lambda layer, x: x + layer(x), part)


def rows(draw, c, d):
    """Return what may stand next on (N, C), and the channels it leaves."""
    return [
        (nn.Linear(c, d, bias=draw.random() < 0.7), d),
        (residual(c, d), c),
        (draw.choice([nn.Softmax, nn.LogSoftmax, nn.Softmin])(-1), c),
        (Step(lambda x: F.normalize(x, dim=-1)), c),
        *([(nn.GLU(-1), c // 2)] if c % 2 == 0 else []),
        *([(nn.LayerNorm(c), c), (nn.RMSNorm(c), c), (nn.BatchNorm1d(c), c)] if c > 2 else []),
    ]


def steps(draw, c, d):
    """Return the same on (N, T, C)."""
    return [
        (nn.Linear(c, d), d),
        (recurrent(draw.choice([nn.GRU, nn.LSTM, nn.RNN]), c, d), d),
        (attention(c), c),
        (Step(lambda x: x.cumsum(1)), c),
        (Step(lambda x: x - x.mean(1, keepdim=True)), c),
        (Step(lambda x: torch.fft.rfft(x, dim=1).abs().add(1).log()), c),
        *([(nn.LayerNorm(c), c), (encoder(c), c)] if c > 2 else []),
    ]


def images(draw, c, d):
    """Return the same on (N, C, H, W)."""
    around = draw.choice(["zeros", "reflect", "circular", "replicate"])
    pad = draw.choice([nn.ReflectionPad2d, nn.ZeroPad2d, nn.ReplicationPad2d, nn.CircularPad2d])
    return [
        (nn.Conv2d(c, d, 3, padding=1, padding_mode=around), d),
        (nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c), c),
        (nn.ConvTranspose2d(c, d, 2, stride=2), d),
        (nn.MaxPool2d(2, stride=1), c),
        (nn.AvgPool2d(2, stride=1), c),
        (nn.AdaptiveAvgPool2d(draw.choice([2, 3])), c),
        (nn.BatchNorm2d(c), c),
        (nn.GroupNorm(1 if c % 2 else 2, c), c),
        (nn.InstanceNorm2d(c, affine=True), c),
        (nn.LocalResponseNorm(2), c),
        (nn.Upsample(scale_factor=2, mode=draw.choice(["nearest", "bilinear"])), c),
        (pad(1), c),
    ]


KINDS = {"rows": rows, "steps": steps, "words": steps, "images": images}


def network(seed):
    """Return a Module and its inputs; the same for the same seed. ``None`` where the layers do not go together."""
    draw, before = random.Random(seed), torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return _network(draw)
    except (RuntimeError, ValueError):
        return None
    finally:
        torch.set_rng_state(before)


def _network(draw):
    kind, c, n = draw.choice(list(KINDS)), draw.choice([2, 3, 4, 5]), draw.choice([3, 4, 5])
    shape = {
        "rows": (n, c),
        "steps": (n, draw.choice([3, 4, 5]), c),
        "words": (n, 4),
        "images": (n, c, 4, 5),
    }
    words = kind == "words"
    layers = [nn.Embedding(7, c, padding_idx=draw.choice([None, 0]))] if words else []
    for _ in range(draw.randint(1, 4)):
        options = KINDS[kind](draw, c, draw.choice([2, 3, 4]))
        layer, c = draw.choice([*options, (draw.choice(ACTIVATIONS)(), c)])
        layers.append(layer)
    body = nn.Sequential(*layers).double()
    x = torch.randn(shape[kind], dtype=torch.float64, requires_grad=True)
    x = torch.randint(7, shape[kind]) if words else x
    y = body(x).detach()
    if draw.random() < 0.6:
        return body.train(draw.random() < 0.8), (x,)
    loss = draw.choice(LOSSES)(reduction=draw.choice(["mean", "sum", "none"]))
    target = torch.rand_like(y)
    if isinstance(loss, nn.CrossEntropyLoss):
        target = torch.randint(y.shape[1], (len(y), *y.shape[2:]))
    return Trained(body, loss), (x, target)
