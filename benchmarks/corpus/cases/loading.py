"""Checkpoints and exports without the buffers."""

import copy

import torch
from torch import Tensor, nn

from ..harness import Case, Loop, accuracy, batches, case, cnn, healthy, mlp, norms, pictures, symptom


@case("parameters-only")
def _() -> Case:
    """Saved: [p for p in model.parameters()]."""
    saved = [p.detach().clone() for p in healthy().parameters()]
    model = cnn()
    with torch.no_grad():
        for mine, its in zip(model.parameters(), saved, strict=True):
            mine.copy_(its)
    symptom(accuracy(model, pictures()) < accuracy(healthy(), pictures()) - 0.1, "worthless in evaluation")
    return Case(model.eval(), batches(pictures()))


@case("dpc-missing")
def _() -> Case:
    """Published without buffers, loaded with strict=False; a head is trained on it in evaluation."""
    state = {k: v for k, v in healthy().state_dict().items() if "running" not in k and "num_batches" not in k}
    model = cnn()
    missing = model.load_state_dict(state, strict=False).missing_keys
    for layer in norms(model):
        layer.requires_grad_(False)

    def freeze(step: int) -> None:
        for layer in norms(model):
            layer.eval()

    optimizer, noticed = Loop(steps=30, before=freeze).train(model.train(), batches(pictures()))
    freeze(0)
    symptom(len(missing) >= 4, "buffers were missing")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


class _PerStep(nn.Module):
    """Norms with statistics for each inner step, kept in a list that the state dict does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.step = mlp(), 0
        self.kept = [[(n.running_mean.clone(), n.running_var.clone()) for n in norms(self)] for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        for norm, (mean, var) in zip(norms(self), self.kept[self.step], strict=True):
            norm.running_mean, norm.running_var = mean, var
        out: Tensor = self.net(x)
        return out


@case("maml-steps")
def _() -> Case:
    torch.manual_seed(0)
    model, data = _PerStep(), pictures()

    def inner(step: int) -> None:
        model.step = step % 3

    Loop(before=inner, steps=90, watched=False).train(model.train(), batches(data))
    model.step = 2
    good = accuracy(model, data)
    loaded = _PerStep()
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    loaded.step = 2
    symptom(accuracy(loaded, data) < good - 0.05, "much worse after loading")
    return Case(loaded.eval(), batches(data))


@case("onnx-no-stats")
def _() -> Case:
    """Norms without running statistics, in a model in evaluation that is to be exported."""
    torch.manual_seed(0)
    model: nn.Module = cnn(track_running_stats=False)
    optimizer, noticed = Loop().train(model.train(), batches(pictures()))
    model.eval()
    with torch.no_grad():
        alone, together = model(pictures()[0][:2]), model(pictures()[0])[:2]
    symptom(float((alone - together).abs().max()) > 0.1, "the batch decides in evaluation")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("onnx-fresh")
def _() -> Case:
    """A layer just made, compared in training with what the export makes of it: the running statistics."""
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3)
    x = torch.randn(256, 3) * 2 + 1
    with torch.no_grad():
        exported = layer.eval()(x)
        apart = float((layer.train()(x) - exported).abs().max())
    layer.reset_running_stats()
    symptom(apart > 0.5, "other values")
    return Case(layer.eval(), [(part, None) for part in x.split(32)], loss=None)
