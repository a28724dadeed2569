"""The guard: what it says, when, and that it changes nothing."""

import warnings
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gammabeta as gb
from benchmarks.guard.trainings import FAULTS, HEALTHY
from gammabeta.errors import UsageError
from gammabeta.guard import GuardError, Noticed

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (96,), generator=torch.Generator().manual_seed(2))


def small(**settings: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, **settings), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def train(model: nn.Module, steps: int = 40, guarded: bool = True, **options: object) -> list[Noticed]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    noticed: list[Noticed] = []
    guard = gb.watch(model, optimizer, tell=noticed.append, **options) if guarded else None
    torch.manual_seed(3)
    for _ in range(steps):
        index = torch.randperm(96)[:32]
        optimizer.zero_grad()
        F.cross_entropy(model(X[index]), Y[index]).backward()
        optimizer.step()
    if guard is not None:
        guard.close()
    return noticed


def codes(noticed: list[Noticed]) -> list[tuple[int, str]]:
    return [(one.step, one.finding.check) for one in noticed]


@pytest.mark.parametrize("convert", [False, True])
def test_a_training_is_the_same_to_the_bit(convert):
    plain, watched = small(), small()
    if convert:
        plain, watched = gb.convert(plain), gb.convert(watched)
    train(plain, guarded=False)
    state = torch.get_rng_state()
    train(watched, held=[(X[:32], Y[:32]), (X[32:64], Y[32:64])], loss=F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert not any(m._forward_pre_hooks for m in watched.modules())


def test_a_healthy_training_is_passed_in_silence():
    assert not train(small(), steps=70)


def test_each_fault_is_told_once_and_with_the_doctors_words(capsys):
    model = small(momentum=0.99)
    noticed = train(model)
    assert codes(noticed) == [(1, "momentum")]
    assert "momentum is 0.99" in str(noticed[0])
    with gb.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as guard:
        F.cross_entropy(model(X[:32]), Y[:32]).backward()
        guard.step()
    assert "warning momentum in 1: momentum is 0.99" in capsys.readouterr().err


def test_an_error_stops_the_training():
    with pytest.raises(GuardError, match="momentum is 0"):
        train(small(momentum=0.0), on="error")


def test_nan_in_one_batch_of_many_is_counted_for_our_layers():
    model = gb.convert(small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gb.watch(model, optimizer, tell=lambda _: None) as guard, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(32):
            x = X[:32] * float("nan") if step == 20 else X[:32] + step
            model(x)
            optimizer.step()
    assert [(n.finding.check, n.finding.values["left_out"]) for n in guard.noticed] == [
        ("invalid-statistics", 1)
    ]


def test_without_an_optimizer_each_pass_is_a_step():
    model = small()
    with gb.watch(model, tell=lambda _: None) as guard:
        for _ in range(5):
            model(X[:32])
    assert guard.steps == 4  # the fifth goes on


def test_what_cannot_be_asked():
    with pytest.raises(UsageError, match="'tell' or 'error'"):
        gb.watch(small(), on="raise")
    with pytest.raises(UsageError, match="no batches"):
        gb.watch(small(), held=[])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_noticed_within_fifty_steps(name):
    steps = []
    for seed in range(3):
        torch.manual_seed(seed)
        fault = FAULTS[name]
        found = [n.step - fault.begins for n in fault.make().run() if n.finding.check in fault.codes]
        steps.append(min(found, default=999))
    assert median(steps) <= 50


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_no_alarm_over_a_healthy_training(name):
    torch.manual_seed(7)
    assert not HEALTHY[name]().run()
