"""One rule for hooks: what a hook sees stays what it was, whether it is on one module or on all."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import gammabeta as gb
from gammabeta.accelerate.packed import unavailable
from gammabeta.graph.layers import hook_on, hooked
from gammabeta.graph.trace import convolutions_before_batch_norm

Register = Callable[[nn.Module], Any]

GLOBAL: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "forward hook": torch_module.register_module_forward_hook,
    "forward pre-hook": torch_module.register_module_forward_pre_hook,
    "backward hook": torch_module.register_module_full_backward_hook,
    "backward pre-hook": torch_module.register_module_full_backward_pre_hook,
}
OWN: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(nothing),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(nothing),
    "backward hook": lambda m: m.register_full_backward_hook(nothing),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(nothing),
}


def nothing(*_: Any) -> None:
    """See what passes and leave it."""


def network() -> nn.Sequential:
    """A convolution, its batch norm and an activation, with statistics of their own."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model(torch.randn(8, 3, 9, 9))
    return model


def fused(model: nn.Module) -> list[str]:
    """What a converted model computes with its batch norms."""
    return [change.fused for change in model.conversion_report.fused]  # type: ignore[union-attr]


@pytest.fixture(params=GLOBAL)
def on_all_modules(request: pytest.FixtureRequest) -> Iterator[str]:
    """A hook on every module there is."""
    handle = GLOBAL[request.param](nothing)
    yield request.param
    handle.remove()


@pytest.mark.parametrize("kind", OWN)
def test_a_hook_of_its_own(kind: str) -> None:
    model = network()
    assert not any(map(hooked, model.modules()))
    handle = OWN[kind](model[1])
    assert [hook_on(module) for module in model] == ["", f"a {kind}", ""]
    assert fused(gb.convert(model)) == []
    assert convolutions_before_batch_norm(model) == []
    report = gb.fold(model, torch.randn(2, 3, 9, 9)).fold_report
    assert f"is seen by a {kind} on 1" in report.layers[0].reason
    handle.remove()
    assert not hooked(model[1])


def test_a_hook_on_all_modules_is_one_on_each(on_all_modules: str) -> None:
    assert hook_on(nn.ReLU()) == f"a global {on_all_modules}"
    assert hooked(nn.ReLU())


def test_nothing_is_fused_folded_or_paired_that_a_global_hook_sees(on_all_modules: str) -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    converted = gb.convert(model, example=x)
    assert isinstance(converted[1], gb.nn.BatchNorm2d)
    assert fused(converted) == []
    assert "hooks" in converted.conversion_report.changes[0].reason
    assert convolutions_before_batch_norm(model) == []
    folded = gb.fold(model, x)
    assert type(folded[1]) is nn.BatchNorm2d
    assert f"is seen by a global {on_all_modules} on 0" in folded.fold_report.layers[0].reason
    assert folded.fold_report.packed == ()


@pytest.mark.skipif(bool(unavailable()), reason="this torch has no oneDNN")
def test_without_the_hooks_all_of_it_is_done() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    assert fused(gb.convert(model)) == ["relu"]
    assert len(convolutions_before_batch_norm(model)) == 1
    report = gb.fold(model, x, pack=True).fold_report
    assert (report.layers[0].outcome, report.packed) == ("folded", ("0",))


def test_what_a_global_hook_sees_later_is_what_it_saw_before() -> None:
    model = network().eval()
    converted, x = gb.convert(model), torch.randn(2, 3, 9, 9)
    wanted = converted(x)
    seen: list[tuple[str, torch.Tensor]] = []
    handle = torch_module.register_module_forward_hook(
        lambda module, _, out: seen.append((type(module).__name__.removeprefix("Fused"), out.clone()))
    )
    try:
        for one in (model, converted):
            one(x)
    finally:
        handle.remove()
    first, second = seen[:4], seen[4:]
    assert [name for name, _ in first] == [name for name, _ in second]
    torch.testing.assert_close([out for _, out in first], [out for _, out in second])
    torch.testing.assert_close(converted(x), wanted, rtol=0, atol=0)
