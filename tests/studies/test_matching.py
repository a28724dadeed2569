"""The assignment of ``repair`` against every permutation of small matrices; shuffled units found again."""

from itertools import permutations

import numpy as np
import pytest
import torch

import gammabeta.nn as ours
from gammabeta.studies.matching import assign
from gammabeta.studies.networks import convolutions
from gammabeta.studies.repair import matched
from gammabeta.studies.trial import outputs


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_cheapest_of_all_permutations(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(20):
        cost = random.integers(-5, 5, (n, n)).astype(float)  # ties too
        found = assign(cost)
        assert sorted(found) == list(range(n))
        least = min(sum(cost[i, p[i]] for i in range(n)) for p in permutations(range(n)))
        assert cost[np.arange(n), found].sum() == least


def test_channels_that_were_shuffled_are_found_again() -> None:
    model, shuffled = (convolutions((12, 12, 12), ours.BatchNorm2d) for _ in range(2))
    x = torch.randn(200, 1, 8, 8)
    for _ in range(5):
        model(x)  # running statistics
    shuffled.load_state_dict(model.state_dict())
    following = [shuffled[3], shuffled[6], shuffled[-1]]  # what reads the channels of each convolution
    with torch.no_grad():
        for i, reader in enumerate(following):
            order = torch.randperm(12)
            for tensor in (shuffled[3 * i].weight, *shuffled[3 * i + 1].state_dict().values()):
                if tensor.dim():
                    tensor.copy_(tensor[order].clone())
            reader.weight.copy_(reader.weight[:, order])
    assert not torch.equal(shuffled[0].weight, model[0].weight)
    torch.testing.assert_close(outputs(shuffled, x), outputs(model, x), atol=1e-5, rtol=0)
    back = matched(model, shuffled, x)
    for found, wanted in zip(back.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)
