"""Language: an LSTM reads Shakespeare character by character, and writes on.

Its state is carried from batch to batch, so that it can learn from further back than one batch is long; the gradient
is cut there (truncated backpropagation through time).
"""

import sys

import torch
from _data import shakespeare
from _program import finish, parser, track
from torch import Tensor

import torchbp
from torchbp import nn

State = tuple[Tensor, Tensor]


class Writer(nn.Module):
    """Embedding, LSTM, linear layer: logits of the next character."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 64)
        self.lstm = nn.LSTM(64, width)
        self.output = nn.Linear(width, symbols)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return logits ``(L, N, symbols)`` and the new state, for characters ``(L, N)``."""
        y, after = self.lstm(self.embedding(x), state)
        return self.output(y), after

    @torch.no_grad()
    def write(self, start: Tensor, length: int, temperature: float = 0.7) -> Tensor:
        """Return ``length`` characters that follow ``start``."""
        logits, state = self(start[:, None])
        written = []
        for _ in range(length):
            chosen = torch.multinomial((logits[-1] / temperature).softmax(-1), 1)
            written.append(chosen)
            logits, state = self(chosen, state)
        return torch.cat(written).flatten()


def lanes(numbers: Tensor, count: int) -> Tensor:
    """Lay a text side by side in ``count`` columns, ``(L, count)``."""
    length = len(numbers) // count
    return numbers[: length * count].view(count, length).T


def main() -> int:
    """Train, measure on the last tenth of the text, write a few lines."""
    options = parser(__doc__, "shakespeare_lstm")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--lr", type=float, default=4e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    text = shakespeare(limit=40_000 if args.small else None)
    steps, width = (10, 32) if args.small else (args.steps, args.width)
    length, count = 64, 32

    model = Writer(len(text.symbols), width)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    columns = lanes(text.train, count)
    state = None
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for step in track(range(steps), steps, f"reading {text.name}"):
            at = step * length % (len(columns) - length - 1)
            x, y = columns[at : at + length], columns[at + 1 : at + length + 1]
            if state is not None:
                state = (state[0].detach(), state[1].detach())
            logits, state = model(x, state)
            loss = criterion(logits.flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            monitor.log_loss(train=loss)
        held_out = lanes(text.test[:100_000], 64)
        with torch.no_grad():
            logits, _ = model(held_out[:-1])
            nats = criterion(logits.flatten(0, 1), held_out[1:].flatten()).item()
        monitor.log_loss(val=nats)
    print(text.decode(model.write(text.test[:200], 300)), "\n")
    return finish(
        args,
        {"nats per character, held out": nats},
        promised={"at most 1.95 nats per character": nats <= 1.95},
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
