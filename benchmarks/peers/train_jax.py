"""JAX with Flax nnx on the CPU: one jitted step, its state donated, the network's graph split off once.

`lax.scan` over the whole epoch was measured too: it takes many times as long, as XLA's convolutions inside a
loop do on the CPU. In bfloat16 they are slower here than in float32.
"""

from __future__ import annotations

import contract
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Network(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        norm = {"momentum": 1 - contract.BN_MOMENTUM, "epsilon": contract.BN_EPS, "rngs": rngs}
        self.conv1 = nnx.Conv(1, 20, (3, 3), padding="VALID", rngs=rngs)
        self.bn1 = nnx.BatchNorm(20, **norm)
        self.conv2 = nnx.Conv(20, 50, (5, 5), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(50, **norm)
        self.dense1 = nnx.Linear(800, 128, rngs=rngs)
        self.bn3 = nnx.BatchNorm(128, **norm)
        self.dense2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.avg_pool(nnx.relu(self.bn1(self.conv1(x))), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.bn2(self.conv2(x))), (2, 2), strides=(2, 2))
        return self.dense2(nnx.relu(self.bn3(self.dense1(x.reshape(len(x), -1)))))


class Trainer:
    def __init__(self, task: contract.Task) -> None:
        self.task = task
        self.images = self.on_device(task.images)
        self.labels = jnp.asarray(task.labels, jnp.int32)
        self.jitted_step = jax.jit(self.step, donate_argnums=0)
        self.jitted_classes = jax.jit(self.classes)
        self.reset()

    def reset(self) -> None:
        net = Network()
        for name, value in self.task.initial_channels_last().items():
            layer, kind = name.split(".")
            weight = "scale" if layer.startswith("bn") else "kernel"
            getattr(getattr(net, layer), weight if kind == "weight" else "bias")[...] = jnp.asarray(value)
        net.train()
        optimizer = nnx.Optimizer(net, optax.sgd(contract.LEARNING_RATE), wrt=nnx.Param)
        self.graph, self.state = nnx.split((net, optimizer))

    def on_device(self, images: np.ndarray) -> jax.Array:
        return jnp.asarray(images[..., None], jnp.float32) / 255

    def step(self, state: nnx.State, index: jax.Array, images: jax.Array, labels: jax.Array):
        net, optimizer = nnx.merge(self.graph, state)

        def summed_loss(net: Network) -> jax.Array:
            logits = net(images[index])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).sum()

        loss, gradients = nnx.value_and_grad(summed_loss)(net)
        optimizer.update(net, gradients)
        return nnx.state((net, optimizer)), loss / len(index)

    def train(self, batches: list[np.ndarray]) -> np.ndarray:
        losses = []
        for batch in batches:
            index = batch.astype(np.int32)
            self.state, loss = self.jitted_step(self.state, index, self.images, self.labels)
            losses.append(loss)
        jax.block_until_ready(self.state)
        return np.array(losses)

    def warm_up(self) -> None:
        self.train(self.task.warm_up_batches())
        self.reset()

    def epoch(self) -> np.ndarray:
        return self.train(self.task.batches())

    def classes(self, state: nnx.State, images: jax.Array) -> jax.Array:
        net, _ = nnx.merge(self.graph, state)
        net.eval()
        return net(images).argmax(axis=1)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        pixels, size = self.on_device(images), contract.EVALUATION_BATCH
        parts = [self.jitted_classes(self.state, pixels[i : i + size]) for i in range(0, len(labels), size)]
        return float((np.concatenate(parts) == labels).mean())


if __name__ == "__main__":
    contract.run("jax", Trainer, lambda: {"jax": jax.__version__, "flax": flax.__version__})
