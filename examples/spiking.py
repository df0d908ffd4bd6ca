"""Alternative: a network of spiking neurons reads digits; SurrogateSpike gives the step function a gradient.

A neuron's potential leaks, adds up what comes in, and sends a spike of 1 where it passes a threshold. The derivative
of that step is 0 almost everywhere, so backward takes a smooth stand-in (Neftci et al. 2019, arXiv:1901.09948).
"""

import sys

import torch
from _data import digits
from _program import batches, finish, parser, track
from torch import Tensor

import torchbp
import torchbp.functional as F
from torchbp import nn


class Spiking(nn.Module):
    """One layer of leaky integrate-and-fire neurons, and outputs that add up its spikes."""

    def __init__(self, inputs: int, width: int, classes: int, leak: float = 0.9) -> None:
        super().__init__()
        self.leak = leak
        self.hidden, self.output = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.spike = nn.SurrogateSpike()

    def forward(self, spikes: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``(N, classes)`` and the mean rate of spikes, for input spikes ``(T, N, inputs)``."""
        potential = torch.zeros(spikes.shape[1], self.hidden.out_features)
        total, count = torch.zeros(spikes.shape[1], self.output.out_features), torch.zeros(())
        for arriving in spikes:
            potential = self.leak * potential + self.hidden(arriving)
            sent = self.spike(potential - 1.0)
            potential = potential - sent.detach()
            total = total + self.output(sent)
            count = count + sent.mean()
        return total / len(spikes), count / len(spikes)


def main() -> int:
    """Train on digits whose pixels send spikes at a rate that is their brightness."""
    options = parser(__doc__, "spiking")
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--times", type=int, default=16, help="time steps a picture (%(default)s)")
    options.add_argument(
        "--thrift", type=float, default=0.5, help="the price of a spike (%(default)s)"
    )
    options.add_argument("--lr", type=float, default=2e-3)
    args = options.parse_args()
    torch.manual_seed(args.seed)
    data, steps = digits(), 5 if args.small else args.steps

    def spikes(x: Tensor) -> Tensor:
        return torch.bernoulli(x.flatten(1).expand(args.times, -1, -1))

    model = Spiking(64, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    with torchbp.watch(model, optimizer, log_dir=args.log_dir) as monitor:
        for rows in track(batches(len(data.x), 64, steps), steps, "training"):
            logits, rate = model(spikes(data.x[rows]))
            loss = F.cross_entropy(logits, data.y[rows]) + args.thrift * rate
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss)
            monitor.log("spikes/rate", rate)
        with torch.no_grad():
            logits, rate = model(spikes(data.test_x))
        accuracy = (logits.argmax(1) == data.test_y).float().mean().item()
    return finish(
        args,
        {"test accuracy": accuracy, "spikes per neuron and time step": rate.item()},
        promised={
            "test accuracy is at least 92 %": accuracy >= 0.92,
            "neurons are silent three quarters of the time": rate.item() < 0.25,
        },
        monitor=monitor,
    )


if __name__ == "__main__":
    sys.exit(main())
