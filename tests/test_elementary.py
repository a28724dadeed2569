"""Loss, softmax, SGD and accuracy against torch, at sizes where a careless formula breaks."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from gammabeta import elementary
from gammabeta.errors import UsageError


def test_softmax_and_cross_entropy_agree_with_torch_and_differentiate() -> None:
    logits = (torch.randn(5, 4, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.tensor([0, 3, 2, 2, 1])
    torch.testing.assert_close(elementary.softmax(logits), logits.softmax(1))
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(elementary.softmax_cross_entropy(logits, labels), expected)
    assert gradcheck(lambda z: elementary.softmax_cross_entropy(z, labels), logits)
    assert gradgradcheck(lambda z: elementary.softmax_cross_entropy(z, labels), logits)


def test_softmax_is_stable_row_by_row() -> None:
    logits = torch.tensor([[0.0, 1.0], [1000.0, 1001.0]])
    rows = elementary.softmax(logits)
    torch.testing.assert_close(rows[0], rows[1])
    one_maximum = (logits - logits.max()).exp()
    assert (one_maximum / one_maximum.sum(1, keepdim=True))[0].isnan().all()  # the notebook's


def test_sgd_step_moves_against_the_gradient_in_place() -> None:
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    elementary.sgd_step([parameter], [torch.tensor([10.0, -10.0])], 0.1)
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="shorter"):
        elementary.sgd_step([parameter], [], 0.1)


def test_accuracy_counts_rows() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert elementary.accuracy(logits, torch.tensor([1, 0, 0, 0], dtype=torch.uint8)) == 0.75


def test_pooling_needs_a_block() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        elementary.mean_pool_2x2(torch.zeros(1, 1, 1, 4))
