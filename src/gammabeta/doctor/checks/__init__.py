"""The checks: each one small pure function of the evidence, in a file of its own."""

import pkgutil
from importlib import import_module

from ..evidence import Evidence
from ..finding import SEVERITIES, Finding
from ._registry import CHECKS, Check

for _module in pkgutil.iter_modules(__path__):
    import_module(f".{_module.name}", __name__)  # registers its check

__all__ = ["CHECKS", "Check", "run_checks"]


def run_checks(evidence: Evidence) -> list[Finding]:
    """Every check's findings, the most severe first, otherwise in the checks' and the layers' order."""
    order = {layer.name: index for index, layer in enumerate(evidence.layers)}
    ranks = {identifier: index for index, identifier in enumerate(CHECKS)}
    findings = [finding for check in CHECKS.values() for finding in check.function(evidence)]
    return sorted(
        findings,
        key=lambda f: (SEVERITIES.index(f.severity), ranks[f.check], order.get(f.layer, -1)),
    )
