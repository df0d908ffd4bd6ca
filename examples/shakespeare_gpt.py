"""Language: a small GPT reads Shakespeare character by character, and writes on.

Attention is torch's; embedding, RMSNorm, SwiGLU, linear layers and loss have torchbp's backward.
"""

import sys

import torch
import torch.nn.functional
from _data import shakespeare
from _program import finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn


class Block(nn.Module):
    """Causal attention, then a SwiGLU layer, each behind a normalization and beside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = (
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )
        self.gate, self.up = (
            nn.Linear(width, 2 * width, bias=False),
            nn.Linear(width, 2 * width, bias=False),
        )
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream ``(N, L, D)`` after the block."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class GPT(nn.Module):
    """A decoder: logits of the next character."""

    def __init__(self, symbols: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(layers)))
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, symbols, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                torch.nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if deep else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, L, symbols)`` for characters ``(N, L)``."""
        h = self.token(x) + self.place.weight[: x.shape[1]]
        return self.output(self.norm(self.blocks(h)))

    @torch.no_grad()
    def write(self, start: Tensor, length: int, temperature: float = 0.7) -> Tensor:
        """Return ``length`` characters that follow ``start``."""
        row = start
        for _ in range(length):
            logits = self(row[None, -self.context :])[0, -1]
            row = torch.cat([row, torch.multinomial((logits / temperature).softmax(-1), 1)])
        return row[len(start) :]


def main() -> int:
    """Train with warm-up and cosine decay, measure on the last tenth of the text, write a few lines."""
    options = parser(__doc__, "shakespeare_gpt")
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--lr", type=float, default=4e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    text = shakespeare(limit=40_000 if args.small else None)
    steps, width, layers = (20, 32, 2) if args.small else (args.steps, args.width, args.layers)
    count, context = 16, 128

    model = GPT(len(text.symbols), width, layers, context)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.1
    )
    window = torch.arange(context + 1)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for _ in track(range(steps), steps, f"reading {text.name}"):
            rows = text.train[torch.randint(len(text.train) - context, (count, 1)) + window]
            loss = criterion(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            monitor.log_loss(train=loss)
        held_out = text.test[: len(text.test) // (context + 1) * (context + 1)].view(
            -1, context + 1
        )[:512]
        with torch.no_grad():
            nats = criterion(
                model(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten()
            ).item()
        monitor.log_loss(val=nats)
    print(text.decode(model.write(text.test[:100], 300)), "\n")
    return finish(
        args,
        {"nats per character, held out": nats},
        promised={"at most 2.0 nats per character": nats <= 2.0},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
