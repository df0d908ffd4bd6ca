"""The demo's networks: deep, and different in one thing each."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from torchbp import nn

__all__ = ["networks"]


def networks(inputs: int, classes: int, depth: int, width: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield deep networks that differ in one thing each: activation, initialisation, or normalization and residual."""

    def plain(
        activation: type[nn.Module], init: Callable[[Tensor], object] | None = None
    ) -> nn.Module:
        layers: dict[str, nn.Module] = {}
        for i in range(depth):
            linear = nn.Linear(inputs if i == 0 else width, width)
            if init is not None:
                init(linear.weight)
                nn.init.zeros_(linear.bias)
            layers[f"linear{i + 1:02}"] = linear
            layers[f"{activation.__name__.lower()}{i + 1:02}"] = activation()
        return nn.Sequential(OrderedDict(layers, output=nn.Linear(width, classes)))

    def he(weight: Tensor, gain: float = 1.0) -> None:
        nn.init.kaiming_normal_(weight, nonlinearity="relu").data.mul_(gain)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.linear = nn.Linear(width, width)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.relu(self.linear(self.norm(x)))

    def residual() -> nn.Module:
        layers: dict[str, nn.Module] = {"linear01": nn.Linear(inputs, width)}
        layers |= {f"block{i:02}": Residual() for i in range(2, depth + 1)}
        layers |= {"norm": nn.LayerNorm(width), "output": nn.Linear(width, classes)}
        return nn.Sequential(OrderedDict(layers))

    yield "sigmoid", plain(nn.Sigmoid)
    yield "tanh, Xavier", plain(nn.Tanh, nn.init.xavier_uniform_)
    yield "relu, He init", plain(nn.ReLU, he)
    yield "relu, init x2", plain(nn.ReLU, partial(he, gain=2.0))
    yield "norm + residual", residual()
