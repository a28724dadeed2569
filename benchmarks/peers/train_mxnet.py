"""MXNet Gluon on the CPU: built-in BatchNorm, one hybridised network with static memory, oneDNN inside."""

from __future__ import annotations

import contract
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

LAYERS = {0: "conv1", 1: "bn1", 4: "conv2", 5: "bn2", 9: "dense1", 10: "bn3", 12: "dense2"}


def network() -> nn.HybridSequential:
    net = nn.HybridSequential()
    net.add(
        nn.Conv2D(20, 3, in_channels=1),
        nn.BatchNorm(momentum=1 - contract.BN_MOMENTUM, epsilon=contract.BN_EPS, in_channels=20),
        nn.Activation("relu"),
        nn.AvgPool2D(),
        nn.Conv2D(50, 5, in_channels=20),
        nn.BatchNorm(momentum=1 - contract.BN_MOMENTUM, epsilon=contract.BN_EPS, in_channels=50),
        nn.Activation("relu"),
        nn.AvgPool2D(),
        nn.Flatten(),
        nn.Dense(128, in_units=800),
        nn.BatchNorm(momentum=1 - contract.BN_MOMENTUM, epsilon=contract.BN_EPS, in_channels=128),
        nn.Activation("relu"),
        nn.Dense(10, in_units=128),
    )
    return net


class Trainer:
    def __init__(self, task: contract.Task) -> None:
        self.task = task
        self.net = network()
        self.net.initialize()
        self.reset()
        self.net.hybridize(static_alloc=True, static_shape=True)
        self.loss = gluon.loss.SoftmaxCrossEntropyLoss()
        self.loss.hybridize(static_alloc=True, static_shape=True)
        self.images = self.on_device(task.images)
        self.labels = mx.nd.array(task.labels, dtype=np.float32)

    def reset(self) -> None:
        for index, name in LAYERS.items():
            layer = self.net[index]
            norm = isinstance(layer, nn.BatchNorm)
            (layer.gamma if norm else layer.weight).set_data(mx.nd.array(self.task.initial[f"{name}.weight"]))
            (layer.beta if norm else layer.bias).set_data(mx.nd.array(self.task.initial[f"{name}.bias"]))
            if norm:
                layer.running_mean.set_data(mx.nd.zeros(layer.gamma.shape))
                layer.running_var.set_data(mx.nd.ones(layer.gamma.shape))

    def on_device(self, images: np.ndarray) -> mx.nd.NDArray:
        pixels = mx.nd.array(images[:, None], dtype=np.float32)
        pixels /= 255
        return pixels

    def train(self, batches: list[np.ndarray]) -> np.ndarray:
        # The loss is summed over the batch, so the step is not divided by its size.
        rate = {"learning_rate": contract.LEARNING_RATE}
        trainer = gluon.Trainer(self.net.collect_params(), "sgd", rate, kvstore=None)
        losses = []
        for batch in batches:
            index = mx.nd.array(batch, dtype=np.int32)
            with autograd.record():
                loss = self.loss(self.net(self.images.take(index)), self.labels.take(index))
            loss.backward()
            trainer.step(1)
            losses.append(loss.mean())
        return mx.nd.stack(*losses).asnumpy().ravel()

    def warm_up(self) -> None:
        self.train(self.task.warm_up_batches())
        self.reset()

    def epoch(self) -> np.ndarray:
        losses = self.train(self.task.batches())
        mx.nd.waitall()
        return losses

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        pixels, size = self.on_device(images), contract.EVALUATION_BATCH
        parts = [self.net(pixels[i : i + size]).argmax(axis=1) for i in range(0, len(labels), size)]
        return float((mx.nd.concat(*parts, dim=0).asnumpy() == labels).mean())


if __name__ == "__main__":
    contract.run("mxnet", Trainer, lambda: {"mxnet": mx.__version__})
