"""Keras' first example for picture folders: ``python train_pictures_keras.py FOLDER SIDE EPOCHS SEED``.

The network, the augmentation, the optimizer and the batch are those of Keras' guide "Image classification
from scratch" (F. Chollet, 2020): a small Xception, mirror images and turns, Adam at 0.0003, batches of 128;
written anew. FOLDER has ``train`` and ``test``, each with a folder a class. Prints a line of JSON.
"""

import json
import sys
import time

import keras
from keras import layers

BATCH = 128


def pictures(folder: str, side: int, seed: int, shuffle: bool):
    return keras.utils.image_dataset_from_directory(
        folder,
        image_size=(side, side),
        batch_size=BATCH,
        seed=seed,
        shuffle=shuffle,
        format="grain",
        verbose=False,
    )


def network(side: int, classes: int) -> keras.Model:
    inputs = keras.Input((side, side, 3))
    x = layers.RandomRotation(0.1)(layers.RandomFlip("horizontal")(inputs))
    x = layers.Rescaling(1 / 255)(x)
    x = layers.Activation("relu")(layers.BatchNormalization()(layers.Conv2D(128, 3, 2, padding="same")(x)))
    before = x
    for width in (256, 512, 728):
        for _ in range(2):
            x = layers.Activation("relu")(x)
            x = layers.BatchNormalization()(layers.SeparableConv2D(width, 3, padding="same")(x))
        x = layers.MaxPooling2D(3, 2, padding="same")(x)
        x = before = layers.add([x, layers.Conv2D(width, 1, 2, padding="same")(before)])
    x = layers.BatchNormalization()(layers.SeparableConv2D(1024, 3, padding="same")(x))
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(x))
    return keras.Model(inputs, layers.Dense(classes)(layers.Dropout(0.25)(x)))


def main(folder: str, side: int, epochs: int, seed: int) -> None:
    keras.utils.set_random_seed(seed)
    train = pictures(f"{folder}/train", side, seed, shuffle=True)
    test = pictures(f"{folder}/test", side, seed, shuffle=False)
    model = network(side, len(train.class_names))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-4), loss, metrics=["accuracy"])
    clock = time.perf_counter()
    model.fit(train, epochs=epochs, verbose=0)
    seconds = time.perf_counter() - clock
    accuracy = model.evaluate(test, verbose=0)[1]
    print(json.dumps({"accuracy": float(accuracy), "epochs": epochs, "train_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
