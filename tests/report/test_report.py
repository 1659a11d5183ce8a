from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from distill.files import write_json
from distill.report import charts, headline, latency_rows, verdicts, write_report

EVIL = "</td><script>alert('x')</script>|`*[a](javascript:b)\n# big"
VOID = {"meta", "br", "img", "input", "hr", "link"}


def latency(*times: float) -> dict[str, dict[str, float]]:
    return {length: {"p50": time, "p90": time, "p99": time} for length, time in zip(("16", "32"), times, strict=True)}


def model(role: str, name: str, form: str, accuracy: float, size: float, **facts: Any) -> dict[str, Any]:
    metrics = {"accuracy": accuracy, "macro_f1": accuracy - 0.01}
    row = {"role": role, "name": name, "format": form, "parameters": 19_164_288, "bytes": size, "metrics": metrics}
    return {**row, "retention": accuracy / 0.91, "agreement": 0.97, "latency_ms": None, **facts}


RESULTS: dict[str, Any] = {
    "name": "Film reviews",
    "task": "text-classification",
    "created": "2026-11-23T07:24:07+00:00",
    "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
    "machine": {"cpu": "A CPU", "cores": 2},
    "labels": ["negative", "positive"],
    "data": {"train": 6920, "validation": 872, "test": 1821, "unlabelled": 60000, "source": "train.csv"},
    "metric": "accuracy",
    "models": [
        model("teacher", "Teacher", "PyTorch", 0.91, 91e6),
        model("teacher-onnx", "Teacher", "ONNX fp32", 0.91, 92e6, latency_ms=latency(8.0, 16.0)),
        model("baseline", "Same student, no distillation", "PyTorch", 0.88, 76e6),
        model("student-int8", "Student", "ONNX int8", 0.905, 20e6, latency_ms=latency(1.0, 2.0)),
    ],
    "curves": {
        "student": [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "accuracy": 0.8}, {"epoch": 2.0, "accuracy": 0.9}],
        "baseline": [{"epoch": 0.5, "loss": 1.0}, {"epoch": 1.0, "accuracy": 0.7}],
    },
    "layer_map": [{"student": 1, "teacher": 2}, {"student": 2, "teacher": 4}],
    "objective": [{"term": "soft_labels", "weight": 1.0}],
    "disagreements": [
        {
            "text": "not bad",
            "label": "positive",
            "teacher": "positive",
            "teacher_probability": 0.9,
            "student": "negative",
            "student_probability": 0.6,
        }
    ],
    "verification": [
        {"step": "export", "max_abs_diff": 2.4e-7, "agreement": 1.0, "metric": 0.91, "metric_before": 0.91},
        {
            "step": "int8 quantisation",
            "max_abs_diff": 0.31,
            "agreement": 0.994,
            "metric": 0.905,
            "metric_before": 0.91,
            "components": [{"name": "embeddings", "bytes": 12e6}, {"name": "layer 1", "bytes": 8e6}],
        },
    ],
    "bench": {
        "cells": [
            {"target": name, "batch": 1, "threads": 1, "length": length, "p50": time}
            for name, times in (("teacher.onnx", (8.0, 16.0)), ("int8.onnx", (1.0, 2.0)))
            for length, time in zip((16, 32), times, strict=True)
        ],
        "targets": [
            {"name": "teacher.onnx", "load_ms": 130.0, "memory_bytes": 210e6},
            {"name": "int8.onnx", "load_ms": 50.0, "memory_bytes": 64e6},
        ],
        "notes": ["A CPU, 2 cores"],
    },
    "stages": [{"name": "train", "seconds": 200.0}],
}


