"""Going on with a changed recipe, with more epochs, and with another run's weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from gammabeta.data import Dataset, Split
from gammabeta.errors import GammabetaWarning, RunError, UsageError, WeightsError
from gammabeta.files import load_weights
from gammabeta.train import Run, TrainingInterrupted, load_model, load_recipe
from gammabeta.train.checkpoint import Checkpoints
from gammabeta.train.fitting import Observer
from gammabeta.train.loop import Progress
from gammabeta.train.resume import Resumption
from gammabeta.train.run import Job
from gammabeta.train.session import resume_run, train_run

SETTINGS = {"epochs": 3.0, "batch_size": 64, "precision": "fp32", "recalibrate": 128, "schedule": "linear"}
RECIPE = load_recipe("fast", SETTINGS | {"evaluate": "epoch"})
STEADY = RECIPE.model_copy(update={"schedule": "constant", "warmup": 0.0, "learning_rate": 0.05})


class StopAt(Observer):
    def __init__(self, step: int) -> None:
        self._step, self._reached = step, 0

    def progressed(self, progress: Progress, seconds: float) -> None:
        self._reached = progress.step

    def stop_requested(self) -> bool:
        return self._reached >= self._step


def train(digits: Dataset, path: Path, recipe=RECIPE, stop: int = 10**9, **job) -> Run:
    run, _ = train_run(digits, Job("digits", recipe, device="cpu", **job), path, StopAt(stop))
    return run


def go_on(
    path: Path, digits: Dataset, epochs: float | None = None, stop: int = 10**9
) -> tuple[Run, list[str]]:
    told: list[str] = []
    run, _ = resume_run(Resumption.of(path, epochs), digits, StopAt(stop), tell=told.append)
    return run, told


def edit(path: Path, old: str, new: str) -> None:
    text = (path / "recipe.toml").read_text("utf-8")
    assert old in text
    (path / "recipe.toml").write_text(text.replace(old, new), "utf-8")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, digits) -> Path:
    path = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(TrainingInterrupted):
        train(digits, path, stop=15)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits) -> Path:
    return train(digits, tmp_path_factory.mktemp("finished") / "run", STEADY).path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs = 3.0", "epochs = 1.0", "epochs is 1.0, was 3.0"),  # fewer than were done: ran for ever
        ("epochs = 3.0", "epochs = 9.0", "--epochs"),
        ("batch_size = 64", "batch_size = 32", "batch_size is 32, was 64"),
        ('schedule = "linear"', 'schedule = "cosine"', "schedule is 'cosine', was 'linear'"),
        ("shift = 1", "shift = 2", "shift is 2, was 1"),
        ("batch_norm = true", "batch_norm = false", "batch_norm is False, was True"),
    ],
)
def test_a_changed_recipe_is_noticed(interrupted, digits, tmp_path, old, new, words):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    edit(path, old, new)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(RunError, match="was changed since the checkpoint") as caught:
        go_on(path, digits)
    assert words in str(caught.value)
    assert before == {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_epochs_are_advised_only_where_they_were_changed(interrupted, tmp_path):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    text = (path / "recipe.toml").read_text("utf-8")
    for field, advised in (("epochs", True), ("learning_rate", False)):
        changed = re.sub(rf"(?m)^{field} = .*", f"{field} = 0.125", text)
        (path / "recipe.toml").write_text(changed, "utf-8")
        with pytest.raises(RunError, match=f"{field} is 0.125") as caught:
            Resumption.of(path)
        assert ("--epochs" in str(caught.value)) == advised


def test_another_seed_is_noticed_and_another_name_is_not(interrupted, digits, tmp_path):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    edit(path, 'name = "fast"', 'name = "mine"')
    Resumption.of(path)
    document = json.loads((path / "run.json").read_text("utf-8"))
    (path / "run.json").write_text(json.dumps(document | {"seed": 4}), "utf-8")
    with pytest.raises(RunError, match="has seed 4, its checkpoint 0"):
        Resumption.of(path)


@pytest.mark.parametrize(
    ("old", "new"), [("batch_size = 64", "batch_size = 32"), ("epochs = 3.0", "epochs = 1.0")]
)
def test_a_checkpoint_of_0_1_0_has_no_copy_but_its_counts_tell(interrupted, digits, tmp_path, old, new):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    checkpoints = Checkpoints(path)
    state, _ = checkpoints.load()
    for added in ("recipe", "seed", "judged"):
        state.values.pop(added)
    for step in checkpoints.steps():
        (path / "checkpoints" / f"step-{step}.json").unlink()
    checkpoints.save(state)
    edit(path, old, new)
    with pytest.raises(RunError, match=r"was changed|has been trained for 1\.5 epochs"):
        go_on(path, digits)


def test_a_finished_run_gets_more_epochs_as_if_it_always_had_them(finished, digits, tmp_path):
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    run, told = go_on(path, digits, epochs=5)
    whole = train(digits, tmp_path / "whole", STEADY.model_copy(update={"epochs": 5.0}))
    ours, theirs = (load_weights(each.path / "model.safetensors")[0] for each in (run, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any("5 epochs in all instead of 3" in line and "constant schedule" in line for line in told)
    again = Run.open(path)
    assert (again.info.status, again.recipe.epochs) == ("finished", 5)
    assert [(each.step, each.epochs) for each in again.info.extended] == [(30, 3.0)]
    assert again.info.extended[0].result["steps"] == 30
    judged = [(row["epoch"], row["split"]) for row in again.metrics() if row["kind"] == "evaluation"]
    assert judged == [(epoch, split) for epoch in range(5) for split in ("train", "test")]


def test_an_extension_that_is_interrupted_goes_on(finished, digits, tmp_path):
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(TrainingInterrupted):
        go_on(path, digits, epochs=5, stop=35)
    assert Run.open(path).info.status == "interrupted"
    run, told = go_on(path, digits)
    assert run.info.result["steps"] == 50
    assert not any("schedule" in line for line in told)


def test_the_stretched_schedule_is_told(interrupted, digits, tmp_path):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    run, told = go_on(path, digits, epochs=4)
    assert any("linear schedule is stretched" in line and "learning rate is now" in line for line in told)
    assert run.info.result["steps"] == 40


@pytest.mark.parametrize(
    ("epochs", "words"), [(3, "has been trained for 3 epochs"), (0.5, "3 epochs"), (-1, "epochs")]
)
def test_too_few_epochs_are_refused(finished, digits, epochs, words):
    with pytest.raises((RunError, UsageError), match=words):
        go_on(finished, digits, epochs=epochs)
    assert Run.open(finished).info.status == "finished"


def test_without_a_checkpoint_of_its_end_a_run_goes_on_from_its_weights(finished, digits, tmp_path):
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(path / "checkpoints")
    run, told = go_on(path, digits, epochs=4)
    assert any("from its weights" in line for line in told)
    assert run.info.result["steps"] == 40
    assert [row["step"] for row in run.metrics() if row["kind"] == "progress"][-1] == 40


def test_stopped_at_the_end_of_an_epoch_the_epoch_is_judged(digits, tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "run", stop=10)
    run, _ = go_on(tmp_path / "run", digits)
    judged = [row["epoch"] for row in run.metrics() if row["kind"] == "evaluation" and row["split"] == "test"]
    assert judged == [0, 1, 2]


@pytest.mark.parametrize("damage", ["missing", "emptied", "other", "cut", "foreign"])
def test_metrics_are_never_worth_a_training(interrupted, digits, tmp_path, damage):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    metrics = path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    if damage == "missing":
        metrics.unlink()
    else:
        content = {
            "emptied": b"",
            "other": b"{}\n[1]\n" + b"".join(lines[2:]),
            "cut": b"".join(lines)[:-20],
            "foreign": b"\xff\0" * 5000,
        }
        metrics.write_bytes(content[damage])
    run, told = go_on(path, digits)
    assert any("metrics.jsonl is damaged" in line for line in told)
    assert run.info.status == "finished"
    steps = [row["step"] for row in run.metrics() if row["kind"] == "progress"]
    assert steps == sorted(set(steps))
    assert steps[0 if damage in ("missing", "emptied", "foreign") else -1] >= 15
    assert steps[-1] == 30


def test_a_link_is_not_written_through(interrupted, digits, tmp_path):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    outside = tmp_path / "precious"
    outside.write_text("precious", "utf-8")
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").symlink_to(outside)
    go_on(path, digits)
    assert outside.read_text("utf-8") == "precious"
    for name in (".lock", "checkpoints"):
        other = Path(shutil.copytree(interrupted, tmp_path / f"run{name}"))
        folder = tmp_path / f"elsewhere{name}"
        (other / name).rename(folder)
        (other / name).symlink_to(folder)
        with pytest.raises(RunError, match="is a link"):
            go_on(other, digits)


def test_a_warm_start_begins_with_the_weights_of_a_run(finished, digits, tmp_path):
    short = RECIPE.model_copy(
        update={"epochs": 0.1, "learning_rate": 1e-6, "recalibrate": 0, "evaluate": "end"}
    )
    warm = train(digits, tmp_path / "warm", short, init=str(finished))
    cold = train(digits, tmp_path / "cold", short)
    accuracy = {run: load_model(run.path, "cpu").evaluate(digits.test).accuracy for run in (warm, cold)}
    assert accuracy[warm] > 0.7 > 0.3 > accuracy[cold]
    init = Run.open(warm.path).info.init
    assert init is not None
    assert Path(init.run) == finished.resolve()
    assert Run.open(cold.path).info.init is None


def test_a_warm_start_of_other_classes_keeps_what_they_share(finished, digits, tmp_path):
    names = ("9", "new", *"87654321")
    labels = {int(name): place for place, name in enumerate(names) if name != "new"} | {0: 1}
    turned = [
        Split(s.images, torch.tensor([labels[int(y)] for y in s.labels]).numpy())
        for s in (digits.train, digits.test)
    ]
    other = Dataset("other", *turned, names)
    short = RECIPE.model_copy(
        update={"epochs": 0.1, "learning_rate": 1e-6, "recalibrate": 0, "evaluate": "end"}
    )
    run = train(other, tmp_path / "run", short, init=str(finished))
    ours, theirs = (load_weights(path / "model.safetensors")[0]["fc2.bias"] for path in (run.path, finished))
    torch.testing.assert_close(ours[[0, 2, 9]], theirs[[9, 8, 1]], rtol=1e-3, atol=1e-3)


def test_a_warm_start_that_does_not_fit_writes_nothing(finished, digits, tmp_path):
    twin = RECIPE.model_copy(update={"batch_norm": False})
    with pytest.raises(WeightsError, match="--init needs a run with the same"):
        train(digits, tmp_path / "run", twin, init=str(finished))
    with pytest.raises(RunError, match="no run folder"):
        train(digits, tmp_path / "run", init=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_warm_start_killed_before_its_first_checkpoint_starts_the_same_again(finished, digits, tmp_path):
    source = Path(shutil.copytree(finished, tmp_path / "source"))
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "run", stop=1, init=str(source))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    _, told = go_on(tmp_path / "run", digits, stop=10**9)
    assert any("beginning with the weights of" in line for line in told)
    with pytest.raises(TrainingInterrupted):
        train(digits, tmp_path / "other", stop=1, init=str(source))
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    shutil.copy(tmp_path / "run" / "model.safetensors", source / "model.safetensors")
    with pytest.raises(RunError, match="not what this run began with"):
        go_on(tmp_path / "other", digits)


def test_fields_of_a_later_version_are_kept_and_told(interrupted, digits, tmp_path):
    path = Path(shutil.copytree(interrupted, tmp_path / "run"))
    document = json.loads((path / "run.json").read_text("utf-8"))
    document["colour"] = {"of": ["ink"]}
    document["network"]["layers"] = 7
    (path / "run.json").write_text(json.dumps(document), "utf-8")
    with (path / "recipe.toml").open("a", encoding="utf-8") as file:
        file.write("mixup = 0.2\n")
    with pytest.warns(GammabetaWarning) as told:
        run, _ = go_on(path, digits, epochs=3.5)
    words = " ".join(str(each.message) for each in told)
    assert "colour, network.layers" in words
    assert "mixup" in words
    kept = json.loads((path / "run.json").read_text("utf-8"))
    assert (kept["colour"], kept["network"]["layers"]) == ({"of": ["ink"]}, 7)
    assert "mixup = 0.2" in (path / "recipe.toml").read_text("utf-8")
    assert run.info.status == "finished"
