"""Faults of the training itself: counted twice, not finite, half precision, too slow, never in training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..harness import (
    Case,
    Loop,
    accuracy,
    batches,
    behind,
    case,
    cnn,
    healthy,
    mlp,
    norms,
    pictures,
    symptom,
    trained,
)


class _Checkpointed(nn.Module):
    """The body in one checkpointed piece."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = cnn()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.body(x)  # type: ignore[no-any-return]
        out: Tensor = checkpoint(self.body, x.requires_grad_(), use_reentrant=False)
        return out


@case("checkpoint-torch")
def _() -> Case:
    model = _Checkpointed()
    optimizer, noticed = Loop(steps=40).train(model.train(), batches(pictures()))
    symptom(int(norms(model)[0].num_batches_tracked) == 80, "80 updates in 40 steps")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("checkpoint-samudra")
def _() -> Case:
    """Checkpointing, batches of four, and a second pass over the batch for a metric."""
    model, loader = _Checkpointed(), batches(pictures(), 4)

    def metric(step: int) -> None:
        with torch.no_grad():
            model(loader[step % len(loader)][0])

    optimizer, noticed = Loop(steps=60, after=metric).train(model.train(), loader)
    symptom(int(norms(model)[0].num_batches_tracked) == 180, "three updates a step")
    return Case(model, loader, optimizer=optimizer, noticed=noticed)


def _spoiled(value: float, everywhere: bool) -> Case:
    """One batch with a value that is not finite; its step is skipped, as a gradient scaler does."""
    torch.manual_seed(0)
    model, loader = cnn().train(), batches(pictures())

    def spoil(step: int) -> None:
        if step == 30:
            x = loader[0][0].clone()
            if everywhere:
                x.fill_(value)
            else:
                x[0, 1, 3, 3] = value
            with torch.no_grad():
                model(x)

    optimizer, noticed = Loop(before=spoil).train(model, loader)
    with torch.no_grad():
        finite = bool(model.train()(loader[1][0]).isfinite().all())
        broken = not bool(model.eval()(loader[1][0]).isfinite().all())
    symptom(finite and broken, "finite in training, NaN in evaluation")
    return Case(model, loader, optimizer=optimizer, noticed=noticed)


@case("amp-nan")
def _() -> Case:
    return _spoiled(float("nan"), everywhere=True)


@case("amp-inf")
def _() -> Case:
    return _spoiled(float("inf"), everywhere=False)


@case("resnet-nan")
def _() -> Case:
    """Finetuning with one corrupt picture in the data set, whose steps the user skips."""
    model, (x, y) = healthy().train(), pictures(seed=2)
    x[100] = float("nan")
    loader = batches((x, y))

    def loss(out: Tensor, target: Tensor) -> Tensor:
        found = F.cross_entropy(out, target)
        return found if bool(found.isfinite()) else out.new_zeros((), requires_grad=True)

    optimizer, noticed = Loop(steps=32, lr=1e-3, loss=loss).train(model, loader)
    answers = model.eval()(pictures()[0]).argmax(1)
    symptom(len(answers.unique()) == 1, "one answer for all")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("fastai-half")
def _() -> Case:
    """The whole module in half precision, norms included."""
    torch.manual_seed(0)
    x, y = pictures()
    data = x.bfloat16(), y
    model = cnn().bfloat16().train()
    optimizer, noticed = Loop(steps=60).train(model, batches(data))
    symptom(norms(model)[0].running_mean.dtype is torch.bfloat16, "statistics in half precision")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("variance-over-half")
def _() -> Case:
    """A variance above 65504, and what a cast of the parameters to half precision makes of it."""
    data = pictures(scale=3000.0)
    model, optimizer, noticed = trained(cnn(), data)
    symptom(bool(norms(model)[0].running_var.half().isinf().any()), "infinite in half precision")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("ludwig-slow")
def _() -> Case:
    """A new batch has the weight 0.003."""
    data = pictures(scale=4.0)
    model, optimizer, noticed = trained(cnn(momentum=0.003), data, steps=100)
    ratio = behind(model, data)
    symptom(ratio > 1.5, f"evaluation far behind: {ratio:.2f} times the loss")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("ddpg-keras")
def _() -> Case:
    """The model is called as in inference always, while it learns."""
    torch.manual_seed(0)
    model, data = mlp(), pictures(scale=5.0)

    def inference(step: int) -> None:
        model.eval()

    optimizer, noticed = Loop(before=inference, lr=3e-3).train(model, batches(data))
    symptom(int(norms(model)[0].num_batches_tracked) == 0, "the norms have done nothing")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


class _PerDomain(nn.Module):
    """A norm for each domain before the head; only the source's is called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()[:-1]
        self.source, self.target = nn.BatchNorm1d(32), nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.source if self.training else self.target
        out: Tensor = self.head(norm(3 * self.body(x)))
        return out


@case("can-domain-bn")
def _() -> Case:
    torch.manual_seed(0)
    model = _PerDomain()
    optimizer, noticed = Loop().train(model.train(), batches(pictures()))
    symptom(int(model.target.num_batches_tracked) == 0, "the target's norm was never trained")
    return Case(model.eval(), batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("new-model-eval")
def _() -> Case:
    """A network just made, in both modes."""
    torch.manual_seed(0)
    model, (x, _) = cnn(), pictures(scale=20.0)
    with torch.no_grad():
        apart = (model.eval()(x) - model.train()(x)).norm()
    for layer in norms(model):
        layer.reset_running_stats()
    symptom(float(apart) > 1, "the outputs differ")
    return Case(model.eval(), batches((x, pictures()[1])))


class _Recurrent(nn.Module):
    """One norm for all steps of a recurrence whose state grows."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again = nn.Linear(12, 24), nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 24)
        for part in x.flatten(1).split(12, 1):
            h = torch.tanh(self.norm(self.into(part) + self.again(h))) + h
        out: Tensor = self.head(h)
        return out


@case("recurrent-shared")
def _() -> Case:
    torch.manual_seed(0)
    model, data = _Recurrent(), pictures(1024)
    optimizer, noticed = Loop(steps=160, lr=5e-3).train(model.train(), batches(data))
    lost = accuracy(model, data, training=True) - accuracy(model, data)
    symptom(lost > 0.05, f"worse in evaluation: {lost:.2f}")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


def _with_dropout(model: nn.Sequential, at: int, layer: nn.Module, **loop: float) -> Case:
    model.insert(at, layer)
    found, optimizer, noticed = trained(model, steps=160)
    x, y = pictures()
    with torch.no_grad():
        evaluated = float(F.cross_entropy(found.eval()(x), y))
        for module in found.modules():
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        kept = [t.clone() for t in found.buffers()]
        by_batch = float(F.cross_entropy(found(x), y))
        for tensor, old in zip(found.buffers(), kept, strict=True):
            tensor.copy_(old)
    symptom(evaluated > by_batch, f"loss {evaluated:.3f} in evaluation, {by_batch:.3f} by the batch")
    return Case(found.eval(), batches((x, y)), optimizer=optimizer, noticed=noticed)


@case("mlcolvar-dropout")
def _() -> Case:
    torch.manual_seed(0)
    return _with_dropout(mlp(), 4, nn.Dropout(0.5))


@case("dropout2d-eval")
def _() -> Case:
    torch.manual_seed(0)
    return _with_dropout(cnn(), 3, nn.Dropout2d(0.5))
