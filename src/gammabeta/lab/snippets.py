"""The few lines of Python that do what a bench does, with its settings put in. A test runs each of them."""

from typing import Any

from .benches.channel import Lens
from .benches.mates import Company
from .benches.race import MOMENTUM, Track
from .subject import Subject

_TEST = """dataset = gb.data.load("mnist")
scaling = Scaling.of(dataset.train.images, "standardized")
test = DeviceImages(dataset.test, scaling, torch.device("cpu"))
"""


def _start(subject: Subject, *more: str) -> str:
    lines = ["import torch", "", "import gammabeta as gb", *more]
    return "\n".join([*lines, "", subject.made, ""])


def draw(subject: Subject) -> str:
    """Bench 1: name the digit on a picture, and look into the layers."""
    return (
        _start(subject, "from gammabeta.train.batches import DeviceImages, Scaling")
        + _TEST
        + """
image, label = test.batch(slice(0, 1))
print("logits", model(image).tolist(), "label", label.item())
for layer in model.inspect(image):  # what each layer makes of it
    print(layer.name, layer.shape, layer.output.mean().item())
"""
    )


def race(track: Track) -> str:
    """Bench 2: two networks from the same weights, on the same batches."""
    return f"""import torch
from torch.nn.functional import cross_entropy

import gammabeta as gb
from gammabeta.lab.benches.race import Track, build
from gammabeta.train.batches import DeviceImages, Scaling

dataset = gb.data.load("mnist")
scaling = Scaling.of(dataset.train.images, "standardized")
images = DeviceImages(dataset.train, scaling, torch.device("cpu"))
track = Track(rate={track.rate!r}, batch={track.batch}, scale={track.scale!r}, depth={track.depth},
              activation={track.activation!r}, seed={track.seed})
twins = [build(track, batch_norm=batch_norm) for batch_norm in (True, False)]
optimizers = [torch.optim.SGD(twin.parameters(), lr=track.rate, momentum={MOMENTUM}, nesterov=True)
              for twin in twins]
for step in range(20):
    x, labels = images.batch(torch.randint(0, len(images), (track.batch,)))
    losses = []
    for twin, optimizer in zip(twins, optimizers):
        loss = cross_entropy(twin(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(step, *losses)  # with batch norm, without
"""


def channel(subject: Subject, found: dict[str, Any], lens: Lens) -> str:
    """Bench 3: a channel through the equations of reference.py."""
    before = {"bn1": "conv1", "bn2": "conv2", "bn3": "fc1"}[found["layer"]]
    return (
        _start(
            subject,
            "from gammabeta import reference",
            "from gammabeta.train.batches import DeviceImages, Scaling",
        )
        + _TEST
        + f"""
images, _ = test.batch(slice(0, {lens.batch}))
views = {{view.name: view.output for view in model.inspect(images)}}
x = views["{before}"][:, {found["channel"]}:{found["channel"] + 1}].double()
batch = reference.batch_statistics(x)  # μ, and σ² over m values, biased
xhat = reference.normalize(x, batch.mean, batch.var, eps={found["eps"]!r})
gamma, beta = torch.tensor([{found["gamma"]!r}]).double(), torch.tensor([{found["beta"]!r}]).double()
y = reference.scale_and_shift(xhat, gamma, beta)
print("mean", batch.mean.item(), "variance", batch.var.item(), "y", y.mean().item(), y.std().item())

g = torch.randn_like(x)  # a gradient from above
back = reference.backward_training(g, x, gamma, eps={found["eps"]!r})
print("the sum of what is left", back.x.sum().item(), "along x̂", (back.x * xhat).sum().item())
"""
    )


def mates(subject: Subject, company: Company) -> str:
    """Bench 4: one image in other company."""
    pool = (
        f"torch.nonzero(test.labels == {company.digit}).flatten()"
        if company.kind == "one"
        else "torch.arange(len(test))"
    )
    return (
        _start(subject, "from gammabeta.train.batches import DeviceImages, Scaling")
        + _TEST
        + f"""
pool = {pool}
for mode in ("eval", "train"):
    logits = []
    for draw in range(10):
        mates = pool[torch.randint(0, len(pool), ({company.size - 1},))]
        x, labels = test.batch(torch.cat([torch.tensor([{company.image}]), mates]))
        getattr(model, mode)()  # train() also changes the running statistics
        with torch.no_grad():
            logits.append(model(x)[0, labels[0]].item())
    print(mode, "spread of the logit:", torch.tensor(logits).std().item())
"""
    )


def breakage(faults: frozenset[str]) -> str:
    """Bench 5: train with faults, diagnose, mend."""
    return f"""import torch
from torch.nn.functional import cross_entropy

import gammabeta as gb
from gammabeta.lab.benches.faults import build, order_of
from gammabeta.train.batches import DeviceImages, Scaling

dataset = gb.data.load("mnist")
scaling = Scaling.of(dataset.train.images, "standardized")
images = DeviceImages(dataset.train, scaling, torch.device("cpu"))
faults = frozenset({sorted(faults)!r})
model, batch = build(faults), 2 if "batches_of_two" in faults else 64
order = order_of(faults, images.labels, batch, seed=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for step in range(30):
    x, labels = images.batch(order(step))
    loss = cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
loader = [images.batch(order(step)) for step in range(16)]
print(gb.diagnose(model, loader, loss=lambda y, t: cross_entropy(y, t).item(), optimizer=optimizer))
gb.recalibrate(model, [images.batch(slice(0, 512))[0]])
"""


def fold(subject: Subject) -> str:
    """Bench 6: fold, and compare."""
    return (
        _start(subject, "from gammabeta.train.batches import DeviceImages, Scaling")
        + _TEST
        + """
images, _ = test.batch(slice(0, 256))
folded = gb.fold(model, images[:64])
with torch.no_grad():
    print("largest difference", (model(images) - folded(images)).abs().max().item())
print(folded.fold_report)
"""
    )
