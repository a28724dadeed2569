"""What a check says: one finding about one layer, or about the model as a whole."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
RECALIBRATE = "recalibrate: `gammabeta.recalibrate(model, loader)`"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        check: identifier of the check, such as "statistics-drift"; ``run_checks`` sets it.
        layer: name of the module as ``model.named_modules()`` gives it; "" for the model as a whole.
        severity: "error": results are wrong or undefined; "warning": likely to cost accuracy or to break
            later; "note": harmless as it is.
        evidence: what was measured, in one line.
        cause: what usually leads to this.
        fix: what to do; Python to paste stands behind a colon, between `; ``layer`` in it is the finding's.
        values: the measured numbers, by name, for programs.
    """

    check: str = field(default="", kw_only=True)
    layer: str = field(default="", kw_only=True)
    severity: Severity
    evidence: str
    cause: str
    fix: str
    values: dict[str, float | int | str] = field(default_factory=dict)

    def at_least(self, severity: Severity) -> bool:
        """Whether this finding is as severe as ``severity``, or more."""
        return SEVERITIES.index(self.severity) <= SEVERITIES.index(severity)
