"""TensorBoard event files with one vector a quantity and step: the writer, and the reader.

Never imports torch: TensorBoard itself may load this package.
"""

from torchbp.tensorboard._reader import Run as Run
from torchbp.tensorboard._reader import Series as Series
from torchbp.tensorboard._reader import read as read
from torchbp.tensorboard._writer import BorrowedWriter as BorrowedWriter
from torchbp.tensorboard._writer import EventWriter as EventWriter
from torchbp.tensorboard._writer import Layout as Layout

__all__ = ["BorrowedWriter", "EventWriter", "Layout", "Run", "Series", "read"]
