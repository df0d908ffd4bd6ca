"""Long memory: of 200 pairs of a number and a mark, add the two marked numbers (Hochreiter and Schmidhuber 1997).

A plain recurrent network learns nothing: its gradient vanishes on the way back through time, which is measured. An LSTM
learns it. Answering 1 always has a mean squared error of 0.167.
"""

import argparse
import sys

import torch
from _program import finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn
from torchbp.monitor import Monitor


def sums(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return ``count`` sequences ``(length, count, 2)`` of numbers and marks, and the sum of the two marked ones."""
    numbers, marks = torch.rand(length, count), torch.zeros(length, count)
    first = torch.randint(length // 2, (count,))
    second = torch.randint(length // 2, length, (count,))
    columns = torch.arange(count)
    marks[first, columns] = marks[second, columns] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


@torch.no_grad()
def remember(lstm: nn.LSTM, length: int) -> None:
    """Let each unit forget, to begin with, at a time scale of its own up to ``length`` (chrono).

    Tallec and Ollivier 2018, arXiv:1804.11188: forget gates have the bias log U(1, length − 1), input gates minus it.
    """
    width = lstm.hidden_size
    scales = torch.empty(width).uniform_(1, length - 1).log()
    lstm.get_parameter("bias_ih_l0")[:width] = -scales
    lstm.get_parameter("bias_ih_l0")[width : 2 * width] = scales
    lstm.get_parameter("bias_hh_l0").zero_()


class Adder(nn.Module):
    """A recurrent layer, and a linear layer on its last output."""

    def __init__(self, kind: type[nn.RNN] | type[nn.LSTM], width: int, length: int) -> None:
        super().__init__()
        self.recurrent = kind(2, width)
        self.output = nn.Linear(width, 1)
        if isinstance(self.recurrent, nn.LSTM):
            remember(self.recurrent, length)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer ``(N,)`` for ``(L, N, 2)``."""
        return self.output(self.recurrent(x)[0][-1])[:, 0]


def reach(model: Adder, x: Tensor, y: Tensor) -> float:
    """Return how much less gradient the first time step receives than the last: ‖∂L/∂x₁‖ / ‖∂L/∂x_T‖."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(model(x), y), x)
    return (gradient[0].norm() / gradient[-1].norm()).item()


def train(
    kind: type[nn.RNN] | type[nn.LSTM], args: argparse.Namespace, steps: int, length: int
) -> tuple[float, float, Monitor]:
    """Return the error on new sequences, the reach at the start, and what the monitor saw."""
    torch.manual_seed(args.seed)
    model = Adder(kind, args.width, length)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    test = sums(500, length)
    begin = reach(model, *test)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir / kind.__name__.lower()) as monitor:
        for _ in track(range(steps), steps, kind.__name__):
            x, y = sums(args.batch, length)
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            monitor.log_loss(train=loss)
        with torch.no_grad():
            error = F.mse_loss(model(test[0]), test[1])
        monitor.log_loss(val=error)
    return error.item(), begin, monitor


def main() -> int:
    """Train both, and compare."""
    options = parser(__doc__, "adding_problem")
    options.add_argument("--steps", type=int, default=800)
    options.add_argument("--length", type=int, default=200)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--lr", type=float, default=5e-3)
    args = options.parse_args()
    steps, length = (10, 30) if args.small else (args.steps, args.length)
    rnn, rnn_reach, told = train(nn.RNN, args, steps, length)
    lstm, lstm_reach, monitor = train(nn.LSTM, args, steps, length)
    print(
        f"what the monitor says of the plain recurrent network:\n{told.summary()}\nand of the LSTM:"
    )
    return finish(
        args,
        {
            "RNN's mean squared error": rnn,
            "RNN's gradient at the first time step, of the last's": rnn_reach,
            "LSTM's mean squared error": lstm,
            "LSTM's gradient at the first time step, of the last's": lstm_reach,
        },
        promised={
            "the RNN does no better than always answering 1": rnn > 0.12,
            "its gradient vanishes through time": rnn_reach < 1e-5,
            "the LSTM learns it": lstm < 0.03,
        },
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
