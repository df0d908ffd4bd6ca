"""gradcheck: finds the wrong gradient, and says what is wrong. For anybody's Function, callable or Module."""

from torchbp.verify._gradcheck import gradcheck as gradcheck
from torchbp.verify.report import Capability as Capability
from torchbp.verify.report import Finding as Finding
from torchbp.verify.report import GradientError as GradientError
from torchbp.verify.report import Report as Report

__all__ = ["Capability", "Finding", "GradientError", "Report", "gradcheck"]
