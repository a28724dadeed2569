"""The checks: each a small pure function of the evidence, in the file of its subject."""

import pkgutil
from dataclasses import replace
from importlib import import_module

from ..evidence import Evidence
from ..finding import SEVERITIES, Finding
from .registry import REGISTERED, Check

for _module in pkgutil.iter_modules(__path__):
    import_module(f".{_module.name}", __name__)  # registers the checks in it

CHECKS: dict[str, Check] = {c.identifier: c for c in sorted(REGISTERED, key=lambda c: c.identifier)}

__all__ = ["CHECKS", "Check", "run_checks"]


def run_checks(evidence: Evidence) -> list[Finding]:
    """Every check's findings, the most severe first, otherwise in the checks' and the layers' order."""
    order = {layer.name: index for index, layer in enumerate(evidence.layers)}
    findings = [
        replace(finding, check=check.identifier)
        for check in CHECKS.values()
        for finding in check.function(evidence)
    ]
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.check, order.get(f.layer, -1)))
