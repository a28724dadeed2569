"""tinygrad on the CPU: one TinyJit for the whole step, its kernels compiled by clang.

tinygrad 0.14 computes on one thread here, whatever the count. ``BEAM=2`` in the environment makes it search
for quicker kernels, which takes many minutes once.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version

import contract

CLANGS = ("clang", "clang-22", "clang-19", "clang-16", "clang-15", "clang-14")

os.environ.setdefault("CC", next(filter(shutil.which, CLANGS), "clang"))  # read when tinygrad is imported

import numpy as np
from tinygrad import Context, Tensor, TinyJit, nn


class Network:
    def __init__(self, initial: dict[str, np.ndarray]) -> None:
        self.conv1 = nn.Conv2d(1, 20, 3)
        self.bn1 = nn.BatchNorm(20, contract.BN_EPS, momentum=contract.BN_MOMENTUM)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.bn2 = nn.BatchNorm(50, contract.BN_EPS, momentum=contract.BN_MOMENTUM)
        self.dense1 = nn.Linear(800, 128)
        self.bn3 = nn.BatchNorm(128, contract.BN_EPS, momentum=contract.BN_MOMENTUM)
        self.dense2 = nn.Linear(128, 10)
        self.load(initial)

    def load(self, values: dict[str, np.ndarray]) -> None:
        state = nn.state.get_state_dict(self)
        # In place: the captured steps keep the addresses of the parameters they were captured with.
        Tensor.realize(*(state[name].assign(Tensor(value)) for name, value in values.items()))

    def __call__(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu().avg_pool2d()
        x = self.bn2(self.conv2(x)).relu().avg_pool2d().flatten(1)
        return self.dense2(self.bn3(self.dense1(x)).relu())


class Trainer:
    def __init__(self, task: contract.Task) -> None:
        self.task = task
        self.net = Network(task.initial)
        self.optimizer = nn.optim.SGD(nn.state.get_parameters(self.net), contract.LEARNING_RATE)
        self.full, self.last = TinyJit(self.step), TinyJit(self.step)
        self.predict = TinyJit(self.classes)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.net(x.float() / 255).cross_entropy(y, reduction="sum").backward()
        return loss.realize(*self.optimizer.schedule_step())

    def train(self, batches: list[np.ndarray]) -> np.ndarray:
        losses = []
        with Context(TRAINING=1):
            for batch in batches:
                images = Tensor(self.task.images[batch][:, None]).realize()
                labels = Tensor(self.task.labels[batch].astype(np.int32)).realize()
                step = self.full if len(batch) == contract.BATCH else self.last
                losses.append(step(images, labels).numpy() / len(batch))
        return np.array(losses)

    def warm_up(self) -> None:
        state = {name: value.numpy() for name, value in nn.state.get_state_dict(self.net).items()}
        self.train(self.task.warm_up_batches())
        self.net.load(state)

    def epoch(self) -> np.ndarray:
        return self.train(self.task.batches())

    def classes(self, x: Tensor) -> Tensor:
        return self.net(x.float() / 255).argmax(1).realize()

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        parts = np.split(images[:, None], len(images) // contract.EVALUATION_BATCH)
        classes = [self.predict(Tensor(part).realize()).numpy() for part in parts]
        return float((np.concatenate(classes) == labels).mean())


if __name__ == "__main__":
    contract.run("tinygrad", Trainer, lambda: {"tinygrad": version("tinygrad")})
