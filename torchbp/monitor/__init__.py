"""``torchbp.watch``: what a model's gradients do while it trains, and what is wrong with them."""

from torchbp.monitor._diagnosis import Verdict as Verdict
from torchbp.monitor._monitor import Monitor as Monitor
from torchbp.monitor._monitor import watch as watch

__all__ = ["Monitor", "Verdict", "watch"]
