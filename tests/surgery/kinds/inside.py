"""Code that goes into the parts of a module without naming them: loops, lists, slices, unreadable methods."""

from torch import nn

from .base import IMAGE, OTHER
from .harness import Call, call, kind

_CALLS = (call(IMAGE), call(OTHER), Call((IMAGE,), {"aux": True}))


def parts():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(parts(), parts())


@kind(*_CALLS)
class LoopVariableIndexed(Two):
    def forward(self, x, aux=False):
        for block in self.body:
            x = block[0](x) if aux else block(x)
        return x


@kind(*_CALLS, slow=True)
class LoopVariableSliced(Two):
    def forward(self, x, aux=False):
        for block in self.body:
            if aux:
                block = block[:1]
            x = block(x)
        return x


@kind(*_CALLS, slow=True)
class LoopVariableUnpacked(Two):
    def forward(self, x, aux=False):
        for _, block in self.body.named_children():
            if aux:
                first, *_ = block
                return first(x)
            x = block(x)
        return x


@kind(*_CALLS, slow=True)
class OneOfAllModules(Two):
    def forward(self, x, aux=False):
        if aux:
            return next(m for m in self.modules() if isinstance(m, nn.Conv2d))(x)
        return self.body(x)


@kind(*_CALLS, slow=True)
class ChildrenOfChildren(Two):
    def forward(self, x, aux=False):
        if aux:
            return next(next(self.body.children()).children())(x)
        return self.body(x)


@kind(*_CALLS, slow=True)
class InAListOfTheParts(Two):
    def forward(self, x, aux=False):
        first, _ = list(self.body)
        return first[0](x) if aux else self.body(x)


_SOURCE = """
def forward(self, x, aux=False):
    for layer in self.body[0]:
        x = layer(x)
        if aux:
            return x
    return x
"""


def _unreadable():
    found = {}
    exec(_SOURCE, found)
    return type("Unreadable", (Two,), {"forward": found["forward"]})()


@kind(*_CALLS)
def unreadable_method():
    return _unreadable()
