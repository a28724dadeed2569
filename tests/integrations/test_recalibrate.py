"""In the loops of other libraries, statistics are exact when training has ended."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import gammabeta as gb
from gammabeta.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the libraries' own, when imported


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def samples() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(
        3 + torch.randn(48, 4, generator=generator), torch.randint(2, (48,), generator=generator)
    )


def exact(model: nn.Module) -> bool:
    """Whether the statistics are those of the data under the present weights."""
    loader = torch.utils.data.DataLoader(samples(), batch_size=16)
    fresh = gb.recalibrate(copy.deepcopy(model), loader).state_dict()
    names = [name for name in fresh if name.endswith(("running_mean", "running_var"))]
    return all(torch.allclose(fresh[name], model.state_dict()[name], rtol=1e-5, atol=1e-6) for name in names)


@pytest.mark.parametrize("when", ["end", "validation"])
def test_lightning(when, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    from gammabeta.integrations.lightning import Recalibrate

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.judged: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def on_validation_epoch_start(self) -> None:
            if not self.trainer.sanity_checking:
                self.judged.append(exact(self.net))

        def validation_step(self, batch, _):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    loader = torch.utils.data.DataLoader(samples(), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Recalibrate(when)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, on workers and loggers
        trainer.fit(module, loader, torch.utils.data.DataLoader(samples(), batch_size=16))
    assert exact(module.net)
    assert module.judged == [when == "validation"] * 2


def test_lightning_watches(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    from gammabeta.integrations.lightning import Watch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.net[1].momentum = 0.99

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    told = []
    watch = Watch(lambda module: module.net, tell=told.append)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[watch],
    )  # fmt: skip
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, on workers and loggers
        trainer.fit(module, torch.utils.data.DataLoader(samples(), batch_size=16))
    assert [one.finding.check for one in told] == ["momentum"]
    assert watch.guard.steps == 6
    assert not module.net._forward_pre_hooks


def test_lightning_takes_another_model_and_loader():
    pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    from gammabeta.integrations.lightning import Recalibrate

    module = nn.Module()
    module.ema = network()
    callback = Recalibrate(
        loader=torch.utils.data.DataLoader(samples(), batch_size=16), model=lambda m: m.ema
    )
    callback.on_train_end(None, module)
    assert exact(module.ema)
    with pytest.raises(UsageError, match="'end' or 'validation'"):
        Recalibrate("epoch")


def test_ignite():
    engines = pytest.importorskip("ignite.engine", reason="Ignite is not installed")
    from gammabeta.integrations.ignite import Recalibrate

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = engines.create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
    loader = torch.utils.data.DataLoader(samples(), batch_size=16)
    Recalibrate(model, loader).attach(trainer)
    trainer.run(loader, max_epochs=2)
    assert exact(model)


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from gammabeta.integrations.transformers import Recalibrate

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Model()
    rows = [{"x": x, "labels": y} for x, y in samples()]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Recalibrate()]).train()
    assert exact(model.net)


@pytest.mark.parametrize("name", ["lightning", "ignite", "transformers"])
def test_what_is_missing_is_named(name, monkeypatch):
    import importlib
    import sys

    from gammabeta.errors import UnavailableError

    for package in (
        "lightning",
        "lightning.pytorch",
        "pytorch_lightning",
        "ignite",
        "ignite.engine",
        "transformers",
    ):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"gammabeta.integrations.{name}", raising=False)
    with pytest.raises(UnavailableError, match=r"needs .*: pip install"):
        importlib.import_module(f"gammabeta.integrations.{name}")
