"""The doctor's suite checks before it times."""

import pytest

from benchmarks.harness import IncorrectError, Options
from benchmarks.suites import doctor


def test_what_is_inexact_is_not_timed(monkeypatch):
    assert doctor.inexactness() <= doctor.ALLOWED
    monkeypatch.setattr(doctor, "ALLOWED", 1e-12)
    with pytest.raises(IncorrectError, match="off by"):
        doctor.run(Options(quick=True))
