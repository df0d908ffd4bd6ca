"""``torchbp.convert`` and ``torchbp.revert``: torchbp's layers in a model that is already built."""

from torchbp.swap._fused_loss import fuse_loss as fuse_loss
from torchbp.swap._swap import Report as Report
from torchbp.swap._swap import convert as convert
from torchbp.swap._swap import report as report
from torchbp.swap._swap import revert as revert
from torchbp.swap._swap import twins as twins

__all__ = ["Report", "convert", "fuse_loss", "report", "revert", "twins"]
