"""PyTorch on the CPU: eager, eager with channels_last, or compiled with channels_last (`--variant`)."""

from __future__ import annotations

import copy

import contract
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 20, 3),
        nn.BatchNorm2d(20, eps=contract.BN_EPS, momentum=contract.BN_MOMENTUM),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.BatchNorm2d(50, eps=contract.BN_EPS, momentum=contract.BN_MOMENTUM),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 128),
        nn.BatchNorm1d(128, eps=contract.BN_EPS, momentum=contract.BN_MOMENTUM),
        nn.ReLU(inplace=True),
        nn.Linear(128, 10),
    )


LAYERS = {0: "conv1", 1: "bn1", 4: "conv2", 5: "bn2", 9: "dense1", 10: "bn3", 12: "dense2"}


class Trainer:
    def __init__(self, task: contract.Task) -> None:
        self.variant = contract.variant("eager", "channels-last", "compiled")
        self.format = torch.contiguous_format if self.variant == "eager" else torch.channels_last
        self.autocast = task.precision == "bf16"
        model = network()
        for index, name in LAYERS.items():
            for kind in ("weight", "bias"):
                first = torch.from_numpy(task.initial[f"{name}.{kind}"])
                getattr(model[index], kind).data.copy_(first)
        self.model = model.to(memory_format=self.format)
        self.loss = self.eager_loss
        if self.variant == "compiled":
            self.loss = torch.compile(self.eager_loss, dynamic=False)
        self.images = self.on_device(task.images)
        self.labels = torch.from_numpy(task.labels)
        self.task = task

    def on_device(self, images: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(images)[:, None].to(torch.float32).div_(255)
        return pixels.contiguous(memory_format=self.format)

    def eager_loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.model(images), labels, reduction="sum")

    def train(self, batches: list[np.ndarray]) -> np.ndarray:
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), contract.LEARNING_RATE, fused=True)
        losses = []
        for batch in batches:
            index = torch.from_numpy(batch)
            loss = self.loss(self.images[index], self.labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach() / len(batch))
        return torch.stack(losses).numpy()

    def warm_up(self) -> None:
        state = copy.deepcopy(self.model.state_dict())
        self.train(self.task.warm_up_batches())
        self.model.load_state_dict(state)

    def epoch(self) -> np.ndarray:
        return self.train(self.task.batches())

    @torch.inference_mode()
    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        self.model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            parts = self.on_device(images).split(contract.EVALUATION_BATCH)
            classes = torch.cat([self.model(part).argmax(1) for part in parts])
        return float((classes.numpy() == labels).mean())


if __name__ == "__main__":
    contract.run("pytorch", Trainer, lambda: {"torch": torch.__version__})
