"""The networks that memory is measured on: plain torch.nn, as their authors would write them.

Widths, depths, lengths, vocabularies stand here and nowhere else. ``MODELS[name]`` makes one, with its inputs and loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "GPT",
    "LSTM",
    "MODELS",
    "WORDS",
    "Configuration",
    "LanguageModel",
    "Llama",
    "ResNet",
    "UNet",
    "ViT",
]


class Attention(nn.Module):
    """Self-attention of several heads; ``rotary`` turns queries and keys by their position (RoPE)."""

    def __init__(self, width: int, heads: int, causal: bool, rotary: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


def rotated(x: Tensor) -> Tensor:  # (B, H, T, D)
    """Return ``x`` with each pair (i, i + D/2) of its features turned by an angle that grows with the position."""
    time, features = x.shape[-2:]
    frequency = 10000.0 ** -(torch.arange(0, features, 2, device=x.device) / features)
    angle = torch.outer(torch.arange(time, device=x.device), frequency).repeat(1, 2)
    a, b = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat([-b, a], -1) * angle.sin().to(x.dtype)


class TransformerBlock(nn.Module):
    """Attention and a GELU perceptron, each behind a LayerNorm, each with a residual connection."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal, rotary=False, bias=True)
        self.drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer (GPT-2): tokens (B, T) -> hidden states (B, T, C), or logits (B, T, V)."""

    def __init__(
        self, vocabulary: int, width: int, heads: int, depth: int, length: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, True, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return what the head reads."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.token(tokens) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


class LanguageModel(nn.Module):
    """A GPT and its loss: tokens (B, T), targets (B, T) -> scalar.

    Args:
        gpt: The network.
        criterion: Of hidden states (N, C), the last layer's weight (V, C) and targets (N,); ``None``: of logits.
    """

    def __init__(self, gpt: GPT, criterion: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.gpt, self.criterion = gpt, criterion

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        if self.criterion is None:
            return loss(self.gpt(tokens), target)
        hidden = self.gpt.hidden(tokens).flatten(0, 1)
        return self.criterion(hidden, self.gpt.head.weight, target.flatten())


class LlamaBlock(nn.Module):
    """Rotary attention and a SwiGLU perceptron, each behind an RMSNorm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=True, rotary=True, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.down = nn.Linear(hidden, width, False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(self.activation(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A decoder-only transformer as of Llama: tokens (B, T) -> hidden states (B, T, C), or logits (B, T, V)."""

    def __init__(self, vocabulary: int, width: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return what the head reads."""
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def _convolution(into: int, out: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, stride, size // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the input, or its projection, added (torchvision's BasicBlock)."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(into, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or into != width:
            self.shortcut = nn.Sequential(
                _convolution(into, width, stride, 1), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Sequential):
    """ResNet-20 of CIFAR-10 for three blocks a stage: images (N, 3, H, W) -> logits (N, classes)."""

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        layers: list[nn.Module] = [
            _convolution(3, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        into = width
        for stage in range(3):
            for i in range(blocks):
                out = width << stage
                layers.append(ResidualBlock(into, out, 2 if stage and not i else 1))
                into = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))


class UNet(nn.Module):
    """A U-Net: images (N, 3, H, W) -> logits (N, classes, H, W), with skip connections by concatenation."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()

        def stage(into: int, out: int) -> nn.Sequential:
            return nn.Sequential(
                *(_convolution(into, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
                *(_convolution(out, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
            )

        widths = [width << i for i in range(depth)]
        self.down = nn.ModuleList(map(stage, [3, *widths[:-1]], widths))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(stage(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else self.pool(x))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


class LSTM(nn.Module):
    """A recurrent language model: tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, vocabulary: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.drop(self.token(tokens)))
        return self.head(self.drop(self.norm(x)))


class ViT(nn.Module):
    """A vision transformer: images (N, 3, H, W) -> logits (N, classes), by the mean over the patches."""

    def __init__(
        self,
        side: int,
        patch: int,
        width: int,
        heads: int,
        depth: int,
        classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, False, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Configuration:
    """A network with its data.

    Attributes:
        model: Makes the network; initialised after ``torch.manual_seed``.
        data: Makes inputs and targets of a batch of this many samples.
        batch: The size measured with.
        small: The same network, a few thousand parameters, for tests; its data are ``small_data``.
        small_data: Inputs and targets for ``small``.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int
    small: Callable[[], nn.Module]
    small_data: Callable[[int], tuple[Tensor, Tensor]]


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy over all positions: of tokens (B, T), images (N,), or pixels (N, H, W)."""
    if target.dim() == 2:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return F.cross_entropy(logits, target)


def _tokens(vocabulary: int, length: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def data(batch: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(vocabulary, (batch, length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    return data


def _images(side: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, 3, side, side), torch.randint(classes, (batch,)))


def _pixels(side: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (
        torch.randn(batch, 3, side, side),
        torch.randint(classes, (batch, side, side)),
    )


MODELS = {
    "GPT": Configuration(
        lambda: GPT(vocabulary=256, width=512, heads=8, depth=6, length=256),
        _tokens(256, 256),
        4,
        lambda: GPT(vocabulary=17, width=16, heads=2, depth=2, length=8, dropout=0.1),
        _tokens(17, 8),
    ),
    "Llama": Configuration(
        lambda: Llama(vocabulary=256, width=512, heads=8, hidden=1408, depth=6),
        _tokens(256, 256),
        4,
        lambda: Llama(vocabulary=17, width=16, heads=2, hidden=24, depth=2),
        _tokens(17, 8),
    ),
    "ResNet-20": Configuration(
        lambda: ResNet(width=16, blocks=3, classes=10),
        _images(32, 10),
        128,
        lambda: ResNet(width=4, blocks=3, classes=5),
        _images(8, 5),
    ),
    "U-Net": Configuration(
        lambda: UNet(width=32, depth=4, classes=4),
        _pixels(128, 4),
        4,
        lambda: UNet(width=4, depth=3, classes=3),
        _pixels(8, 3),
    ),
    "LSTM": Configuration(
        lambda: LSTM(vocabulary=1000, width=256, depth=2, dropout=0.2),
        _tokens(1000, 64),
        32,
        lambda: LSTM(vocabulary=17, width=8, depth=2, dropout=0.2),
        _tokens(17, 5),
    ),
    "ViT": Configuration(
        lambda: ViT(side=64, patch=8, width=384, heads=6, depth=6, classes=100, dropout=0.0),
        _images(64, 100),
        16,
        lambda: ViT(side=8, patch=4, width=16, heads=2, depth=2, classes=5, dropout=0.1),
        _images(8, 5),
    ),
}

# Few layers and many words: the logits are most of what is kept.
WORDS = Configuration(
    lambda: LanguageModel(GPT(vocabulary=32000, width=256, heads=8, depth=4, length=128)),
    _tokens(32000, 128),
    16,
    lambda: LanguageModel(GPT(vocabulary=97, width=16, heads=2, depth=2, length=8)),
    _tokens(97, 8),
)
