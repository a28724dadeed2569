"""The temperature: found again where it is known, cautious where little is known, and kept with a run."""

import pytest
import torch

from gammabeta.train.calibrate import temperature


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5])
def test_a_known_temperature_is_found(true):
    logits = 2 * torch.randn(40_000, 6, dtype=torch.float64)
    labels = torch.multinomial((logits / true).softmax(1), 1).squeeze(1)
    assert temperature(logits.softmax(1).float(), labels) == pytest.approx(true, rel=0.03)


def test_it_has_the_lowest_loss():
    logits = 3 * torch.randn(2000, 4)
    labels = torch.where(torch.rand(2000) < 0.7, logits.argmax(1), torch.randint(0, 4, (2000,)))
    found = temperature(logits.softmax(1), labels)

    def loss(t):
        return float(torch.nn.functional.cross_entropy(logits / t, labels))

    assert loss(found) < min(loss(0.9 * found), loss(1.1 * found), loss(1.0))


def test_a_few_images_without_a_mistake_give_no_certainty():
    probabilities = torch.tensor([[0.8, 0.1, 0.1]] * 5)
    labels = torch.zeros(5, dtype=torch.long)
    found = temperature(probabilities, labels)
    assert 0.8 < float((probabilities[0].log() / found).softmax(0)[0]) < 0.98
    assert temperature(probabilities[:0], labels[:0]) == 1.0
