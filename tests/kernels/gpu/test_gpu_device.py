"""What only a GPU can show: graphs, streams, other devices, no waiting, large tensors, mixed precision."""

import pytest
import torch

import gammabeta as gb
from gammabeta.epilogue import Epilogue
from gammabeta.kernels.backend import Call, Normalized
from tests import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def layer(channels=8, device="cuda"):
    """With a smooth activation: at a kink either gradient is right, and a comparison fails by chance."""
    return gb.nn.BatchNorm2d(channels, activation="silu", device=device)


def step(bn, x, grad):
    leaf = x.detach().requires_grad_()
    out = bn(leaf)
    return out, *torch.autograd.grad(out, [leaf, bn.weight, bn.bias], grad)


def assert_layer_right(bn, x, grad, found):
    call = Call(x, bn.weight, bn.bias, None, Epilogue("silu"), bn.eps)
    for mine, exact in zip(found, oracle.truth(call, grad)[:4], strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_layer_takes_the_gpu_road():
    x = torch.randn(4, 8, 6, 6, device="cuda")
    bn = layer()
    assert gb.functional.explain(x, bn.running_mean, bn.running_var, training=True).path == "gpu"
    assert_layer_right(bn, x, torch.ones_like(x) + x, step(bn, x, torch.ones_like(x) + x))


@pytest.mark.parametrize(
    "shape", [(64, 256, 56, 56), (32, 2048, 7, 7), (1, 3, 2048, 2048), (65536, 300), (1 << 20, 1)]
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large(gpu, shape, channels_last, dtype):
    x = torch.randn(shape, device="cuda").mul_(2).add_(0.5).to(dtype)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape[1], device="cuda"), torch.randn(shape[1], device="cuda")
    residual, grad = torch.randn_like(x), torch.randn_like(x)
    call = Call(x, weight, bias, residual, Epilogue("silu"), 1e-5)
    oracle.assert_outcome(oracle.by_kernels(gpu, call, grad)[0], call, grad)


def test_more_than_two_to_the_31_elements(gpu):
    """The last images of a tensor of 2.2e9 values, against the same images alone under its statistics."""
    if torch.cuda.get_device_properties(0).total_memory < 30 << 30:
        pytest.skip("needs 30 GB")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(
            (34000, 64, 32, 32), device="cuda", dtype=torch.bfloat16, memory_format=layout
        ).normal_()
        call = Call(x, None, None, None, Epilogue("relu"), 1e-5)
        out, mean, _, invstd = gpu.forward_train(call)
        given = Normalized(call, mean, invstd)
        last = call._replace(x=x[-3:].clone(memory_format=torch.preserve_format))
        last = Normalized(last, mean, invstd)
        assert torch.equal(out[-3:], gpu.forward(last))
        torch.testing.assert_close(mean.abs().max().item(), 0.0, rtol=0, atol=1e-3)
        grad = out
        dx, dweight, dbias, _ = gpu.backward(grad, given, False)
        means = dbias / (x.numel() // 64), dweight / (x.numel() // 64)
        parts = gpu.backward_apply(grad[-3:].clone(memory_format=torch.preserve_format), last, means, False)
        torch.testing.assert_close(dx[-3:], parts[0], rtol=1e-2, atol=1e-3)
        del x, call, given, out, last, grad, dx, parts
        torch.cuda.empty_cache()


def test_nothing_waits_for_the_gpu():
    bn = layer()
    x, grad = torch.randn(16, 8, 12, 12, device="cuda"), torch.randn(16, 8, 12, 12, device="cuda")
    step(bn, x, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(bn, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph():
    bn = layer()
    x, grad = torch.randn(16, 8, 12, 12, device="cuda"), torch.randn(16, 8, 12, 12, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(bn, x, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(bn, x, grad)
    for _ in range(3):
        x.normal_()
        grad.normal_()
        graph.replay()
        assert_layer_right(bn, x, grad, found)
    assert int(bn.num_batches_tracked) == 4, "one warm-up and three replays"


def test_on_a_side_stream():
    bn = layer()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # so that a launch on another stream would read before x is written
        x, grad = torch.randn(64, 8, 32, 32, device="cuda"), torch.randn(64, 8, 32, 32, device="cuda")
        found = step(bn, x, grad)
    stream.synchronize()
    assert_layer_right(bn, x, grad, found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_other_than_the_current_one():
    bn = layer(device="cuda:1")
    x, grad = torch.randn(16, 8, 12, 12, device="cuda:1"), torch.randn(16, 8, 12, 12, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_layer_right(bn, x, grad, step(bn, x, grad))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_and_a_step_with_infinities(dtype):
    """Under autocast and GradScaler: an overflowing step is skipped and leaves no trace in the statistics."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, device="cuda"), layer(), torch.nn.Flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler()

    def train(x):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    train(torch.randn(8, 3, 10, 10, device="cuda"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(torch.full((8, 3, 10, 10), float("inf"), device="cuda"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train(torch.randn(8, 3, 10, 10, device="cuda"))
    assert int(model[1].num_batches_tracked) == 2
    assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice about matrix products
def test_compiled_as_eager():
    bn = layer()
    x, grad = torch.randn(16, 8, 12, 12, device="cuda"), torch.randn(16, 8, 12, 12, device="cuda")
    compiled = torch.compile(bn, fullgraph=True)
    leaf = x.detach().requires_grad_()
    out = compiled(leaf)
    found = out, *torch.autograd.grad(out, [leaf, bn.weight, bn.bias], grad)
    assert_layer_right(bn, x, grad, found)


def synchronised(rank, folder):
    """One of two NCCL ranks: 5 and 3 images of the same batch; writes its output and gradient."""
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=rank, world_size=2)
    x, grad = (t.cuda()[slice(0, 5) if rank == 0 else slice(5, 8)] for t in batch_of_eight())
    sync = gb.nn.SyncBatchNorm(8, activation="silu", device="cuda")
    out, dx, _, _ = step(sync, x, grad)
    torch.save(
        [out.detach().cpu(), dx.cpu(), sync.running_mean.cpu(), sync.running_var.cpu()], f"{folder}/{rank}"
    )
    torch.distributed.destroy_process_group()


def batch_of_eight():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 8, 6, 6, generator=generator) for _ in range(2)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.filterwarnings("default")  # NCCL's and the process group's own remarks
def test_synchronised_over_nccl(tmp_path):
    torch.multiprocessing.spawn(synchronised, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    bn = layer()
    x, grad = (t.cuda() for t in batch_of_eight())
    out, dx, _, _ = step(bn, x, grad)
    for whole, i in ((out, 0), (dx, 1)):
        torch.testing.assert_close(torch.cat([r[i] for r in ranks]), whole.cpu(), rtol=1e-4, atol=1e-5)
    for r in ranks:
        torch.testing.assert_close(r[2:], [bn.running_mean.cpu(), bn.running_var.cpu()], rtol=1e-5, atol=1e-6)
