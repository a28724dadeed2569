"""A tutorial's loop on a folder of pictures: ``python train_pictures.py FOLDER SEED``; prints a line of JSON.

A small residual network of ``torch.nn`` layers, AdamW, PyTorch's one-cycle schedule, mirror images, float32.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from gammabeta.data import load

BATCH, IMAGES = 64, 24_000  # images a step, and images in all, as the recipe ``pictures`` sees them


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride > 1:
            convolution = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def main(folder: str, seed: int) -> None:
    torch.manual_seed(seed)
    data = load(folder)
    channels, classes = data.image_shape[0], len(data.classes)
    x, y = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    model = nn.Sequential(
        *(nn.Conv2d(channels, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)),
    )
    epochs = min(max(round(IMAGES / len(y)), 5), 40)
    steps = epochs * -(-len(y) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=steps)
    clock = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(BATCH):
            batch = x[index].float() / 127.5 - 1
            flipped = torch.rand(len(index)) < 0.5
            batch[flipped] = batch[flipped].flip(-1)
            loss = F.cross_entropy(model(batch), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - clock
    model.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(data.test.images).split(250)
        guess = torch.cat([model(part.float() / 127.5 - 1).argmax(1) for part in parts])
    accuracy = float((guess == torch.from_numpy(data.test.labels)).double().mean())
    print(json.dumps({"accuracy": accuracy, "epochs": epochs, "train_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
