"""``Summary``: the findings with the evidence they rest on, as data that every rendering reads."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from ..jsontext import finite, to_json
from ..text import visible
from .checks import CHECKS
from .checks.drift import measure
from .evidence import Evidence, Layer
from .finding import SEVERITIES, Finding, Severity

SCHEMA = "gammabeta.doctor/1"
GAP = ("train", "bn_train", "population", "evaluation", "output_change", "output_noise")  # fields shown


@dataclass(frozen=True)
class Group:
    """Findings of one check that share severity, cause and fix: the first speaks for all their layers.

    A layer is "(model)" where the model as a whole is meant.
    """

    first: Finding
    layers: list[str]

    def names(self, most: int) -> str:
        """The layers in one line, of which at most ``most`` are named."""
        more = f" and {len(self.layers) - most} more" if len(self.layers) > most else ""
        return ", ".join(map(visible, self.layers[:most])) + more

    @property
    def texts(self) -> dict[str, str]:
        """What was found (in the first layer), the cause and the fix, by these headings."""
        found = (f"{self.layers[0]}: " if len(self.layers) > 1 else "") + self.first.evidence
        texts = {"found": found, "cause": self.first.cause, "fix": self.first.fix}
        return {label: visible(text) for label, text in texts.items()}

    @property
    def code(self) -> str:
        """The fix as Python to paste, for all the layers; empty for a note, or where words must do."""
        fix = "" if self.first.severity == "note" else self.first.fix
        lines = sorted(re.findall("`(.+?)`", fix), key=lambda line: not line.startswith("layer."))
        names = [visible(name).replace("(model)", "") for name in self.layers]
        each = f"for layer in map(model.get_submodule, {names}):\n    layer."
        return "\n".join(lines).replace("layer.", each, 1)


class Summary:
    """Findings and evidence: counts, verdict, groups, rows of the table of layers, JSON."""

    def __init__(self, evidence: Evidence, findings: list[Finding]) -> None:
        self.evidence, self.findings = evidence, findings

    @property
    def healthy(self) -> bool:
        """Whether there is no error and no warning; notes are harmless."""
        return not self.at_least("warning")

    def at_least(self, severity: Severity) -> list[Finding]:
        """The findings of this severity, or more severe."""
        return [finding for finding in self.findings if finding.at_least(severity)]

    def count(self, severity: Severity) -> int:
        """How many findings have exactly this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def groups(self) -> list[Group]:
        """The findings, those of one check with the same severity, cause and fix together."""
        together: dict[tuple[str, ...], Group] = {}
        for finding in self.findings:
            key = (finding.check, finding.severity, finding.cause, finding.fix)
            together.setdefault(key, Group(finding, [])).layers.append(finding.layer or "(model)")
        return list(together.values())

    @property
    def verdict(self) -> str:
        """One sentence."""
        headline, counts = self.headline
        return f"{headline} ({counts})." if counts else headline

    @property
    def headline(self) -> tuple[str, str]:
        """The verdict in its two parts: what is wrong, and how many findings there are in what."""
        layers = len(self.evidence.layers)
        if not layers and not self.findings:
            return "No batch normalization found.", ""
        looked = _counted(layers, "batch-normalization layer")
        if self.evidence.samples:
            looked += f" on {self.evidence.samples} sample{'s' * (self.evidence.samples != 1)}"
        counts = [_counted(self.count(kind), kind) for kind in SEVERITIES if self.count(kind)]
        if self.healthy:
            return ", ".join([f"Healthy: no error or warning in {looked}", *counts]) + ".", ""
        found = CHECKS[self.findings[0].check].doc.partition(".\n")[0].replace("`", "")
        return f"Not healthy: {found[0].lower()}{found[1:]}", f"{', '.join(counts)} in {looked}"

    @property
    def in_short(self) -> str:
        """What to do first, as a beginner would say it; empty where nothing is to be done."""
        if self.healthy:
            return ""
        worst = self.groups[0]
        where = "" if worst.layers[0] == "(model)" else f" (layer {worst.names(1)})"
        return visible(f"In short: {worst.first.cause}{where}. Do first: {worst.first.fix}.").replace("`", "")

    def exit_code(self, severity: Severity = "warning") -> int:
        """For a command line: 1 with findings of this severity or above, else 0."""
        return int(bool(self.at_least(severity)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; the schema is documented and versioned (see ``SCHEMA``)."""
        gap = self.evidence.gap
        row: dict[str, Any] = finite(
            {
                "schema": SCHEMA,
                "gammabeta": __version__,
                "healthy": self.healthy,
                "verdict": self.verdict,
                "in_short": self.in_short,
                "counts": {severity: self.count(severity) for severity in SEVERITIES},
                "findings": [asdict(finding) for finding in self.findings],
                "layers": [self.layer_row(layer) for layer in self.evidence.layers],
                "gap": None if gap is None else {key: getattr(gap, key) for key in GAP},
                "samples": self.evidence.samples,
                "not_examined": self.evidence.not_examined,
            }
        )
        return row

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON; numbers that are not finite are null."""
        return to_json(self.to_dict(), indent=2, ensure_ascii=False)

    def layer_row(self, layer: Layer) -> dict[str, Any]:
        """One layer in the table of layers; the drift is None where no data reached the layer."""
        seen = self.evidence.seen(layer)
        drift = measure(layer, seen) if seen is not None and layer.stored else None
        severities = [f.severity for f in self.findings if f.layer == layer.name]
        return {
            "name": layer.name,
            "kind": layer.kind,
            "channels": layer.channels,
            "eps": layer.eps,
            "momentum": layer.momentum,
            "updates": layer.updates,
            "training": layer.training,
            "frozen": layer.frozen,
            "calls": self.evidence.around(layer).calls,
            "drift_mean": drift.mean if drift else None,
            "drift_log_variance": drift.variance if drift else None,
            "worst": min(severities, key=SEVERITIES.index, default=None),
        }

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
