"""``torchbp.watch``: what a model's gradients do while it trains, and what is wrong with them."""

from torchbp.monitor._diagnosis import Verdict as Verdict
from torchbp.monitor._monitor import Monitor as Monitor
from torchbp.monitor._watch import watch as watch
from torchbp.monitor.range_test import RangeTest as RangeTest
from torchbp.monitor.range_test import lr_range_test as lr_range_test

__all__ = ["Monitor", "RangeTest", "Verdict", "lr_range_test", "watch"]
