"""What tests of the monitor train, on a GPU and where one is pretended: a layer that runs once a time step, a step."""

from torch import nn

__all__ = ["Cells", "step"]


class Cells(nn.Module):
    """An LSTM cell by hand, so that a layer runs once a time step and has two outputs."""

    def __init__(self, size, width, classes):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(size, width), nn.Linear(width, classes)

    def forward(self, x):  # (N, L, size) -> (N, classes)
        state = None
        for now in x.unbind(1):
            state = self.cell(now, state)
        return self.head(state[0])


def step(model, optimizer, x, y):
    """Return the loss of a step of training, the classes ``y`` being right."""
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss
