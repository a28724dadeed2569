"""Packed layers: the same answers, oneDNN's only where it may be, and torch's own everywhere else."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gammabeta as gb
from gammabeta import epilogue
from gammabeta.accelerate import convolution, packed
from gammabeta.accelerate.convolution import PackedConv2d
from gammabeta.accelerate.packed import PackedLinear, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="this torch has no oneDNN")

ACTIVATIONS = {
    **{name: partial(row.module, **row.settings) for name, row in epilogue.ACTIVATIONS.items() if row.onednn},
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.3),
}


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of oneDNN, and let it take the smallest."""
    counted = []

    def counting(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: counted.append(name) or function(*args))
        monkeypatch.setattr(module, "WORTH", 0)

    counting(convolution, "_convolve")
    counting(packed, "_multiply")
    monkeypatch.setattr(convolution.serving, "unsupported", lambda activation: "left to oneDNN")
    return counted


def _network(activation=None, pool=True, **conv):
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, **{"kernel_size": 3, **conv}), nn.BatchNorm2d(6)]
    layers += [(ACTIVATIONS[activation] if activation else nn.ReLU)()]
    layers += [nn.AvgPool2d(2)] if pool else []
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(300), nn.BatchNorm1d(300), nn.ReLU())
    model(torch.randn(4, 4, 13, 12))  # statistics that are not 0 and 1
    return model.eval()


def _fold(model, **options):
    return gb.fold(model, torch.randn(2, 4, 13, 12), **options)


def _gap(got, model, x):
    wanted = copy.deepcopy(model).double()(x.double())
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_computed_by_onednn(calls, activation):
    model, x = _network(activation), torch.randn(3, 4, 13, 12)
    folded = _fold(model)
    assert folded.fold_report.packed == ("0", "5")
    assert isinstance(folded[0], PackedConv2d)
    assert [type(m).__name__ for m in folded[0].after][1:] == ["AvgPool2d"]
    assert all(isinstance(folded[i], nn.Identity) for i in (1, 2, 3, 6, 7))
    calls.clear()
    with torch.no_grad():
        assert _gap(folded(x), model, x) <= 1e-6
    assert calls == ["_convolve", "_multiply"]


@pytest.fixture
def served(monkeypatch):
    """Count the calls of our own kernel."""
    if convolution.serving.unsupported("relu"):
        pytest.skip(convolution.serving.unsupported("relu"))
    counted, function = [], convolution.serving.convolve
    monkeypatch.setattr(
        convolution.serving, "convolve", lambda *args: counted.append(args[0].shape) or function(*args)
    )
    return counted


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("padding", [0, (1, 2)])
def test_what_our_kernel_convolves(served, activation, pool, padding):
    model, x = _network(activation, pool, padding=padding), torch.randn(3, 4, 13, 12)
    folded = _fold(model)
    served.clear()
    with torch.no_grad():
        for form in (
            x,
            x.contiguous(memory_format=torch.channels_last),
            x[:1],
            x.transpose(2, 3).contiguous().mT,
        ):
            assert _gap(folded(form), model, form) <= 1e-6
    assert len(served) == (0 if activation == "leaky" else 4)


def test_what_our_kernel_leaves(served, monkeypatch):
    x = torch.randn(3, 4, 13, 12)
    with torch.no_grad():
        model = _network(groups=2)
        assert _gap(_fold(model)(x), model, x) <= 1e-6
        monkeypatch.setattr(convolution, "_SERVED", 1 << 10)  # multiply-adds
        model = _network(pool=False)
        assert _gap(_fold(model)(x), model, x) <= 1e-6
    assert served == []


@torch.no_grad()
def test_memory_that_our_kernel_cannot_read(served):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded = _fold(model)
    served.clear()
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    assert _gap(folded(negative), model, x) <= 1e-6
    folded[0].bias = nn.Parameter(torch.randn(6, 2)[:, 0])
    assert torch.allclose(folded(x), folded._call_impl(x.requires_grad_()), rtol=1e-4, atol=1e-5)
    folded[0].bias = nn.Parameter(torch.randn(6).double())
    with pytest.raises(RuntimeError, match=r"(?i)double"):
        folded(x.detach())
    folded[0].bias = None
    folded[0].weight = nn.Parameter(torch.randn(7, 4, 3, 3))  # not what the Linear was made for
    with pytest.raises(RuntimeError, match="shapes"):
        folded(x.detach())
    assert served == []


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize(
    "conv",
    [
        {},
        {"bias": False},
        {"groups": 2},
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"kernel_size": (1, 4), "padding": (0, 2)},
        {"padding": 1},
    ],
    ids=str,
)
def test_every_setting_cropped_and_in_parts(calls, monkeypatch, conv, images):
    monkeypatch.setattr(convolution, "_LARGE_POOL", 0)
    monkeypatch.setattr(convolution, "_PART", 4 * 6 * 140 * 3)  # about three images at a time
    model, x = _network(**conv), torch.randn(images, 4, 13, 12)
    folded = _fold(model)
    for form in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
        with torch.no_grad():
            assert _gap(folded(form), model, x) <= 1e-6
    plan = folded[0]._plans[x.shape]
    assert plan.kernel == folded[0].pool
    height, width = folded[0]._size(x.shape)
    assert bool(plan.crop) == (folded[0].padding == (0, 0) and (height % 2 or width % 2) == 1)
    assert ("_convolve" in calls) == plan.own


def test_a_gradient_takes_torch_s_operators(calls):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded, plain = _fold(model), _fold(model, pack=False)
    upstream = torch.randn(3, 300)
    calls.clear()
    found = []
    for network in (folded, plain):
        given = x.clone().requires_grad_()
        (network(given) * upstream).sum().backward()
        found.append([given.grad, *(p.grad for p in network.parameters())])
    assert calls == []
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    folded.requires_grad_(False)
    folded(x)
    assert calls == ["_convolve", "_multiply"]
    calls.clear()
    given = x.clone().requires_grad_()
    folded(given).sum().backward()
    assert given.grad is not None
    assert calls == []


def _double_in_place(layer):
    layer.weight.mul_(2)


def _assign(layer):
    layer.weight = nn.Parameter(layer.weight * 2)


def _set_data(layer):
    layer.weight.data = layer.weight * 2


def _load(layer):
    layer.load_state_dict(
        {name: tensor * (1 + (name == "weight")) for name, tensor in layer.state_dict().items()}
    )


@pytest.mark.parametrize("change", [_double_in_place, _assign, _set_data, _load])
@pytest.mark.parametrize("place", [0, 5])
@torch.no_grad()
def test_a_changed_weight_is_seen(calls, change, place):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded, plain = _fold(model), _fold(model, pack=False)
    before = folded(x)
    for network in (folded, plain):
        change(network[place])
    calls.clear()
    assert (folded(x) - plain(x)).abs().max() <= 1e-6 * plain(x).abs().max()
    assert not torch.equal(folded(x), before)
    assert "_convolve" in calls


@torch.no_grad()
def test_another_dtype_and_back(calls):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded = _fold(model)
    once = folded(x)
    calls.clear()
    assert _gap(folded.double()(x.double()), model, x) <= 1e-7
    assert calls == []
    assert torch.equal(folded.float()(x), once)
    assert calls == ["_convolve", "_multiply"]


@torch.no_grad()
def test_copies_pickles_and_state(calls, tmp_path):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded, plain = _fold(model), _fold(model, pack=False)
    y = folded(x)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), y)
    assert torch.equal(copy.deepcopy(folded)(x), y)
    torch.save(folded, tmp_path / "m.pt")
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=False)(x), y)
    assert list(folded.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(folded.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@torch.no_grad()
def test_compilers_and_tracers_see_torch_s_operators(calls):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded, y = _fold(model), _fold(model, pack=False)(x)
    calls.clear()
    several = torch.export.Dim("batch")
    found = [
        torch.compile(folded, backend="eager", fullgraph=True)(x),
        torch.compile(folded, backend="eager", fullgraph=True, dynamic=True)(x),
        torch.export.export(folded, (x,), dynamic_shapes=({0: several},)).module()(x),
        torch.fx.symbolic_trace(folded)(x),
        torch.jit.trace(folded, x, check_trace=False)(x),
        torch.jit.script(folded)(x),
    ]
    assert all((answer - y).abs().max() <= 1e-6 * y.abs().max() for answer in found)
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@torch.no_grad()
def test_modes_and_transforms_see_torch_s_operators(calls):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded, plain = _fold(model), _fold(model, pack=False)
    y = plain(x)
    calls.clear()
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    for counter, network in zip(counters, (folded, plain), strict=True):
        with counter:
            network(x)
    assert counters[0].get_total_flops() == counters[1].get_total_flops() > 0
    with torch.device("cpu"):  # a function mode
        assert torch.equal(folded(x), y)
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of other settings
    try:
        assert torch.equal(folded(x), plain(x))
    finally:
        torch._C._set_mkldnn_enabled(True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(x), plain(x))
    tangents = torch.func.jvp(folded, (x,), (x,)), torch.func.jvp(plain, (x,), (x,))
    assert torch.equal(tangents[0][1], tangents[1][1])
    each = torch.vmap(folded)(x.unsqueeze(1))
    assert torch.allclose(each.flatten(0, 1), y, rtol=1e-5, atol=1e-5)
    assert calls == []


def test_under_inference_mode(calls):
    model, x = _network(), torch.randn(3, 4, 13, 12)
    folded = _fold(model)
    calls.clear()
    with torch.inference_mode():
        y = folded(x)
        inside = copy.deepcopy(folded)  # its parameters are inference tensors, whose changes nobody counts
        assert calls == ["_convolve", "_multiply"]
        assert (inside(x) - y).abs().max() <= 1e-6 * y.abs().max()
        assert calls == ["_convolve", "_multiply"]
    with torch.no_grad():
        assert torch.equal(folded(x), y)


def test_wrong_and_unusual_inputs_are_torch_s_affair():
    model = _network(pool=False)
    folded, plain = _fold(model), _fold(model, pack=False)
    with torch.no_grad():
        for x in (torch.randn(3, 5, 13, 12), torch.randn(3, 4, 1, 1), torch.randn(2, 3)):
            messages = []
            for network in (folded, plain):
                with pytest.raises(RuntimeError) as caught:
                    network[0](x)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
        for x in (torch.randn(4, 13, 12), torch.randn(0, 4, 13, 12)):  # without a batch, and none in it
            assert torch.equal(folded[0](x), plain[2](plain[1](plain[0](x))))
        vector = torch.randn(folded[4].in_features)
        assert torch.allclose(folded[4](vector), plain[6](plain[4](vector)), rtol=1e-5, atol=1e-6)


def test_without_our_kernels_torch_pools(monkeypatch):
    monkeypatch.setattr(convolution, "_LARGE_POOL", 0)
    monkeypatch.setattr(convolution, "_PART", 1)
    model, x = _network(), torch.randn(5, 4, 13, 12)
    monkeypatch.setattr(convolution.backend, "load", lambda name: "Numba is not installed")
    with torch.no_grad():
        assert _gap(_fold(model)(x), model, x) <= 1e-6


def test_the_output_s_strides_decide_unless_asked():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    x = torch.randn(2, 4, 13, 12)
    report = gb.fold(model, x).fold_report
    assert report.packed == ()
    assert report.unpacked == "the strides of the output would change; pack=True packs all the same"
    last = model.to(memory_format=torch.channels_last)
    assert gb.fold(last, x.contiguous(memory_format=torch.channels_last)).fold_report.packed == ("0",)
    folded = gb.fold(model, x, pack=True)
    assert folded.fold_report.packed == ("0",)
    assert "1 layer packed" in str(folded.fold_report)
    assert gb.fold(model, x, pack=False).fold_report.unpacked == "pack=False was asked for"


def test_what_others_see_or_share_stays_where_it_is():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 4, 3), nn.ReLU())
    model[2].register_forward_hook(lambda *_: None)
    model[5].register_forward_hook(lambda *_: None)
    folded = gb.fold(model, torch.randn(2, 4, 13, 12), pack=True)
    assert folded.fold_report.packed == ("0", "4")
    assert [len(folded[i].after) for i in (0, 4)] == [0, 0]  # one activation is called twice, one is watched
    assert type(folded[2]) is nn.Conv2d


def test_nothing_moves_where_the_flow_is_not_every_input_s():
    class Shaped(nn.Sequential):
        def forward(self, x):
            if x.shape[0] > 5:
                return self[1](x)
            return super().forward(x)

    model = Shaped(nn.Conv2d(4, 4, 3), nn.ReLU())
    folded = gb.fold(model, torch.randn(2, 4, 13, 12), pack=True)
    assert folded.fold_report.packed == ("0",)
    assert len(folded[0].after) == 0
    x = torch.randn(6, 4, 13, 12)
    assert torch.equal(folded(x), x.relu())


def test_a_wrong_answer_ships_the_plain_fold(monkeypatch):
    model, x = _network(), torch.randn(2, 4, 13, 12)
    right = convolution._convolve
    monkeypatch.setattr(convolution, "WORTH", 0)
    monkeypatch.setattr(convolution.serving, "unsupported", lambda activation: "left to oneDNN")
    monkeypatch.setattr(convolution, "_convolve", lambda *args: right(*args) * 1.001)
    report = gb.fold(model, x).fold_report
    assert report.packed == ()
    assert "moved by" in report.unpacked
    assert [layer.outcome for layer in report.layers] == ["folded", "folded"]
    assert report.native_error <= 1e-6

    def breaks(*args):
        raise RuntimeError("no such primitive")

    monkeypatch.setattr(convolution, "_convolve", breaks)
    folded = gb.fold(model, x)
    assert folded.fold_report.unpacked == "the packed model does not run: no such primitive"
    assert not any(isinstance(m, PackedConv2d | PackedLinear) for m in folded.modules())
