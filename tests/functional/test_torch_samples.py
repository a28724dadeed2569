"""PyTorch's own sample inputs for batch norm: ours beside the original."""

import copy

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import gammabeta as gb

OPS = [op for op in op_db if op.name == "nn.functional.batch_norm"]
MODULES = {
    info.module_cls.__name__: info for info in module_db if info.module_cls.__name__.startswith("BatchNorm")
}


@pytest.fixture(autouse=True, params=["small", "kernels"])
def path(request, monkeypatch):
    """Each sample twice: as small inputs go, and through the kernels where there is one."""
    if request.param == "kernels":
        for name in ("SMALL_TRAIN", "SMALL_EVAL"):
            monkeypatch.setattr(f"gammabeta.functional.step.{name}", [0, 0, 0])


def differentiate(out, inputs):
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    return torch.autograd.grad(out, wanted, grad, allow_unused=True) if wanted else ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_op_info(dtype):
    count = 0
    for op in OPS:
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            results = []
            for function in (op.op, gb.functional.batch_norm):
                running = [t.clone() if t is not None else None for t in sample.args[:2]]
                try:
                    out = function(sample.input, *running, *sample.args[2:], **sample.kwargs)
                except Exception as error:
                    results.append((type(error), str(error)))
                    continue
                grads = differentiate(out, (sample.input, *sample.args[2:]))
                results.append(
                    [out, *(g for g in grads if g is not None), *(t for t in running if t is not None)]
                )
            if isinstance(results[0], tuple):
                assert results[0] == results[1]
            else:
                tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-4
                torch.testing.assert_close(
                    results[1], results[0], rtol=tolerance, atol=tolerance, equal_nan=True
                )
            count += 1
    assert count >= 12


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module_info(name, training, dtype):
    info = MODULES[name]
    samples = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert len(samples) >= 6
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
        ours = getattr(gb.nn, name)(*args, **kwargs, dtype=dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert repr(ours) == repr(theirs)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        (x,) = sample.forward_input.args
        both = []
        for layer in (ours, theirs):
            leaf = x.detach().clone().requires_grad_()
            out = layer(leaf)
            both.append([out, *differentiate(out, (leaf, *layer.parameters()))])
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(copy.deepcopy(ours).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_farther_from_the_truth_than_torchs(name, training, dtype):
    """Where ours differs from torch's class it is the nearer one, or right but for the rounding of storage.

    The truth is torch's class in float64, on the same rounded inputs, parameters and statistics.
    """
    info = MODULES[name]
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        exact = info.module_cls(*args, **kwargs, dtype=torch.float64).train(training)
        theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
        ours = getattr(gb.nn, name)(*args, **kwargs, dtype=dtype).train(training)
        for layer in (exact, ours):
            layer.load_state_dict(theirs.state_dict())
        (x,) = sample.forward_input.args
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        found = []
        for layer in (ours, theirs, exact):
            leaf = (x.detach().double() if layer is exact else x.detach().clone()).requires_grad_()
            out = layer(leaf)
            gradients = torch.autograd.grad(out, [leaf, *layer.parameters()], grad.to(out.dtype))
            found.append([out, *gradients, *layer.buffers()])
        for mine, other, true in zip(*found, strict=True):
            if true.numel():
                error, torchs = ((t.double() - true).abs().max() for t in (mine, other))
                stored = torch.finfo(dtype).eps / 2 * true.abs().max()
                assert error <= torch.maximum(torchs, stored) * (1 + 1e-6), (args, kwargs)


@pytest.mark.parametrize("name", MODULES)
def test_module_error_inputs(name):
    info = MODULES[name]
    if info.module_error_inputs_func is None:
        pytest.skip("this PyTorch has no samples of errors")
    samples = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True)
    for sample in samples:
        inputs = sample.module_error_input
        layer = getattr(gb.nn, name)(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            layer(*inputs.forward_input.args, **inputs.forward_input.kwargs)
    for shape in ((4,), (2, 3, 4, 5, 6, 7)):
        ours, theirs = getattr(gb.nn, name)(3), info.module_cls(3)
        with pytest.raises(ValueError, match="expected") as expected:
            theirs(torch.randn(shape))
        with pytest.raises(ValueError, match="expected") as found:
            ours(torch.randn(shape))
        assert str(found.value) == str(expected.value)
