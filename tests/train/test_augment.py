"""What happens to training pictures: each change against its definition, and alike for parts of a batch."""

import math

import numpy as np
import pytest
import torch

from gammabeta.data import Split
from gammabeta.train import load_recipe
from gammabeta.train.augment import Augmentation
from gammabeta.train.batches import DeviceImages, Scaling, generator_for, mixing_share

CPU = torch.device("cpu")


def numbers(**places: float) -> torch.Tensor:
    """The numbers of one picture, 0 but for those named by what they decide."""
    names = ("area", "ratio", "right", "down", "turn", "brightness", "contrast", "saturation", "hue")
    return torch.tensor([[places.get(name, 0.0)] for name in names])


def test_no_change_is_no_change() -> None:
    assert not Augmentation()
    x = 255 * torch.rand(1, 3, 12, 16)
    whole = Augmentation(crop=0.25, rotation=90, color=0.5).apply(x, numbers(area=1))
    torch.testing.assert_close(whole, x, rtol=0, atol=1e-2)


def test_a_crop_is_a_corner_enlarged() -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[:, :, 8:, 8:] = 200
    quarter = Augmentation(crop=0.25)
    corner = quarter.apply(x, numbers(area=-1, right=1, down=1))
    assert corner[..., 1:, 1:].min() == 200
    assert quarter.apply(x, numbers(area=-1, right=-1, down=-1))[..., :-1, :-1].max() == 0


def test_proportions_of_a_crop_stay_between_three_to_four_and_back() -> None:
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    half = Augmentation(crop=0.5)
    for ratio in (-1, 1):
        seen = half.apply(ramp, numbers(area=-1, ratio=ratio))[0, 0, 0]
        shown = (seen[-1] - seen[0] + 1) / 64  # of the width
        assert shown == pytest.approx(math.sqrt(0.5 * (4 / 3) ** ratio), abs=0.03)


def test_a_quarter_turn_is_exact_also_of_an_oblong() -> None:
    x = torch.zeros(1, 1, 9, 15)
    x[..., 4, 9] = 100  # two to the right of the middle
    turned = Augmentation(rotation=90).apply(x, numbers(turn=1))
    assert (turned[0, 0] > 99).nonzero().tolist() in ([[2, 7]], [[6, 7]])


def test_colours_move_by_their_factors() -> None:
    x = torch.full((1, 3, 4, 4), 100.0)
    x[:, 0, :2] = 140
    jitter = Augmentation(color=0.5)
    torch.testing.assert_close(jitter.apply(x, numbers(brightness=1)).mean(), 1.5 * x.mean())
    torch.testing.assert_close(jitter.apply(x, numbers(contrast=-1)).std(), 0.5 * x.std())
    grey = jitter.apply(x, numbers(saturation=-1))
    assert (grey.amax(1) - grey.amin(1)).max() == pytest.approx(20)
    whole = Augmentation(color=1)  # a third of a circle is beyond it: two sixths of the other colours
    third = whole.apply(x, numbers(hue=2 / 3 * 2))
    torch.testing.assert_close(third, x.roll(1, 1), rtol=1e-4, atol=1e-3)
    assert jitter.apply(250 + 0 * x, numbers(brightness=1)).max() == 255


def test_a_part_of_a_batch_is_changed_as_in_the_whole() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8)
    split, scaling = Split(pixels, np.arange(20)), Scaling.of(pixels, "standardized")
    settings = {"crop": 0.5, "rotation": 20, "color": 0.3, "flip": True, "shift": 1}
    images = DeviceImages.to_train_on(split, scaling, CPU, load_recipe("pictures", settings))
    assert images.augmented
    index = torch.randperm(20)
    whole, labels = images.batch(index, generator_for(0, 5))
    for part in (slice(7, 13), torch.tensor([19, 3, 3])):
        x, y = images.batch(index, generator_for(0, 5), part)
        torch.testing.assert_close(x, whole[part], rtol=1e-5, atol=1e-5)
        assert torch.equal(y, labels[part])


def test_the_share_of_mixup_is_its_distribution_folded_at_a_half() -> None:
    shares = np.array([mixing_share(0.4, 7, step) for step in range(2000)])
    assert shares.min() >= 0.5
    assert shares.max() <= 1
    # Of Beta(a, a) the variance is 1 / (4 (2a + 1)), about a half, whichever way it is folded.
    assert np.square(shares - 0.5).mean() == pytest.approx(1 / (4 * 1.8), rel=0.1)
    assert mixing_share(0.4, 7, 3) == shares[3]
