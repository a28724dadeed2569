"""diagnose on what models and loaders come as; the report and its renderings."""

import json
import pickle
import xml.etree.ElementTree as ET
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gammabeta as gb
from gammabeta.doctor.checks import CHECKS, Check
from gammabeta.errors import UsageError
from scripts.doctor_page import BEGIN, END, PARTS, chapter, put_between, section


def checks(report) -> set[str]:
    return {finding.check for finding in report}


def trained_like(model: nn.Module, loader) -> nn.Module:
    """Statistics as of a long training: exact, with a count to match."""
    gb.recalibrate(model, loader)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(500)
    return model.eval()


def batches(*shape: int, count: int = 6, size: int = 32):
    return [torch.randn(size, *shape) for _ in range(count)]


def test_every_check_is_registered_and_explains_itself():
    expected = """
    never-updated init-residue double-update unequal-updates invalid-statistics collapsed-variance
    exploding-variance dead-gamma momentum eps half-precision-buffers redundant-bias weight-decay-on-affine
    partly-frozen tracking-toggled dropout-before-bn last-batch-of-one unsynchronized-replicas rank-divergence
    train-eval-gap statistics-drift eval-mutates batch-dependence tiny-batch non-iid-batches dead-input"""
    assert set(CHECKS) == set(expected.split())
    for identifier, check in CHECKS.items():
        assert check.function.__module__.startswith("gammabeta.doctor.checks."), identifier
        for part in PARTS:
            assert f"\n{part}: " in check.doc, identifier


def test_the_page_says_what_the_checks_say():
    page = (Path(__file__).parents[2] / "docs/doctor.md").read_text(encoding="utf-8")
    assert put_between(page, BEGIN, END, chapter()) == page, (
        "run python -m scripts.doctor_page docs/doctor.md"
    )


def test_a_check_whose_docstring_lacks_a_part_gets_no_section():
    def my_check(evidence):
        """A summary.

        Symptom: a.
        Computation: b.
        Threshold: c
        in two lines.
        Fix: d.
        Source: e.
        """

    assert "- **Threshold**: c in two lines." in section(Check("my-check", my_check))
    my_check.__doc__ = my_check.__doc__.replace("Source", "See")
    with pytest.raises(SystemExit, match="my-check"):
        section(Check("my-check", my_check))


def test_without_anything_but_the_model():
    report = gb.diagnose(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert {(f.check, f.layer, f.severity) for f in report} == {
        ("never-updated", "1", "error"),
        ("redundant-bias", "1", "note"),
    }
    assert not report.healthy
    assert report.exit_code("error") == report.exit_code() == 1


def test_a_model_that_is_one_layer_and_a_model_without_any():
    loader = batches(5)
    assert gb.diagnose(trained_like(nn.BatchNorm1d(5), loader), loader).healthy
    empty = gb.diagnose(nn.Linear(3, 3), batches(3))
    assert empty.healthy
    assert "No batch normalization" in str(empty)


class Dicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, image, scale=1.0):
        return {"logits": self.norm(image) * scale}


@pytest.mark.parametrize(
    ("loader", "forward_fn"),
    [
        ([{"image": x, "label": 0} for x in batches(3, 4, 4)], None),
        ([{"a": {"b": x}} for x in batches(3, 4, 4)], lambda model, batch: model(batch["a"]["b"], 2.0)),
        ([(x, "name") for x in batches(3, 4, 4)], None),
    ],
    ids=["keywords", "forward_fn", "tuple"],
)
def test_forms_of_input(loader, forward_fn):
    model = Dicts()
    gb.recalibrate(model, loader, forward_fn=forward_fn)
    report = gb.diagnose(model.eval(), loader, forward_fn=forward_fn)
    assert report.healthy, str(report)
    assert report.evidence.samples == 192
    assert report.evidence.not_examined == []


def test_an_iterator_and_samples():
    model = trained_like(nn.BatchNorm1d(5), batches(5))
    report = gb.diagnose(model, iter(batches(5)), samples=40)
    assert report.evidence.samples == 64
    with pytest.raises(UsageError, match="no data"):
        gb.diagnose(model, [])
    with pytest.raises(UsageError, match="samples"):
        gb.diagnose(model, samples=0)
    with pytest.raises(UsageError, match="lazy"):
        gb.diagnose(nn.LazyBatchNorm2d())


def test_half_precision_model():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).bfloat16()
    loader = batches(1, 8, 8)
    report = gb.diagnose(trained_like(model, loader), loader)
    assert "half-precision-buffers" in checks(report)
    assert "statistics-drift" not in checks(report)


def test_torch_compile_and_ddp_wrappers_are_looked_through():
    loader = batches(5)
    inner = trained_like(nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), loader)
    report = gb.diagnose(torch.compile(inner, backend="eager"), loader)
    assert [layer.name for layer in report.evidence.layers] == ["1"]
    assert gb.diagnose(nn.DataParallel(inner), loader).healthy


