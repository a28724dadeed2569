"""Momentum of another convention, attributes changed after construction, weights of another framework."""

import copy

import torch
from torch import nn

from ..harness import Case, accuracy, batches, case, cnn, healthy, norms, pictures, symptom, trained


def _jumpy(momentum: float) -> Case:
    """Statistics follow the last batch: a batch of one class at the end ruins evaluation."""
    data = pictures()
    model, optimizer, noticed = trained(cnn(momentum=momentum))
    x, y = pictures(seed=3)
    with torch.no_grad():
        last = model[0](x[y == 0][:32]).mean((0, 2, 3))
        before = (norms(model)[0].running_mean - last).norm()
        model.train()(x[y == 0][:32])
        after = (norms(model)[0].running_mean - last).norm()
    symptom(float(after) < 0.2 * float(before), "the last batch rules")
    return Case(model, batches(data), optimizer=optimizer, noticed=noticed)


@case("deeplab-momentum")
def _() -> Case:
    return _jumpy(0.999)


@case("maxvit-momentum")
def _() -> Case:
    return _jumpy(0.99)


@case("pix2pix-momentum")
def _() -> Case:
    return _jumpy(0.9)


@case("tacotron-momentum")
def _() -> Case:
    """Both settings were taken over, momentum and eps."""
    model, optimizer, noticed = trained(cnn(momentum=0.99, eps=1e-3))
    last = batches(pictures())[(80 - 1) % 16][0]
    seen = model[0](last).mean((0, 2, 3))
    symptom(torch.allclose(norms(model)[0].running_mean, seen, atol=0.05), "only the last batch counts")
    return Case(model, batches(pictures()), optimizer=optimizer, noticed=noticed)


@case("keras-eps")
def _() -> Case:
    """Trained with Keras's eps on quiet activations; loaded into layers with PyTorch's."""
    data = pictures(scale=0.05)
    there, _, _ = trained(cnn(eps=1e-3), data)
    here = cnn()
    here.load_state_dict(there.state_dict())
    x = data[0][:64]
    with torch.no_grad():
        change = (here.eval()(x) - there.eval()(x)).abs().max() / there(x).std()
    symptom(float(change) > 0.1, "the outputs differ")
    return Case(here, batches(data), source="keras")


@case("mxnet-fix-gamma")
def _() -> Case:
    """The file holds a γ that MXNet did not use (fix_gamma: it is 1)."""
    data = pictures()
    there = cnn()
    for layer in norms(there):
        layer.weight.requires_grad_(False)
    there, _, _ = trained(there, data, watched=False)
    here = copy.deepcopy(there).requires_grad_(True)
    torch.manual_seed(4)
    with torch.no_grad():
        for layer in norms(here):
            layer.weight.copy_(torch.randn(len(layer.weight)).abs() * 3)
    symptom(accuracy(here, data) < accuracy(there, data) - 0.1, "worse than where it came from")
    return Case(here.eval(), batches(data), source="mxnet")


@case("track-inference")
def _() -> Case:
    """The attribute is switched off in a trained model, for inference."""
    model = healthy().eval()
    layer = norms(model)[0]
    layer.track_running_stats = False
    with torch.no_grad():
        before = layer.running_mean.clone()
        model.train()(pictures(seed=8, shift=2.0)[0])
    symptom(torch.equal(layer.running_mean, before), "training does not update it any more")
    return Case(model.eval(), batches(pictures()))


@case("track-finetuning")
def _() -> Case:
    """Freezing by the attribute, then finetuning of the head on other pictures."""
    model = healthy()
    for layer in norms(model):
        layer.track_running_stats = False
        layer.requires_grad_(False)
    other = pictures(seed=2, shift=0.5, scale=0.5)
    model, optimizer, noticed = trained(model, other, steps=40)
    trains, evaluates = accuracy(model, other, training=True), accuracy(model, other)
    symptom(trains > evaluates + 0.1, "training normalises by the batch, evaluation by old statistics")
    return Case(model.train(), batches(other), optimizer=optimizer, noticed=noticed)


@case("buffers-by-hand")
def _() -> Case:
    """A layer is replaced; the mean is assigned as the variance."""
    model = healthy()
    old = norms(model)[1]
    new = nn.BatchNorm2d(16, track_running_stats=False)
    new.weight, new.bias = old.weight, old.bias
    new.running_mean = new.running_var = old.running_mean
    new.num_batches_tracked = old.num_batches_tracked
    model[4] = new
    with torch.no_grad():
        symptom(bool(model.eval()(pictures()[0]).isnan().any()), "NaN in evaluation")
    return Case(model, batches(pictures()))
