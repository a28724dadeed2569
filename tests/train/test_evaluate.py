import hashlib

import numpy as np
import torch
from torch import nn

from gammabeta.data import Dataset
from gammabeta.train import build_network, load_recipe
from gammabeta.train.batches import DeviceImages, Scaling
from gammabeta.train.evaluate import evaluate


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {module.training}".encode())
    return digest.hexdigest()


def make(digits: Dataset) -> tuple[nn.Module, DeviceImages]:
    network = build_network(load_recipe("fast"), digits, 0)
    images = DeviceImages(digits.test, Scaling.of(digits.test.images, "unit"), torch.device("cpu"))
    network(images.batch(slice(0, 64))[0])  # running statistics that are neither 0 nor 1
    return network, images


def test_evaluation_never_changes_the_model(digits: Dataset) -> None:
    network, images = make(digits)
    network.conv1.eval()  # modes are restored one by one
    before = fingerprint(network)
    first = evaluate(network, images, 10)
    assert fingerprint(network) == before
    assert evaluate(network, images, 10).correct == first.correct


def test_the_figures_are_those_of_a_plain_computation(digits: Dataset) -> None:
    network, images = make(digits)
    result = evaluate(network, images, 10, keep_probabilities=True)
    network.eval()
    x, y = images.batch(slice(None))
    logits = network(x)
    guess = logits.argmax(1)
    assert result.correct == int((guess == y).sum())
    assert result.accuracy == result.correct / 200
    assert abs(result.loss - float(nn.functional.cross_entropy(logits, y).detach())) < 1e-5
    table = np.zeros((10, 10), np.int64)
    np.add.at(table, (y.numpy(), guess.numpy()), 1)
    assert (result.confusion.numpy() == table).all()
    assert result.probabilities is not None
    torch.testing.assert_close(result.probabilities, logits.detach().softmax(1))
    assert result.count == 200


def test_modes_come_back_after_an_error(digits: Dataset) -> None:
    network, images = make(digits)
    network.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        evaluate(network, images, 10)
    except ZeroDivisionError:
        assert network.training
    else:
        raise AssertionError("the hook did not raise")
