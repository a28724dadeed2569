"""What is wrong with the batch normalization in a model, and how to mend it."""

from .diagnosis import diagnose
from .finding import Finding, Severity
from .report import Report

__all__ = ["Finding", "Report", "Severity", "diagnose"]
