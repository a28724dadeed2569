"""How far it is from ``batch_norm`` to the compiled kernel: five files, as docs/design/house.md draws it."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import gammabeta as gb

PACKAGE = Path(gb.__file__).parent
# Through these the call is handed on, each to the next: checked, routed, differentiated, laid out, launched.
PATH = [
    "functional/__init__.py",
    "functional/step.py",
    "functional/autograd.py",
    "kernels/cpu/host.py",
    "kernels/cpu/launch.py",
]
# These are asked on the way and answer at once: a name, a layout, a reason, an address, memory.
ASKED = {
    "epilogue.py",
    "kernels/backend.py",
    "kernels/layout.py",
    "kernels/cpu/allocator.py",
    "kernels/cpu/arguments.py",
    "kernels/cpu/compiler.py",
}


def place(frame: FrameType) -> str | None:
    """The file of a frame inside the package, or None."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def watched(function: Callable[[], Any]) -> tuple[Any, list[str], set[str]]:
    """What ``function`` returns; the files it was inside of when the first kernel ran; all it entered."""
    path: list[str] = []
    entered: set[str] = set()

    def watch(frame: FrameType, event: str, _: object) -> None:
        here = place(frame) if event == "call" else None
        if here is None:
            return
        entered.add(here)
        if here == "kernels/cpu/launch.py" and not path:
            caller: FrameType | None = frame
            while caller is not None:
                file = place(caller)
                if file is not None and file not in path:
                    path.insert(0, file)
                caller = caller.f_back

    sys.setprofile(watch)
    try:
        found = function()
    finally:
        sys.setprofile(None)
    return found, path, entered


@pytest.mark.parametrize("threads", [1, 2])
def test_five_files_to_the_kernel(threads: int) -> None:
    torch.set_num_threads(threads)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((8, 16, 32, 32), (16,), (16,)))
    mean, var, grad = torch.zeros(16), torch.ones(16), torch.randn(8, 16, 32, 32)

    def forward() -> Tensor:
        return gb.functional.batch_norm(x, mean, var, weight, bias, True, activation="relu")

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (x, weight, bias), grad)

    backward(forward())  # kernels are compiled or loaded the first time
    out, path, entered = watched(forward)
    assert path == PATH
    assert entered <= {*PATH, *ASKED}
    _, path, entered = watched(lambda: backward(out))
    assert path == PATH[2:]
    assert entered <= {*PATH, *ASKED}


@pytest.mark.parametrize("transform", ["vmap", "jacrev"])
def test_what_a_transform_forbids_names_the_way_out(transform):
    layer = gb.nn.BatchNorm2d(3).train()
    x = torch.rand(4, 3, 5, 5)
    run = {
        "vmap": torch.func.vmap(lambda image: layer(image[None]).sum()),
        "jacrev": torch.func.jacrev(lambda images: layer(images).sum()),
    }[transform]
    with pytest.raises(gb.errors.UnavailableError, match=r'eval\(\), or replace batch norm .*to="group"'):
        run(x)


def test_a_transform_that_is_given_the_statistics_may_update_them():
    layer = gb.nn.BatchNorm2d(3).train()
    x = torch.rand(4, 3, 5, 5)
    state = {**dict(layer.named_parameters()), **{k: v.clone() for k, v in layer.named_buffers()}}

    def loss(state, x):
        return torch.func.functional_call(layer, state, (x,)).square().sum()

    torch.func.grad(loss, argnums=1)(state, x)  # no error
