"""Keras 3 on TensorFlow, on the CPU: a training step written out and compiled by `tf.function`.

Measured beside it, each slower on two cores: `fit`, with and without `steps_per_execution`, on arrays and on
`tf.data`; the whole epoch as one graph; `jit_compile=True`, by which XLA takes the convolutions from oneDNN.
"""

from __future__ import annotations

import os

import contract

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

NAMES = ("conv1", "bn1", "conv2", "bn2", "dense1", "bn3", "dense2")


def network() -> keras.Sequential:
    norm = {"momentum": 1 - contract.BN_MOMENTUM, "epsilon": contract.BN_EPS}
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(20, 3, name="conv1"),
            layers.BatchNormalization(**norm, name="bn1"),
            layers.ReLU(),
            layers.AveragePooling2D(2),
            layers.Conv2D(50, 5, name="conv2"),
            layers.BatchNormalization(**norm, name="bn2"),
            layers.ReLU(),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(128, name="dense1"),
            layers.BatchNormalization(**norm, name="bn3"),
            layers.ReLU(),
            layers.Dense(10, name="dense2", dtype="float32"),
        ]
    )


class Trainer:
    def __init__(self, task: contract.Task) -> None:
        if task.precision == "bf16":
            keras.mixed_precision.set_global_policy("mixed_bfloat16")
        self.task = task
        self.net = network()
        self.reset()
        self.optimizer = keras.optimizers.SGD(contract.LEARNING_RATE)
        self.optimizer.build(self.net.trainable_variables)
        self.images = self.on_device(task.images)
        self.labels = tf.constant(task.labels, tf.int32)

    def reset(self) -> None:
        initial = self.task.initial_channels_last()
        for name in NAMES:
            first = [initial[f"{name}.weight"], initial[f"{name}.bias"]]
            if name.startswith("bn"):
                first += [np.zeros_like(first[0]), np.ones_like(first[0])]
            self.net.get_layer(name).set_weights(first)

    def on_device(self, images: np.ndarray) -> tf.Tensor:
        return tf.constant(images[..., None].astype(np.float32) / 255)

    @tf.function
    def step(self, index: tf.Tensor) -> tf.Tensor:
        images, labels = tf.gather(self.images, index), tf.gather(self.labels, index)
        with tf.GradientTape() as tape:
            logits = self.net(images, training=True)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        variables = self.net.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    def train(self, batches: list[np.ndarray]) -> np.ndarray:
        losses = [self.step(tf.constant(batch)) / len(batch) for batch in batches]
        return tf.stack(losses).numpy()

    def warm_up(self) -> None:
        self.train(self.task.warm_up_batches())
        self.reset()

    def epoch(self) -> np.ndarray:
        return self.train(self.task.batches())

    @tf.function
    def classes(self, images: tf.Tensor) -> tf.Tensor:
        return tf.argmax(self.net(images, training=False), axis=1)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        pixels, size = self.on_device(images), contract.EVALUATION_BATCH
        parts = [self.classes(pixels[start : start + size]) for start in range(0, len(labels), size)]
        return float((tf.concat(parts, axis=0).numpy() == labels).mean())


if __name__ == "__main__":
    contract.run("keras", Trainer, lambda: {"keras": keras.__version__, "tensorflow": tf.__version__})
