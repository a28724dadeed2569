"""Surgery on models that something wraps, compiles, scripts or adapts: right, or a line that says why not."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import gammabeta as gb
from gammabeta.errors import SurgeryError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript and torch.ao

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = Block(3, 4), Block(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.b(self.a(x)).mean((2, 3)))


class Adapter(nn.Module):
    """A low-rank adapter beside a convolution."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer, self.disabled = base, False
        self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, padding=base.padding, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)

    def forward(self, x):
        y = self.base_layer(x)
        return y if self.disabled else y + self.up(self.down(x))


class Adapted(nn.Module):
    """Wraps a model as adapter libraries do: whatever it lacks, it takes from the model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def plain():
    torch.manual_seed(0)
    model = Net()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model


def with_part(change):
    def build():
        model = plain()
        change(model)
        return model

    return build


def _compile_a(model):
    model.a = torch.compile(model.a, backend="eager")


def _compile_a_in_place(model):
    model.a.compile(backend="eager")


def _adapt(model):
    model.a.conv = Adapter(model.a.conv)


def _script_block(model):
    model.a = torch.jit.script(model.a.eval())


def _trace_block(model):
    model.a = torch.jit.trace(model.a.eval(), IMAGES)


def _script_norm(model):
    model.a.bn = torch.jit.script(model.a.bn.eval())


def _script_activation(model):
    model.a.act = torch.jit.script(model.a.act)


WRAPPED = {
    "DataParallel": lambda: nn.DataParallel(plain()),
    "DistributedDataParallel": lambda: nn.parallel.DistributedDataParallel(plain()),
    "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(plain()),
    "compiled": lambda: torch.compile(plain(), backend="eager"),
    "a compiled part": with_part(_compile_a),
    "a part compiled in place": with_part(_compile_a_in_place),
    "an adapter": lambda: Adapted(with_part(_adapt)()),
}
SCRIPTED = {
    "a scripted block": with_part(_script_block),
    "a traced block": with_part(_trace_block),
    "a scripted norm": with_part(_script_norm),
    "a scripted activation": with_part(_script_activation),
}
NORMS = {"a.bn", "b.bn"}


@contextmanager
def one_rank():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(params=[*WRAPPED, *SCRIPTED])
def built(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with one_rank():
            yield {**WRAPPED, **SCRIPTED}[request.param]
    torch._dynamo.reset() if "compiled" in request.param else None


def _named(names):
    """The names of layers without those of what wraps them."""
    return {".".join(part for part in name.split(".")[-3:] if part in ["a", "b", "bn"]) for name in names}


def _served(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def test_fold(built):
    model = built()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = gb.fold(model, IMAGES)
    assert torch.allclose(_served(folded), _served(built()), atol=1e-5)
    assert _named(layer.name for layer in folded.fold_report.layers) == NORMS
    outcome = next(layer.outcome for layer in folded.fold_report.layers if layer.name.endswith("b.bn"))
    # What an adapter's ``__getattr__`` hands out by name may run on its own: there the fold is guarded.
    assert outcome == ("guarded" if isinstance(model, Adapted) else "folded")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("example", [None, IMAGES], ids=["no example", "an example"])
def test_convert(built, example):
    converted = gb.convert(built(), example=example)
    assert torch.allclose(_served(converted), _served(built()), atol=1e-5)
    changes = converted.conversion_report.changes
    assert _named(change.layer for change in changes) == NORMS
    assert any("gammabeta" in change.after for change in changes if change.layer.endswith("b.bn"))


@pytest.mark.parametrize("name", WRAPPED)
def test_recalibrate(name):
    with one_rank():
        model, twin = WRAPPED[name](), WRAPPED[name]()
        while hasattr(twin, "module") or hasattr(twin, "_orig_mod"):
            twin = getattr(twin, "module", None) or twin._orig_mod
        if name.startswith("a compiled part"):
            twin.a = twin.a._orig_mod
        gb.recalibrate(model, [IMAGES])
    gb.recalibrate(twin, [IMAGES])
    found = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    wanted = [layer for layer in twin.modules() if isinstance(layer, nn.BatchNorm2d)]
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.running_mean, other.running_mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(one.running_var, other.running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCRIPTED)
def test_recalibrate_beside_torchscript(name):
    """tests/stats/test_reach.py knows which statistics are right."""
    model = SCRIPTED[name]()
    gb.recalibrate(model, [IMAGES])
    assert not torch.equal(model.b.bn.running_mean, plain().b.bn.running_mean)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_export(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with one_rank():
        assert gb.export_onnx(WRAPPED[name](), tmp_path / "model.onnx", IMAGES).error < 1e-5


def test_export_names_what_is_torchscript(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    target = tmp_path / "model.onnx"
    with pytest.raises(SurgeryError, match=r"a\.bn is TorchScript"):
        gb.export_onnx(SCRIPTED["a scripted norm"](), target, IMAGES)
    assert not target.exists()


def test_a_scripted_model_is_refused_in_one_line():
    scripted = torch.jit.script(plain().eval())
    for operate in (lambda: gb.fold(scripted, IMAGES), lambda: gb.convert(scripted)):
        with pytest.raises(
            SurgeryError, match=r"is TorchScript; (fold|convert) the model before it is scripted"
        ):
            operate()


# --- quantisation -----------------------------------------------------------------------------------------


def _layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64)
    ).eval()


def test_quantisation_of_packed_layers_names_the_way():
    """``quantize_dynamic`` would pass them by in silence; ``convert`` would give a model that fails."""
    folded = gb.fold(_layers(), IMAGES)
    if not folded.fold_report.packed:
        pytest.skip(folded.fold_report.unpacked)
    with pytest.raises(gb.errors.UsageError, match="pack=False"):
        torch.ao.quantization.quantize_dynamic(folded, {nn.Linear})
    folded.qconfig = torch.ao.quantization.default_qconfig
    with pytest.raises(gb.errors.UsageError, match="pack=False"):
        torch.ao.quantization.prepare(folded)


@pytest.mark.filterwarnings("ignore")  # of torch.ao
def test_a_folded_model_is_quantised():
    """Statically and dynamically, as near to the folded one as quantisation lets it be."""
    folded = gb.fold(_layers(), IMAGES, pack=False)
    wanted = _served(folded)
    dynamic = torch.ao.quantization.quantize_dynamic(folded, {nn.Linear})
    assert "quantized.dynamic" in type(dynamic[4]).__module__
    assert torch.allclose(dynamic(IMAGES), wanted, atol=0.05)
    wrapped = torch.ao.quantization.QuantWrapper(folded).eval()
    engine = next(e for e in ("x86", "fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines)
    torch.backends.quantized.engine = engine
    wrapped.qconfig = torch.ao.quantization.get_default_qconfig(engine)
    prepared = torch.ao.quantization.prepare(wrapped)
    prepared(IMAGES)
    quantised = torch.ao.quantization.convert(prepared)
    assert "quantized" in type(quantised.module[0]).__module__
    assert torch.allclose(quantised(IMAGES), wanted, atol=0.1)


def test_a_mapping_is_keyword_arguments_for_fold_and_convert_alike():
    class Named(Net):
        def forward(self, *, image, scale):
            return super().forward(image) * scale

    example = {"image": IMAGES, "scale": torch.tensor(2.0)}
    assert len(gb.fold(Named(), example).fold_report.folded) == 2
    assert gb.convert(Named(), example=example).conversion_report.fused
    for operate in (gb.fold, lambda model, given: gb.convert(model, example=given)):
        with pytest.raises(gb.errors.UsageError, match="example must be"):
            operate(Net(), "image")