class Page(HTMLParser):
    """A page that must be well formed: every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(results: dict[str, Any], folder: Path) -> tuple[str, Page]:
    markdown, page = write_report(results, folder)
    return markdown.read_text(encoding="utf-8"), Page(page.read_text(encoding="utf-8"))


def test_both_files_tell_what_was_measured(tmp_path: Path) -> None:
    markdown, page = written(RESULTS, tmp_path)
    for text in (markdown, page.text):
        for fact in (
            "99.5%",
            "4.6x",
            "8.0x",
            "97.0%",
            "Film reviews",
            "1,821",
            "0.9050",
            "2.4e-07",
            "2026-11-23 07:24 UTC",
        ):
            assert fact in text
        assert "Same student, no distillation" in text
        assert "not bad" in text
    assert "| Student | ONNX int8 | 0.9050 | 0.8950 | 99.5% | 97.0% | 20.0 | 19,164,288 |" in markdown
    assert "| int8.onnx | 1.00 (8.0x) | 2.00 (8.0x) | 50 | 64.0 |" in markdown
    assert "student 1 ← teacher 2 student 2 ← teacher 4" in page.text


def test_markdown_tables_have_as_many_cells_as_columns(tmp_path: Path) -> None:
    """A bar in a text would move every number behind it into the wrong column."""
    results = copy.deepcopy(RESULTS)
    results["disagreements"][0]["text"] = EVIL
    markdown, _ = written(results, tmp_path)
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """It is opened from a disk, mailed, and kept for years."""
    _, page = written(RESULTS, tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img", "embed", "base"}
    values = [value or "" for _, given in page.tags for name, value in given.items() if name != "xmlns"]
    assert not [value for value in values if "//" in value or value.startswith("javascript:")]
    text = (tmp_path / "report.html").read_text()
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"')
    assert "@import" not in text
    assert "url(" not in text


def test_the_page_reads_on_a_phone_and_in_the_dark(tmp_path: Path) -> None:
    write_report(RESULTS, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert '<html lang="en">' in text


def test_every_chart_is_xml_with_a_title(tmp_path: Path) -> None:
    write_report(RESULTS, tmp_path)
    found = re.findall(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert len(found) == 4  # latency twice: a broad one and one for phones
    for chart in found:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img"
        assert [part.tag.rpartition("}")[2] for part in root[:2]] == ["title", "desc"]
        assert root[0].text
        assert root[1].text


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    """And JSON's way there and back changes nothing."""
    for name, results in (("a", RESULTS), ("b", json.loads(json.dumps(RESULTS)))):
        (tmp_path / name).mkdir()
        write_report(results, tmp_path / name)
    for file in ("report.md", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_lengths_stand_in_order_however_results_were_kept(tmp_path: Path) -> None:
    """A file's keys are sorted as text, where 128 stands before 16, and real text, 0, before both."""
    results = copy.deepcopy(RESULTS)
    times = {length: {"p50": 1.0} for length in ("16", "128", "0")}
    results["models"][1]["latency_ms"] = results["models"][3]["latency_ms"] = times
    row = {"graph": "plain", "form": "dynamic", "metric": 0.9, "drop": 0.1, "bytes": 20e6, "good": True, "chosen": True}
    results["tried"] = [{**row, "latency_ms": dict.fromkeys(times, 1.0)}]
    write_json(tmp_path / "results.json", results)
    files = []
    for name, each in (("made", results), ("kept", json.loads((tmp_path / "results.json").read_text()))):
        (tmp_path / name).mkdir()
        markdown, _ = written(each, tmp_path / name)
        assert "no gain at 16 tokens, 128 tokens, real text." in markdown
        assert "| MB | 16 tokens | 128 tokens | real text | kept |" in markdown
        assert re.findall(r"(\w+ \w+): Teacher", charts(each)["latency"]) == ["16 tokens", "128 tokens", "real text"]
        files.append([(tmp_path / name / file).read_bytes() for file in ("report.md", "report.html")])
    assert files[0] == files[1]


@pytest.mark.parametrize("weights", ["int8", "fp16", "blocks-4"])
def test_the_page_names_the_weights_that_ship(weights: str, tmp_path: Path) -> None:
    markdown, page = written({**RESULTS, "weights": weights}, tmp_path)
    assert f"Bytes of the {weights} file" in page.text
    assert ("int8 file" in markdown + page.text) == (weights == "int8")


def test_the_fastest_was_kept_only_where_a_candidate_was(tmp_path: Path) -> None:
    row = {"graph": "plain", "form": "dynamic", "metric": 0.9, "drop": 0.1, "bytes": 20e6, "latency_ms": {"16": 1.0}}
    good = {**row, "good": True, "chosen": True}
    lost = {**row, "good": False, "chosen": False, "latency_ms": {}}
    for tried, kept in (([lost, good], True), ([lost, lost], False)):
        markdown, page = written({**RESULTS, "tried": tried}, tmp_path)
        for text in (markdown, page.text):
            assert ("the fastest was kept." in text) == kept
            assert ("All lost too much, so none was timed; the first graph was repaired and kept." in text) != kept


def test_the_results_are_not_changed(tmp_path: Path) -> None:
    before = copy.deepcopy(RESULTS)
    write_report(RESULTS, tmp_path)
    assert before == RESULTS


@pytest.mark.parametrize("key", ["name", "labels", "text", "label", "model", "term", "target", "note", "stage", "cpu"])
def test_whatever_a_person_named_is_escaped(key: str, tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    if key == "name":
        results["name"] = EVIL
    elif key == "labels":
        results["labels"] = [EVIL, "b"]
    elif key in ("text", "label"):
        results["disagreements"][0] |= {key: EVIL, "teacher": EVIL, "student": EVIL}
    elif key == "model":
        results["models"][3]["name"] = EVIL  # also a name in the chart of latencies
    elif key == "term":
        results["objective"][0]["weight"] = EVIL
    elif key == "target":
        results["bench"]["targets"][1]["name"] = EVIL
    elif key == "note":
        results["bench"]["notes"] = [EVIL]
    elif key == "stage":
        results["stages"][0]["name"] = EVIL
    else:
        results["machine"]["cpu"] = EVIL
    markdown, page = written(results, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in markdown
    assert "](javascript" not in markdown
    assert "\n# big" not in markdown


@pytest.mark.parametrize("key", sorted(set(RESULTS) - {"name", "task"}))
def test_a_part_that_is_missing_is_said_to_be(key: str, tmp_path: Path) -> None:
    results = {name: value for name, value in RESULTS.items() if name != key}
    markdown, page = written(results, tmp_path)
    if key in ("models", "bench", "curves", "verification", "disagreements"):
        assert "Not measured." in page.text
    if key in ("models", "bench", "verification", "disagreements"):
        assert "Not measured." in markdown


def test_a_number_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    del results["models"][3]["agreement"]
    results["models"][3]["retention"] = None
    markdown, page = written(results, tmp_path)
    assert "| 0.9050 | 0.8950 | not measured | not measured |" in markdown
    row = page.text[page.text.index("Student ONNX int8") :].split()
    assert " ".join(row[:9]) == "Student ONNX int8 0.9050 0.8950 not measured not measured"
    assert [fact["value"] for fact in headline(results)] == ["not measured", "4.6x", "8.0x", "not measured"]


def test_nothing_measured_at_all(tmp_path: Path) -> None:
    markdown, page = written({"name": "empty", "task": "text-classification"}, tmp_path)
    assert markdown.count("Not measured.") == 4
    assert "empty" in page.text
    assert "undefined" not in markdown.lower() + page.text.lower()


def test_no_disagreement_is_not_the_same_as_none_measured(tmp_path: Path) -> None:
    markdown, page = written({**RESULTS, "disagreements": []}, tmp_path)
    assert "Nowhere on the test data." in markdown
    assert "Nowhere on the test data." in page.text


def test_no_baseline_is_not_praised(tmp_path: Path) -> None:
    models = [row for row in RESULTS["models"] if row["role"] != "baseline"]
    _, page = written({**RESULTS, "models": models}, tmp_path)
    assert "what distillation adds" not in page.text


def test_the_headline_is_of_the_file_that_ships() -> None:
    facts = {fact["name"]: fact["value"] for fact in headline(RESULTS)}
    assert facts == {
        "of the teacher's accuracy": "99.5%",
        "smaller: 20.0 MB": "4.6x",
        "faster at 32 tokens, one thread": "8.0x",
        "same answer as the teacher": "97.0%",
    }


def test_latency_rows_compare_with_the_first() -> None:
    rows = latency_rows(RESULTS["bench"])
    assert rows["lengths"] == [16, 32]
    assert rows["targets"][1]["times"] == {16: 8.0, 32: 8.0}
    assert (rows["batch"], rows["threads"]) == (1, 1)
    assert latency_rows({}) == {"targets": [], "lengths": [], "notes": []}


def test_only_the_first_shape_is_in_the_table() -> None:
    """Other batch sizes and thread counts stay in results.json: mixed in, they would overwrite the first."""
    bench = copy.deepcopy(RESULTS["bench"])
    bench["cells"] += [{**cell, "batch": 8, "p50": 1e9} for cell in bench["cells"]]
    assert latency_rows(bench)["targets"][0]["p50"] == {16: 8.0, 32: 16.0}


def test_charts_of_parts() -> None:
    found = charts(RESULTS)
    assert "12.00 MB" in found["bytes"]
    assert "200.0 s" in found["time"]
    assert charts({}) == {"metric": "", "loss": "", "latency": "", "latency_narrow": "", "bytes": "", "time": ""}


def without(role: str) -> dict[str, Any]:
    return {**RESULTS, "models": [row for row in RESULTS["models"] if row["role"] != role]}


def with_accuracy(role: str, accuracy: float, **facts: Any) -> dict[str, Any]:
    rows = [model(role, "x", "y", accuracy, 60e6, **facts)]
    return {**RESULTS, "models": [row for row in RESULTS["models"] if row["role"] != role] + rows}


def said(results: dict[str, Any], about: str) -> str:
    return next((sentence for sentence in verdicts(results) if about in sentence), "")


def test_what_distillation_adds_is_said_against_the_same_student_without_it() -> None:
    assert said(RESULTS, "istillation") == (
        "Distillation adds 2.5 points of accuracy: 0.9050 against 0.8800 for the same student, trained as long without "
        "a teacher."
    )


def test_the_pytorch_student_is_what_the_baseline_is_compared_with() -> None:
    """int8's loss is not distillation's: the two that are compared differ in the teacher alone."""
    assert "adds 2.8 points of accuracy: 0.9080 against 0.8800" in said(with_accuracy("student", 0.908), "istillation")


@pytest.mark.parametrize(
    "baseline, words",
    [
        (
            0.93,
            "Distillation did not help here: by accuracy it is 2.5 points below its baseline (0.9050 against 0.9300",
        ),
        (0.905, "Distillation did not help here: by accuracy it is no better than its baseline"),
    ],
)
def test_distillation_that_did_not_help_is_said_plainly(baseline: float, words: str) -> None:
    assert words in said(with_accuracy("baseline", baseline), "istillation")


def test_an_unmeasured_baseline_is_said_to_be() -> None:
    assert "What distillation adds was not measured" in said(without("baseline"), "istillation")


def test_what_int8_costs_is_said_against_the_same_student_in_fp32() -> None:
    fp32 = with_accuracy("student-onnx", 0.9066, latency_ms=latency(4.0, 6.0))
    assert said(fp32, "int8 costs") == (
        "int8 costs 0.2 points of accuracy and makes the student's file 3.0 times smaller "
        "(0.9066 in fp32, 0.9050 in int8)."
    )
    assert said(fp32, "student in fp32") == "The int8 file is 3.0 to 4.0 times as fast as the student in fp32."
    assert "int8 costs no accuracy here" in said(with_accuracy("student-onnx", 0.9), "int8 costs")
    assert said(RESULTS, "int8 costs") == ""


def test_no_gain_is_said_plainly() -> None:
    slow = with_accuracy("student-onnx", 0.91, latency_ms=latency(0.9, 6.0))
    assert said(slow, "student in fp32") == (
        "The int8 file is 0.9 to 3.0 times as fast as the student in fp32; no gain at 16 tokens."
    )
    models = [{**row, "latency_ms": latency(8.0, 8.0)} if row["latency_ms"] else row for row in RESULTS["models"]]
    assert headline({**RESULTS, "models": models})[2] == {
        "value": "1.0x",
        "name": "as fast: no gain at 32 tokens, one thread",
    }


def test_chance_is_two_standard_errors_of_a_difference() -> None:
    error = 1.96 * (2 * 0.91 * 0.09 / 1821) ** 0.5  # added answers move it by less than is shown
    assert f"differences of up to {100 * error:.1f} points can be chance" in said(RESULTS, "chance")
    assert said({**RESULTS, "metric": "macro_f1"}, "chance") == ""  # the formula is a proportion's


def test_all_right_on_few_rows_leaves_room_for_chance() -> None:
    """80 of 80 is no proof: sqrt(p (1 - p) / n) alone would say 0.00 points."""
    results = copy.deepcopy(RESULTS)
    results["data"]["test"] = 80
    results["models"][0]["metrics"]["accuracy"] = 1.0
    share = 82 / 84
    assert f"up to {196 * (2 * share * (1 - share) / 84) ** 0.5:.1f} points can be chance" in said(results, "chance")


def test_the_headline_names_the_shape_that_was_measured() -> None:
    bench = copy.deepcopy(RESULTS["bench"])
    bench["cells"] = [{**cell, "batch": 8, "threads": 2} for cell in bench["cells"]]
    assert headline({**RESULTS, "bench": bench})[2]["name"] == "faster at 32 tokens, batch 8, 2 threads"


def test_real_text_stands_behind_the_lengths() -> None:
    bench = copy.deepcopy(RESULTS["bench"])
    bench["cells"] += [{"target": "teacher.onnx", "batch": 1, "threads": 1, "length": 0, "p50": 5.0}]
    assert latency_rows(bench)["lengths"] == [16, 32, 0]


def test_what_bench_writes_is_shown_whole(tmp_path: Path) -> None:
    """The shapes, percentiles and throughput of a real report of the harness."""
    from distill.bench.results import BenchReport, Shape, summarise
    from distill.bench.targets import Target

    shapes = [Shape(1, 1, 16), Shape(1, 1, 0), Shape(2, 8, 16)]
    cells = [
        summarise(
            name, shape, [[time, 2 * time]] * 10, [[4_000_000, 8_000_000]] * 10, 17.5 if not shape.length else None
        )
        for shape in shapes
        for name, time in (("teacher.onnx", 4_000_000), ("int8.onnx", 1_000_000))
    ]
    targets = [Target("teacher.onnx", "t", "ONNX", 100), Target("int8.onnx", "s", "ONNX", 20)]
    bench = BenchReport(targets, cells, "2026-01-01T00:00:00+00:00", {"cpu": "A CPU", "cores": 2})
    markdown, page = written({**RESULTS, "bench": bench.to_json()}, tmp_path)
    assert "| int8.onnx | 8 | 2 | 16 tokens | 1.50 | 2.00 | 2.00 | 5,333 | 85,333 | 20 |" in markdown
    assert "int8.onnx 1 1 real text 1.50 2.00 2.00 667 11,667 20" in page.text
    assert "| teacher.onnx | 6.00 (1.0x) | 6.00 (1.0x) | not measured | not measured |" in markdown


def test_the_objective_is_told_with_its_settings(tmp_path: Path) -> None:
    objective = [
        {"term": "soft_labels", "loss": "soft_labels", "weight": "1.0", "temperature": "4.0", "layers": []},
        {
            "term": "deep",
            "loss": "hidden_mse",
            "weight": "1 to 0",
            "layers": [[1, 2], [2, 4]],
            "options": {"norm": True},
        },
    ]
    markdown, page = written({**RESULTS, "objective": objective}, tmp_path)
    for text in (markdown, page.text):
        assert "temperature 4.0" in text
        assert "loss hidden_mse; layers 1 from 2, 2 from 4; norm True" in text


def test_machine_and_shapes_of_the_checks_are_told(tmp_path: Path) -> None:
    machine = {"cpu": "A CPU", "flags": ["avx2", "avx512_vnni"], "cores": 2, "memory_bytes": 25.3e9, "os": "Linux 6"}
    steps = [{**RESULTS["verification"][0], "batches": [[1, 6], [3, 31]]}]
    markdown, page = written({**RESULTS, "machine": machine, "verification": steps}, tmp_path)
    for text in (markdown, page.text):
        for fact in ("avx2, avx512_vnni", "25.3 GB", "Linux 6", "1x6, 3x31"):
            assert fact in text


@pytest.mark.parametrize("key", ["curves", "bench", "models", "verification", "stages", "layer_map", "disagreements"])
def test_a_part_that_is_null_is_a_part_that_is_missing(key: str, tmp_path: Path) -> None:
    written({**RESULTS, key: None}, tmp_path)


def test_a_label_that_is_not_known_is_said_to_be(tmp_path: Path) -> None:
    rows = [{**RESULTS["disagreements"][0], "label": None}]
    markdown, page = written({**RESULTS, "disagreements": rows}, tmp_path)
    assert "| not bad | no label |" in markdown
    assert "not bad no label" in page.text


def test_print_is_never_dark(tmp_path: Path) -> None:
    """Dark colours without their background would print light grey on white."""
    write_report(RESULTS, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"@media ([^{]*prefers-color-scheme: dark)", text) == ["screen and (prefers-color-scheme: dark"]
    assert "@media print" in text


def test_tables_in_few_bits_are_told_with_what_they_lose_and_save(tmp_path: Path) -> None:
    table = {"name": "words.weight", "bits": 4, "error": 0.0814, "bytes": 6_592_752, "int8_bytes": 11_842_536}
    results = {**RESULTS, "models": copy.deepcopy(RESULTS["models"]), "embeddings": "int4", "tables": [table]}
    results["models"].insert(3, model("student-onnx", "Student", "ONNX fp32", 0.908, 77e6))
    markdown, page = written(results, tmp_path)
    assert "| words.weight | 4 | 8.1% | 6.6 | 11.8 |" in markdown
    assert "words.weight 4 8.1% 6.6 11.8" in page.text
    for text in (markdown, page.text):
        assert "int8 with int4 embeddings costs" in text
    markdown, page = written(RESULTS, tmp_path)
    assert "Embedding tables" not in markdown + page.text


def test_validation_rows_are_not_called_test_rows(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    results["data"]["measured"] = "validation"
    markdown, page = written(results, tmp_path)
    for text in (" ".join(markdown.split()), page.text):
        assert "validation rows, which also chose the checkpoint and the int8 file: no test data was given" in text
        assert "validation rows, differences" in text
        assert not re.search(r"[1-9,]+ test", text)
    assert "Validation rows, the surest first." in page.text
    assert "Test rows" not in page.text
