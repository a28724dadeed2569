"""Which code asks for a class, so that its module or the parts of it are left; what only looks like it."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import gammabeta as gb


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.part = nn.ModuleDict()

    def forward(self, x):
        return F.relu(self.bn(x))


class OfOthers(Net):
    """Torch's functions, a name, what a subclass inherits, a dtype, a save that no call reaches."""

    gain = 2.0

    def save(self):
        return type(self) is OfOthers

    def forward(self, x):
        torch._assert(x.dim() == 4, f"{type(self).__name__} takes images")
        return F.relu(self.bn(x.type(torch.float32))) * type(self).gain


class Itself(Net):
    def forward(self, x):
        return F.relu(self.bn(x)) if type(self) is Itself else x


def ask(module):
    return type(module) is Itself


class ByAFunction(Net):
    def scaled(self, x):
        return x if ask(self) else x * 2

    def forward(self, x):
        return self.scaled(F.relu(self.bn(x)))


def checked(forward):
    @functools.wraps(forward)
    def run(self, x):
        return forward(self, x) if [type(m) for m in self.children()] else x

    return run


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    @checked
    def forward(self, x):
        return self.net(x)


def change(model):
    (found,) = gb.convert(model).conversion_report.changes
    return found


def test_what_is_no_question_for_a_class_is_rewritten():
    assert change(Net()).fused == "relu"
    assert change(OfOthers()).fused == "relu"


def test_a_question_for_its_own_class_is_found_and_said():
    for kind in (Itself, ByAFunction):
        found = change(kind())
        assert not found.fused
        assert found.reason == f"in the forward of {kind.__name__}: its code asks for its own class"


def test_a_question_for_the_class_of_parts_is_found_and_said():
    found = change(Outer())
    assert not found.fused
    assert found.reason == "the code of Outer asks for the class of its modules"
