"""What "Copy as Python" gives runs as it stands."""

import pytest

from gammabeta.lab import snippets
from gammabeta.lab.benches.channel import Lens, look
from gammabeta.lab.benches.faults import KEYS
from gammabeta.lab.benches.mates import Company
from gammabeta.lab.benches.race import Track


def run(code: str, model: object | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the code; the network that it would train first is the session's own."""
    import contextlib
    import io

    if model is not None:
        import gammabeta as gb

        class Outcome:
            pass

        outcome = Outcome()
        outcome.model = model
        monkeypatch.setattr(gb, "fit", lambda *_: outcome, raising=False)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})
    return said.getvalue()


def test_benches_of_the_trained_network(subject, monkeypatch):
    found = look(subject, Lens(layer=1, channel=3))
    for code in (
        snippets.draw(subject),
        snippets.channel(subject, found, Lens(layer=1, channel=3)),
        snippets.mates(subject, Company(size=8, kind="one", digit=3)),
        snippets.fold(subject),
    ):
        before = {name: value.clone() for name, value in subject.model.state_dict().items()}
        try:
            assert run(code, subject.model, monkeypatch)
        finally:
            subject.model.load_state_dict(before)
            subject.model.eval()


def test_the_race(monkeypatch):
    assert "19 " in run(snippets.race(Track(batch=8, depth=2, activation="tanh")), None, monkeypatch)


def test_breaking(monkeypatch):
    said = run(snippets.breakage(frozenset({"never_updated"})), None, monkeypatch)
    assert "never-updated" in said
    assert compile(snippets.breakage(frozenset(KEYS)), "snippet", "exec")


@pytest.mark.slow
def test_the_network_is_made_as_it_says(subject, monkeypatch):
    assert "label" in run(snippets.draw(subject), None, monkeypatch)
