"""What Python's grammar offers for a line that calls a batch norm."""

import asyncio
import contextlib
import functools
import operator
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .base import IMAGE, OTHER, Base
from .harness import Call, call, kind


@kind(call(IMAGE), call(IMAGE, 1), call(IMAGE, "none"))
class MatchTakesTheOutput(Base):
    """A pattern names the output; another takes the name of a variable that waits."""

    def forward(self, x, how=0):
        match self.bn(self.conv(x)):
            case torch.Tensor() as y if how == 0:
                y = self.relu(y)
            case y:
                y = torch.sigmoid(y)
        z = self.bn2(y)
        match how:
            case "none":
                z = z * 2
            case int(z):
                z = y + z
        return self.relu(z) if isinstance(z, torch.Tensor) else z


@kind(call(IMAGE), call(OTHER), slow=True)
class WalrusChains(Base):
    def forward(self, x):
        if (y := self.bn(self.conv(x))).mean() > -100 and (z := self.relu(y)) is not None:
            return z + (w := self.bn2(y)) + torch.relu(w)
        return y


@kind(call(IMAGE), call(OTHER))
class ComprehensionsAndLambdas(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        parts = [(t := self.bn2(y * k)) for k in (1.0, 2.0)]
        later = lambda k, y=y: self.relu(y) * k  # noqa: E731
        pairs = {k: later(k) for k in (1.0, 3.0)}
        y = self.relu(y + t)
        return sum(parts) + y + pairs[3.0]


@kind(call(IMAGE), call(OTHER))
class NamesTakenByStatements(Base):
    """A loop, a context and an error take the name of a variable that held an output."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        a = self.relu(y)
        y = self.bn2(a)
        for y in (a, y):  # noqa: B020
            a = a + y
        with contextlib.nullcontext(self.bn(a)) as y:
            a = self.relu(y)
        try:
            raise ValueError("one")
        except ValueError as error:
            y = self.bn2(a)
            a = y if error.args else a
        import math as y

        return self.relu(self.bn(a)) * y.pi


@kind(call(IMAGE), call(OTHER), slow=True)
class FormattedAndCompared(Base):
    def __init__(self):
        super().__init__()
        self.said = []

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.said.append(f"{tuple(y.shape)} {y.dtype} {y is None} {type(y).__name__}")
        z = self.relu(y)
        self.said.append(f"{z is y}")
        return z


@kind(call(IMAGE), call(OTHER))
class InPlaceAndUsedAfterwards(Base):
    """In place, so that every name of the output sees it."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.act(y)
        w = self.bn2(self.conv2(z))
        v = w
        F.relu_(w)
        u = v.view(v.shape[0], -1)
        u.mul_(2.0)
        w.add_(1.0)
        return y + z + v, u, y is z


@kind(call(IMAGE), call(OTHER))
class StatementsWhoseValueIsDropped(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y.relu_()
        z = self.bn2(y)
        F.leaky_relu_(z, 0.3)
        F.relu(z)
        torch.clamp(z, -0.5, 0.5, out=None)
        return z


@kind(call(IMAGE), call(OTHER), slow=True)
class FunctionsOfFunctions(Base):
    def forward(self, x):
        y = functools.reduce(lambda a, f: f(a), (self.conv, self.bn, self.relu), x)
        y = operator.methodcaller("relu")(self.bn2(y))
        a, b = map(self.bn, (x, y))
        return operator.add(self.relu(a), b) + operator.iadd(self.bn2(b), a)


@kind(call(IMAGE), call(OTHER), slow=True)
class OtherKindsOfNumbers(Base):
    def forward(self, x):
        y = self.bn(self.conv(x)) + np.float64(2.0)
        z = self.bn2(x) + True
        w = np.float64(0.5) + self.bn(x)
        v = self.bn2(x) + torch.ones(3, 1, 1, dtype=torch.int32)
        return F.relu(y), self.relu(z), F.relu(torch.as_tensor(w)), self.relu(v)


@kind(call(IMAGE), call(OTHER), slow=True)
class HelperYieldsOutputs(Base):
    def parts(self, x):
        y = self.bn(x)
        got = yield y
        yield self.relu(y) if got is None else self.relu(got)
        return

    def forward(self, x):
        made = self.parts(self.conv(x))
        y = next(made)
        z = made.send(self.bn2(y))
        return y + z


@kind(call(IMAGE), call(OTHER), slow=True)
class Coroutine(Base):
    async def part(self, x):
        y = self.bn(x)
        await asyncio.sleep(0)
        return self.relu(y)

    def forward(self, x):
        loop = asyncio.new_event_loop()
        try:
            return self.relu(self.bn2(loop.run_until_complete(self.part(self.conv(x)))))
        finally:
            loop.close()


@kind(call(IMAGE), call(OTHER), never=("fold",), slow=True)  # a folded layer gives what it got
class WeakReferences(Base):
    """Says whether the input is still alive once the layer was called."""

    def __init__(self):
        super().__init__()
        self.alive = []

    def forward(self, x):
        with torch.no_grad():
            h = self.conv(x.detach())
            watch = weakref.ref(h)
            h = self.bn(h)
            self.alive.append(watch() is not None)
            h = self.relu(h)
        return h * 1.0


@kind(call(IMAGE), call(OTHER), slow=True)
class ErrorsDecide(Base):
    """The norm's own error says which way."""

    def forward(self, x):
        try:
            y = self.bn(x[0])
            y = self.relu(y)
        except ValueError:
            y = self.bn2(x)
        else:
            y = y + 100
        finally:
            x = x + 1
        with contextlib.suppress(ValueError):
            z = self.bn(x[0])
            y = self.relu(z)
        return self.relu(y + x)


@kind(call(IMAGE), call(OTHER), slow=True)
class NestedFunctions(Base):
    def forward(self, x):
        count = 0

        def step(y):
            nonlocal count
            count += 1
            return self.relu(self.bn(y)) if count < 3 else self.bn2(y)

        y = step(self.conv(x))
        y = self.relu(step(y))
        z = step(y)
        return self.relu(z) * count


@kind(call(IMAGE), call(OTHER), slow=True)
class Conditionals(Base):
    def forward(self, x):
        y = self.bn(self.conv(x)) if x is not None else None
        y = (self.relu if y is not None else torch.sigmoid)(y)
        z = self.bn2(y) or 1 if y is None else self.bn2(y)
        z = [self.relu, torch.sigmoid][x.shape[0] == 4](z)
        return (lambda v: v)(self.bn(z))[..., :2] + {"a": self.relu(self.bn2(z))}["a"][..., :2]


@kind(call(IMAGE), call(OTHER), slow=True)
class EndlessLoop(Base):
    def forward(self, x):
        y, turns = self.conv(x), 0
        while True:
            y = self.bn(y)
            if turns > 1:
                break
            y = self.relu(y)
            turns += 1
        else:
            y = y * 100
        for turn in range(3):
            z = self.bn2(y)
            if turn == 1:
                continue
            y = self.relu(z)
        return y + z


@kind(call(IMAGE), Call((IMAGE,), before=lambda m: m.parts.update({"norm": m.parts.pop("norm")})))
class DictionaryOfModulesInOrder(nn.Module):
    """The order is that of the dictionary, and changes with it."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict(
            {"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3), "act": nn.Hardtanh(-0.3, 0.4)}
        )

    def forward(self, x):
        for name, part in self.parts.items():
            x = part(x) if name != "act" else part(x) + 0
        for part in self.parts.values():
            x = part(x)
        return x