class Block(nn.Module):
    """Additions, functional ReLU and dropout, and one layer under checkpointing."""

    def __init__(self, *, check: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.check = check

    def forward(self, x):
        y = F.dropout(F.relu(self.first(self.conv(x))), 0.4, self.training)
        if self.check and self.training:
            return checkpoint(self.second, x + y, use_reentrant=False)
        return self.second(x + y)


def test_tracing_sees_functions_and_not_only_modules():
    report = gb.diagnose(Block(), example=torch.randn(4, 4, 6, 6))
    first, second = (report.evidence.surroundings[name] for name in ("first", "second"))
    assert (first.producer, first.producer_bias, first.relu_after) == ("conv", True, True)
    assert (second.producer, second.relu_after, second.dropout, second.dropout_direct) == (
        None,
        False,
        0.4,
        False,
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_caught_in_the_act(reentrant):
    class Checked(Block):
        def forward(self, x):
            x = self.first(self.conv(x))
            return checkpoint(self.second, x, use_reentrant=reentrant) if self.training else self.second(x)

    report = gb.diagnose(Checked(), example=torch.randn(4, 4, 6, 6))
    assert report.evidence.updated_in_backward == ("second",)
    assert [f.layer for f in report if f.check == "double-update"] == ["second"]


def test_eval_that_cannot_reach_a_layer_is_seen_as_the_owner_runs_it():
    class AlwaysTrains(nn.BatchNorm1d):
        def train(self, mode: bool = True):
            return super().train(True)

    loader = batches(5)
    model = nn.Sequential(AlwaysTrains(5))
    gb.recalibrate(model, loader)
    report = gb.diagnose(model, loader)
    assert {"eval-mutates", "batch-dependence"} <= checks(report)


def test_statistics_kept_outside_buffers_are_seen_and_put_back():
    class Globals(nn.Module):
        """As the notebook keeps them: a plain dictionary."""

        def __init__(self) -> None:
            super().__init__()
            self.averages = {"mean": torch.zeros(5)}

        def forward(self, x):
            out = x - self.averages["mean"]
            self.averages["mean"] = 0.9 * self.averages["mean"] + 0.1 * x.mean(0)
            return out

    model = Globals()
    report = gb.diagnose(model, [x + 3 for x in batches(5)])
    assert [f.severity for f in report if f.check == "eval-mutates"] == ["warning"]
    assert torch.equal(model.averages["mean"], torch.zeros(5))


def test_error_that_explains_a_model_that_cannot_run():
    model = trained_like(nn.BatchNorm1d(5), batches(5))
    model.eps = 0.0
    report = gb.diagnose(model, batches(5))
    assert "eps" in checks(report)
    assert any("the data: ValueError" in line for line in report.evidence.not_examined)


def test_error_that_explains_nothing_passes_through():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(7, 2))  # never updated, and cannot take this input
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        gb.diagnose(model, batches(3, 4, 4))


def test_mended_by_recalibration():
    loader = [x * 4 + 7 for x in batches(3, 6, 6)]
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    assert {"never-updated", "statistics-drift", "train-eval-gap"} <= checks(gb.diagnose(model, loader))
    gb.recalibrate(model, loader)
    assert gb.diagnose(model, loader).healthy


@pytest.fixture
def report():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    loader = [(x, torch.randint(0, 3, (32,))) for x in batches(1, 8, 8)]
    trained_like(model, loader)
    model[1].running_mean += 3
    model[1].running_var[1] = float("inf")
    return gb.diagnose(model, loader, loss=F.cross_entropy)


def test_text(report):
    text = str(report)
    assert " ".join(text.split()).startswith(report.verdict)
    assert "invalid-statistics" in text
    assert report.in_short.startswith("In short: ")
    assert " ".join(report.in_short.split()[:6]) in text
    assert "fix" in text
    assert repr(report) == f"<Report: {report.verdict}>"


def test_the_verdict_is_a_sentence_that_names_the_worst(report):
    worst = "a running mean or variance that is not finite, or a negative variance"
    assert report.verdict.startswith(f"Not healthy: {worst} (")
    assert report.verdict.endswith(" in 1 batch-normalization layer on 192 samples).")
    assert "`" not in report.in_short


def test_the_code_to_paste_mends_every_layer():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.99), nn.BatchNorm1d(2, momentum=0.99))
    (group,) = (group for group in gb.diagnose(model).groups if group.first.check == "momentum")
    assert "&#39;1&#39;" in gb.diagnose(model).to_html()
    exec(group.code, {"model": model, "loader": [torch.randn(8, 2)], "gammabeta": gb})
    assert [layer.momentum for layer in model] == [0.01, 0.01]
    assert not any(bool((layer.running_mean == 0).any()) for layer in model)


def test_json_is_strict_and_complete(report):
    document = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert document["schema"] == "gammabeta.doctor/1"
    top = "schema gammabeta healthy verdict in_short counts findings layers gap samples not_examined"
    assert set(document) == set(top.split())
    keys = {"check", "layer", "severity", "evidence", "cause", "fix", "values"}
    assert all(set(finding) == keys for finding in document["findings"])
    assert document["counts"]["error"] == report.count("error") > 0
    assert document["layers"][0]["worst"] == "error"


def test_a_report_pickled_with_version_0_1_0_loads(report):
    text = pickle.dumps(report, protocol=2)  # names of modules without a length before them
    old = text.replace(b"gammabeta.stats.moments", b"gammabeta.surgery._moments")
    assert old != text
    assert pickle.loads(old).to_json() == report.to_json()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        for name in ("src", "href"):
            assert (values.get(name) or "data:").startswith("data:"), "the page must not need another file"
        if tag == "img":
            self.images.append(values["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_well_formed_self_contained_page(report, tmp_path):
    page = Page()
    page.feed(report.save_html(tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.images) == 3
    for image in page.images:
        ET.fromstring(b64decode(image.partition("base64,")[2]))
    assert "<script" not in report.to_html()
    assert report._repr_html_().startswith("<style>")


def test_names_in_the_page_are_escaped():
    model = nn.ModuleDict({"<b>": nn.BatchNorm1d(2)})
    assert "&lt;b&gt;" in gb.diagnose(model).to_html()
    assert "<b>norm" not in gb.diagnose(model).to_html()
