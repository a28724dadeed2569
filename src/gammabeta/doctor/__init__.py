"""What is wrong with the batch normalization in a model, and how to mend it."""

from typing import TYPE_CHECKING

from ..lazy import importer

if TYPE_CHECKING:
    from .diagnosis import diagnose as diagnose
    from .finding import Finding as Finding
    from .finding import Severity as Severity
    from .report import Report as Report

_NAMES = {"Finding": ".finding", "Report": ".report", "Severity": ".finding", "diagnose": ".diagnosis"}
__all__ = ["Finding", "Report", "Severity", "diagnose"]
__getattr__ = importer(__name__, _NAMES)
