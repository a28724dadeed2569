"""``convert(to="tune")``: the gradients of frozen batch norm, from folded weights, in less memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import gammabeta as gb

CONVOLUTIONS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}
CONVOLUTIONS[3] = (nn.Conv3d, nn.ConvTranspose3d)
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(model, dtype=torch.float64):
    """With statistics and parameters as after some training."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return model.to(dtype)


def frozen(model):
    """The model with torch's frozen batch norms: in evaluation mode, while all else trains."""
    twin = copy.deepcopy(model).train()
    for layer in twin.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    return twin


def results(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    torch.manual_seed(3)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def kept(model, x):
    """Bytes kept for the backward pass, each storage once."""
    own = {p.data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(found.values())


def nodes(out):
    """The kinds of node in the graph behind a tensor."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [n for n, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, channels, 1), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients_of_the_unfolded_parameters(dims, transposed, bias, affine):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[dims][transposed](4, 6, 3, stride=2, padding=1, groups=2, bias=bias)
    model = trained(nn.Sequential(layer, NORMS[dims](6, affine=affine), nn.ReLU()))
    x = torch.randn(3, 4, *[7] * dims, dtype=torch.float64)
    tuned = gb.convert(model, to="tune", example=x)
    assert "_TunedBackward" in nodes(tuned(x))
    torch.testing.assert_close(results(tuned, x), results(frozen(model), x), rtol=1e-12, atol=1e-12)


def test_a_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), Bottleneck(8), nn.MaxPool2d(2), nn.Flatten()]
    model = trained(nn.Sequential(*layers, nn.Linear(72, 5), nn.BatchNorm1d(5), nn.ReLU()))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    tuned = gb.convert(model, to="tune", example=x).train()
    assert nodes(tuned(x)).count("_TunedBackward") == 6
    assert not any("BatchNorm" in name for name in nodes(tuned(x)))
    torch.testing.assert_close(results(tuned, x), results(frozen(model), x), rtol=1e-12, atol=1e-12)
    fused = {change.layer: change.fused for change in tuned.conversion_report.changes}
    assert fused["3.bn1"] == "Conv2d + relu"
    assert fused["7"] == "Linear + relu"
    assert tuned.state_dict().keys() == model.state_dict().keys()


def test_memory():
    torch.manual_seed(0)
    model = trained(nn.Sequential(*(Bottleneck(8) for _ in range(3))), torch.float32)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    assert kept(gb.convert(model, to="tune"), x) < 0.6 * kept(frozen(model), x)


def test_only_what_learns_gets_a_gradient():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        model.requires_grad_(False)
        model.get_parameter(name).requires_grad_()
        torch.testing.assert_close(
            results(gb.convert(model, to="tune"), x), results(frozen(model), x), rtol=1e-12, atol=1e-12
        )


def test_differentiable_twice():
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Conv1d(3, 2, 2)))
    tuned = gb.convert(model, to="tune")
    names = [name for name, _ in tuned.named_parameters()]

    def function(x, *parameters):
        for name, value in zip(names, parameters, strict=True):
            module, _, own = name.rpartition(".")
            tuned.get_submodule(module)._parameters[own] = value
        return tuned(x)

    inputs = [torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)]
    inputs += [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_what_changes_later_is_noticed():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.float32)
    x = torch.randn(2, 3, 6, 6)
    tuned, seen = gb.convert(model, to="tune"), []
    tuned[0].register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    torch.testing.assert_close(tuned(x), frozen(model)(x))
    torch.testing.assert_close(seen, [model[0](x)])
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), frozen(model)(x))
    with torch.autocast("cpu"):
        torch.testing.assert_close(tuned(x), frozen(model)(x), rtol=2e-2, atol=2e-2)
    tuned = gb.convert(model, to="tune")
    loss = tuned(x).sum()
    tuned[1].running_mean.add_(1)  # statistics of the time of the call count
    loss.backward()
    grad = tuned[1].weight.grad.clone()
    model.zero_grad()
    tuned[1].running_mean.sub_(1)
    frozen_model = frozen(model)
    frozen_model(x).sum().backward()
    torch.testing.assert_close(grad, frozen_model[1].weight.grad, rtol=1e-4, atol=1e-4)


def test_pickles_copies_and_the_way_back():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.float32).train()
    x = torch.randn(2, 3, 6, 6)
    tuned = gb.convert(model, to="tune")
    assert not tuned[1].training
    assert tuned[1].weight is model[1].weight
    for twin in (pickle.loads(pickle.dumps(tuned)), copy.deepcopy(tuned)):
        assert "_TunedBackward" in nodes(twin(x))
        torch.testing.assert_close(results(twin, x), results(tuned, x))
    back = gb.convert(tuned, to="torch")
    assert type(back[1]) is nn.BatchNorm2d
    assert back[1].training
    assert "_TunedBackward" not in nodes(gb.convert(tuned, to="frozen")(x.requires_grad_()))


def test_a_convolution_without_a_norm_behind_it_is_left():
    class Parted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    model = trained(Parted())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    tuned = gb.convert(model, to="tune", example=x)
    torch.testing.assert_close(results(tuned, x), results(frozen(model), x), rtol=1e-12, atol=1e-12)
    assert "_TunedBackward" not in nodes(tuned(x))
