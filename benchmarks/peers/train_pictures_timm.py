"""timm's own training in short: ``python train_pictures_timm.py FOLDER SIDE EPOCHS SEED``.

A ResNet-18 without pretrained weights, and the data set, loader, optimizer and schedule of timm with the
values that its ``train.py`` has by default: batches of 128, random crops, mirror images, colour jitter; SGD,
a cosine. Only the rate of 0.05 rises over one epoch, not five, since there are few. FOLDER has ``train`` and
``test``, each with a folder a class. Prints a line of JSON.
"""

import json
import sys
import time

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

BATCH = 128


def main(folder: str, side: int, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    size, cpu = (3, side, side), torch.device("cpu")
    train = create_dataset("", root=folder, split="train", is_training=True)
    test = create_dataset("", root=folder, split="test")
    shared = {"batch_size": BATCH, "use_prefetcher": False, "num_workers": 2, "device": cpu}
    steps = create_loader(train, size, is_training=True, color_jitter=0.4, **shared)
    judged = create_loader(test, size, crop_pct=1.0, **shared)
    model = timm.create_model("resnet18", pretrained=False, num_classes=len(train.reader.class_to_idx))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=1e-5)
    clock = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        for x, y in steps:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step(epoch + 1)
    seconds = time.perf_counter() - clock
    model.eval()
    right = 0
    with torch.inference_mode():
        for x, y in judged:
            right += int((model(x).argmax(1) == y).sum())
    accuracy = right / len(test)
    print(json.dumps({"accuracy": accuracy, "epochs": epochs, "train_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
