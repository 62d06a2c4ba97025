"""The page of an export, from a report as data."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters import MaxDrop, Prune, Quantize, Recipe
from outrider_exporters.recipe import RecipeFile
from outrider_exporters.report.page import flat, higher_is_better, main_metric, pareto, write_report
from outrider_runtimes.errors import ExportError

FILE = RecipeFile(recipe=Recipe([Prune(ratio=0.5), Quantize()]), gates=(MaxDrop("accuracy", points=1.0),), seed=3)


def variant(name, accuracy, ms, size, note=""):
    return {
        "name": name,
        "format": name.split("-")[0],
        "precision": "int8",
        "scheme": "qdq<b>",
        "size_bytes": size,
        "metrics": {"f1": 0.5, "accuracy": accuracy},
        "latency_host_ms_p50": ms,
        "latency_noise": 0.012,
        "parity": 0.01,
        "likeness": {"rows": 500, "snr_db": 31.4, "changed": 0.0125},
        "targets": {"pi4": "unmeasured"},
        "note": note,
    }


def stage(name, accuracy, detail):
    metrics = {"f1": 0.5, "accuracy": accuracy}
    return {"name": name, "metrics": metrics, "parameters": 500, "macs": 900, "seconds": 3.0, "detail": detail}


SCAN = {
    "metric": "accuracy",
    "value": 0.96,
    "rows": 100,
    "points": [
        {"group": "conv.1", "units": 16, "kept": kept, "drop_points": drop, "macs": 0.1}
        for kept, drop in ((12, 0.5), (8, 4.0))
    ],
}
REPORT = {
    "name": "digits",
    "version": 2,
    "baseline": stage("baseline", 0.96, {}),
    "stages": [stage("prune", 0.95, {"channels": {"conv.1": [16, 8]}, "sensitivity": SCAN, "skipped": {}})],
    "variants": [
        variant("onnx-int8", 0.94, 0.5, 9000, "no faster than float32"),
        variant("tflite-int8", 0.93, 0.3, 8000),
    ],
    "gates": [
        {
            "gate": {"type": "max_drop", "metric": "accuracy", "points": 1.0},
            "variant": "onnx-int8",
            "figure": 2.0,
            "bound": 3.0,
            "passed": True,
            "text": "accuracy is 0.94",
            "blame": "",
            "layers": "",
        }
    ],
    "bundle": {"path": "digits.outrider", "digest": "ab" * 32, "size_bytes": 30000},
    "golden": {"rows": 64, "from": "test", "trained_on": 0},
    "environment": {"machine": "x86_64", "cpu_features": ["avx2"], "tools": {"torch": "2"}},
    "recipe": FILE.recipe.to_dict(),
    "targets": ["pi4"],
    "seconds": 12.0,
    "seed": 3,
    "asked": FILE.to_dict(),
    "command": "outrider export recipe.toml --output digits.outrider",
    "choices": [{"target": "pi4", "latency": "unmeasured", "kept": ["onnx-int8"], "notes": {}, "dropped": {}}],
    "passed_over": [variant("onnx-int8-u8s8", 0.94, 0.4, 9100)],
    "dropped": {"onnx-int8-u8s8": "pi4: unsigned activations are not its int8 form"},
    "layers": {"onnx-int8": [{"layer": "conv.1", "operator": "Conv", "error": 0.1, "added": 0.05}]},
    "offload": {},
    "quantization": {"text": "no quantized form beats float32: <onnx>", "faster": [], "smaller": [], "tried": {}},
}


class Page(HTMLParser):
    """The text, the headings, and whatever the page would load from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.words, self.headings, self.loaded, self._heading = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._heading = tag in ("h2", "h3")
        names = dict(attrs)
        self.loaded += [v for k, v in names.items() if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        if tag in ("script", "link", "iframe"):
            self.loaded.append(tag)

    def handle_data(self, data):
        self.words.append(data)
        if self._heading:
            self.headings.append(data)
            self._heading = False


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = write_report(tmp_path_factory.mktemp("report") / "report.html", REPORT)
    return path, Page(path.read_text(encoding="utf-8"))


def test_every_section_is_there(written):
    assert written[1].headings == [
        "Before and after",
        "Variants",
        "Targets",
        "Gates",
        "Quantization error by layer",
        "Pruning sensitivity",
        "What each pass changed",
        "prune",
        "Environment and golden rows",
        "How to make it again",
    ]


def test_the_page_loads_nothing(written):
    path, page = written
    assert page.loaded == []
    assert "@import" not in path.read_text()
    assert path.read_text().count("<svg") == 4


def test_the_page_says_what_matters(written):
    text = " ".join(" ".join(written[1].words).split())
    for words in (
        "none of them is a board's",
        "no faster than float32",
        "unsigned activations are not its int8 form",
        "drawn from the test part",
        "outrider export recipe.toml --output digits.outrider",
        "conv.1",
        "qdq<b>",
        "no quantized form beats float32: <onnx>.",
        "1.2%",
    ):
        assert words in text


def test_the_json_is_the_report(written):
    assert json.loads(written[0].with_suffix(".json").read_text()) == json.loads(json.dumps(REPORT))


def test_the_recipe_on_the_page_is_the_recipe(written):
    text = "".join(written[1].words)
    toml = text[text.rindex("version = ") :]
    assert RecipeFile.from_dict(tomllib.loads(toml)) == FILE


@pytest.mark.slow  # draws every picture a second time
def test_the_same_report_gives_the_same_page(written, tmp_path):
    again = write_report(tmp_path / "again.html", REPORT)
    assert again.read_bytes() == written[0].read_bytes()


def test_a_report_without_passes_gates_and_targets_has_no_empty_sections(tmp_path):
    plain = copy.deepcopy(REPORT)
    plain |= {"stages": [], "gates": [], "choices": [], "passed_over": [], "dropped": {}, "layers": {}, "command": ""}
    page = Page(write_report(tmp_path / "plain.html", plain).read_text())
    assert page.headings == [
        "Before and after",
        "Variants",
        "Gates",
        "Environment and golden rows",
        "How to make it again",
    ]


def test_a_missed_gate_stands_at_the_top(tmp_path):
    missed = copy.deepcopy(REPORT)
    missed["gates"][0] |= {"passed": False, "layers": "quantization error grows most in conv.1"}
    missed["bundle"] |= {"digest": "", "size_bytes": 0}
    text = " ".join(Page(write_report(tmp_path / "missed.html", missed).read_text()).words)
    assert "No bundle was written: onnx-int8 missed max_drop." in text
    assert "MISSED" in text
    assert "quantization error grows most in conv.1" in text


def test_the_metric_is_the_gates_else_the_first():
    assert main_metric(REPORT) == "accuracy"
    assert main_metric({**REPORT, "gates": []}) == "f1"
    gate = {"gate": {"type": "max_drop", "metric": {"name": "f1", "higher_is_better": True}}}
    assert main_metric({**REPORT, "gates": [{"gate": {"type": "max_size"}}, gate]}) == "f1"


def test_the_direction_is_the_gates():
    def gated(kind, metric):
        return {"gates": [{"gate": {"type": "max_size"}}, {"gate": {"type": kind, "metric": metric}}]}

    assert higher_is_better({"gates": []})
    assert higher_is_better(gated("max_drop", "accuracy"))
    assert not higher_is_better(gated("max_metric", "error"))
    assert not higher_is_better(gated("max_drop", {"name": "error", "higher_is_better": False}))


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_the_front_is_what_no_other_point_beats(items, higher):
    front = {items[at] for at in pareto(items, higher_is_better=higher)}
    sign = 1 if higher else -1
    for cost, value in items:
        beaten = any(c <= cost and sign * v >= sign * value and (c, v) != (cost, value) for c, v in items)
        assert ((cost, value) in front) == (not beaten)


def test_figures_become_rows():
    detail = {"ratio": 0.51234, "channels": {"a": [16, 8]}, "none": None, "list": [{"x": 1}], "flag": True, "n": 12345}
    assert dict(flat(detail)) == {
        "ratio": "0.5123",
        "channels.a": "16 \N{RIGHTWARDS ARROW} 8",
        "none": "none",
        "list[0].x": "1",
        "flag": "True",
        "n": "12,345",
    }


def test_a_report_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(ExportError, match=r"report\.json cannot be written: No such file"):
        write_report(tmp_path / "gone" / "report.html", REPORT)
