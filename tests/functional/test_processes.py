"""Called from threads, after ``fork``, in a DataLoader's worker, under ``inference_mode``."""

import os
import threading

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import gammabeta as gb


def run(x):
    """Forward and backward through the CPU kernels, and torch's answer."""
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = gb.functional.batch_norm(leaf, None, None, training=True, activation="relu", backend="cpu")
    expected = F.relu(F.batch_norm(twin, None, None, training=True))
    grad = torch.ones_like(x) * torch.linspace(-1, 1, x.shape[-1])
    return [out, *torch.autograd.grad(out, leaf, grad)], [
        expected,
        *torch.autograd.grad(expected, twin, grad),
    ]


def test_threads_at_once():
    torch.set_num_threads(2)
    failures = []

    def work(seed):
        x = torch.randn(8, 4, 24, 24, generator=torch.Generator().manual_seed(seed))
        for _ in range(10):
            try:
                torch.testing.assert_close(*run(x), rtol=1e-4, atol=1e-5)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Normalised(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.randn(4, 4, 24, 24, generator=torch.Generator().manual_seed(i))
        ours, theirs = run(x)
        return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_dataloader_worker_after_use_in_the_parent():
    torch.set_num_threads(2)
    run(torch.randn(16, 4, 32, 32))
    for worst in DataLoader(Normalised(), batch_size=None, num_workers=1, multiprocessing_context="fork"):
        assert float(worst) < 1e-4


def test_fork():
    torch.set_num_threads(2)
    x = torch.randn(16, 4, 32, 32)
    run(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        ours, theirs = run(x)
        os._exit(
            0
            if all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
            else 1
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_inference_mode():
    layer = gb.nn.BatchNorm2d(4, activation="relu")
    x = torch.randn(64, 4, 32, 32)
    with torch.inference_mode():
        for training in (True, False):
            layer.train(training)
            out = layer(x)
            expected = F.relu(
                F.batch_norm(x, layer.running_mean.clone(), layer.running_var.clone(), training=training)
            )
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            assert out.is_inference()
    layer.train()(x.requires_grad_()).sum().backward()
    assert int(layer.num_batches_tracked) == 2
