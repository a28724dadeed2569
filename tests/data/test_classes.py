"""Classes found again by name: order, case, normal form and spelling of numbers do not matter."""

import unicodedata

import numpy as np
import pytest

from gammabeta.data import Dataset, Split
from gammabeta.data.classes import as_classes
from gammabeta.errors import DataError


def dataset(*classes: str) -> Dataset:
    """One image of each class, whose pixel is the number of its class."""
    count = len(classes)
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    split = Split(images, np.arange(count))
    return Dataset("mine", split, split, classes)


def meant(found: Dataset) -> list[str]:
    """For each image of ``dataset``, in order, the class that its label now means."""
    assert found.train.images.flatten().tolist() == list(range(len(found.train)))
    return [found.classes[label] for label in found.train.labels]


TWELVE = [str(number) for number in range(12)]
NFC, NFD = (unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("names", "classes", "wanted", "told"),
    [
        (["dog", "cat"], ["cat", "dog"], ["dog", "cat"], ""),
        (["cat", "Dog"], ["cat", "dog"], ["cat", "dog"], "case differ: Dog = dog"),
        (["STRASSE", "ufer"], ["ufer", "Straße"], ["Straße", "ufer"], "case differ"),
        (TWELVE, sorted(TWELVE), TWELVE, ""),
        (["07", "1.5"], ["1.5", "7"], ["7", "1.5"], "numbers are written differently: 07 = 7"),
        (["1.0", "２"], ["2", "1"], ["1", "2"], "numbers are written differently"),
        ([NFD, "b"], ["b", NFC], [NFC, "b"], "normal forms differ"),
        ([NFC.upper(), "b"], ["b", NFD], [NFD, "b"], "case differ"),
        (["dog", "Dog"], ["Dog", "dog"], ["dog", "Dog"], ""),
        (["b"], ["a", "b", "c"], ["b"], ""),
    ],
)
def test_labels_mean_the_classes_of_the_same_name(names, classes, wanted, told):
    found = as_classes(dataset(*names), classes, "the network")
    assert found.classes == tuple(classes)
    assert meant(found) == wanted
    assert len(found.notes) == bool(told)
    assert told in "".join(found.notes)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["ant", "zebra"], ["cat", "dog"]),
        (["cat", "dog", "emu"], ["cat", "dog"]),
        (["DOG"], ["Dog", "dog"]),  # could be either
        (["Dog", "DOG"], ["dog", "x"]),  # both would be one
        (["0", "1"], ["cat", "dog"]),
        (["1", "01"], ["1", "2"]),
    ],
)
def test_what_cannot_be_matched_is_refused_with_both_lists(names, classes):
    with pytest.raises(DataError, match="cannot be matched by name") as caught:
        as_classes(dataset(*names), classes, "the network")
    for name in (*names, *classes):
        assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_need_not_be_matched():
    whole = dataset("cat", "dog", "emu")
    split = Split(whole.train.images[:2], whole.train.labels[:2])
    found = as_classes(Dataset("mine", split, split, whole.classes), ["dog", "cat"], "the network")
    assert meant(found) == ["cat", "dog"]
