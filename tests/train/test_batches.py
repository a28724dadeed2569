import numpy as np
import pytest
import torch

from gammabeta.data import Dataset, Split
from gammabeta.train import load_recipe
from gammabeta.train.batches import DeviceImages, Order, Scaling, batch_starts, generator_for

CPU = torch.device("cpu")


def test_unit_scaling_divides_by_255(digits: Dataset) -> None:
    images = DeviceImages(digits.train, Scaling.of(digits.train.images, "unit"), CPU)
    x, y = images.batch(torch.tensor([3, 1]))
    torch.testing.assert_close(x, torch.from_numpy(digits.train.images[[3, 1]]).float() / 255)
    assert y.tolist() == digits.train.labels[[3, 1]].tolist()


def test_standardized_pixels_have_zero_mean_and_unit_variance() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (50, 3, 16, 16), np.uint8)
    pixels[:, 1] //= 7
    split = Split(pixels, np.zeros(50, np.int64))
    x, _ = DeviceImages(split, Scaling.of(pixels, "standardized"), CPU).batch(slice(None))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var((0, 2, 3), correction=0), torch.ones(3))


def test_constant_pixels_do_not_divide_by_zero() -> None:
    assert Scaling.of(np.full((2, 1, 4, 4), 9, np.uint8), "standardized") == Scaling((9.0,), (1.0,))


def test_some_images_are_the_same_each_time_and_not_augmented(digits: Dataset) -> None:
    scaling = Scaling.of(digits.train.images, "unit")
    images = DeviceImages(digits.train, scaling, CPU, shift=1, flip=True)
    some = images.some(100)
    x, y = some.batch(slice(None))
    assert (len(some), x.shape[2:]) == (100, images.size)
    whole, labels = images.batch(slice(None))
    places = [int((whole == image).flatten(1).all(1).nonzero()[0, 0]) for image in x]
    assert y.tolist() == labels[places].tolist()
    assert places != list(range(100))
    torch.testing.assert_close(images.some(100).batch(slice(None))[0], x, rtol=0, atol=0)
    assert images.some(0) is images
    assert images.some(len(images)) is images


def test_each_epoch_sees_every_image_once_and_differently(digits: Dataset) -> None:
    order = Order(len(digits.train.labels), load_recipe("classic", {"epochs": 2}), seed=1)
    steps = order.steps_per_epoch
    first = torch.cat([order.indices(step) for step in range(steps)])
    second = torch.cat([order.indices(step) for step in range(steps, 2 * steps)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(640))
    assert first.tolist() != second.tolist()
    assert order.indices(0).tolist() == first[:64].tolist()  # going back gives the same again


@pytest.mark.parametrize(("count", "sizes"), [(128, [64, 64]), (129, [64, 65]), (130, [64, 64, 2]), (1, [1])])
def test_no_batch_of_one_is_left_over(count: int, sizes: list[int]) -> None:
    starts = batch_starts(count, 64)
    assert [end - start for start, end in zip(starts, [*starts[1:], count], strict=True)] == sizes
    order = Order(count, load_recipe("classic"), seed=0)
    assert [len(order.indices(step)) for step in range(order.steps)] == sizes


def test_shifts_stay_in_range_and_lose_nothing_at_zero() -> None:
    pixels = np.zeros((1, 1, 16, 16), np.uint8)
    pixels[0, 0, 8, 8] = 255
    split = Split(pixels, np.zeros(1, np.int64))
    images = DeviceImages(split, Scaling((0.0,), (1.0,)), CPU, shift=2)
    index = torch.zeros(500, dtype=torch.int64)
    x, _ = images.batch(index, generator_for(0, 1))
    places = {tuple((picture[0] > 0).nonzero()[0].tolist()) for picture in x}
    assert places == {(row, column) for row in range(6, 11) for column in range(6, 11)}
    plain, _ = images.batch(index)
    assert (plain == torch.from_numpy(pixels)).all()


def test_flips_mirror_about_half() -> None:
    pixels = np.arange(16 * 16, dtype=np.uint8).reshape(1, 1, 16, 16)
    split = Split(pixels, np.zeros(1, np.int64))
    images = DeviceImages(split, Scaling((0.0,), (1.0,)), CPU, flip=True)
    x, _ = images.batch(torch.zeros(400, dtype=torch.int64), generator_for(0, 1))
    upright = (x == torch.from_numpy(pixels)).flatten(1).all(1)
    mirrored = (x == torch.from_numpy(pixels[..., ::-1].copy())).flatten(1).all(1)
    assert (upright ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250
