from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import BundleError
from distill.export.bundle import FORMAT, Contents, write_bundle
from distill.export.modelcard import model_card
from distill.export.runtime import FULL, QUANTIZED, Bundle
from distill.export.verify import verify_bundle
from distill.files import json_lines, sha256_file

LABELS = ["<script>alert(1)</script>", "a `tick` ``` and | bar", 'line\nbreak "quoted" \\ é 日本 [x](javascript:y)']


@pytest.fixture
def contents(shared_bundle: Any) -> Contents:
    """What `shared_bundle` was made of, for a test to write again with something changed."""
    folder = shared_bundle.folder
    work = folder.with_name(folder.name + ".work")
    return Contents(
        name="again",
        task="text-classification",
        labels=["arrival", "exchange", "password"],
        max_length=48,
        fp32_onnx=work / "model.onnx",
        int8_onnx=work / "int8.onnx",
        model_folder=work / "model",
        golden_texts=shared_bundle.texts[:3],
        metrics={},
        verification=[{"step": "export", "max_abs_diff": 1e-6}],
        recipe_toml='name = "again"\n',
        versions={"torch": "2"},
    )


@pytest.fixture(scope="module")
def odd_bundle(make_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose labels and name try to break out of every file they stand in."""
    folder = tmp_path_factory.mktemp("odd") / "odd-bundle"
    return make_bundle(folder, name="# <b>big</b>\n---\n`x`", labels=LABELS).folder


def test_it_holds_what_clients_look_for(tiny_bundle: Path) -> None:
    """transformers.js, the hub and optimum find files by these names."""
    found = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert found == {
        "MANIFEST.json",
        "README.md",
        "config.json",
        "golden.jsonl",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
        "recipe.toml",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_manifest_lists_every_other_file(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "MANIFEST.json").read_text())
    files = {path.relative_to(tiny_bundle).as_posix(): path for path in tiny_bundle.rglob("*") if path.is_file()}
    del files["MANIFEST.json"]
    assert manifest["files"] == {
        name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for name, path in files.items()
    }
    assert manifest["format"] == FORMAT
    assert (manifest["task"], manifest["max_length"]) == ("text-classification", 48)
    assert manifest["labels"] == ["arrival", "exchange", "password"]
    assert manifest["onnx_bytes"] == {"fp32": files[FULL].stat().st_size, "int8": files[QUANTIZED].stat().st_size}


def test_golden_lines_are_what_the_shipped_file_says(tiny_bundle: Path, shared_bundle: Any) -> None:
    lines = [json.loads(line) for line in (tiny_bundle / "golden.jsonl").read_text().splitlines()]
    bundle = Bundle.load(tiny_bundle)
    assert [line["text"] for line in lines] == [*shared_bundle.texts[::14], shared_bundle.texts[0]]
    assert lines[-1]["text_pair"] == shared_bundle.texts[1]
    for line in lines:
        text = (line["text"], line["text_pair"]) if "text_pair" in line else line["text"]
        assert line["ids"] == bundle.encode([text])[0]["input_ids"]
        np.testing.assert_allclose(
            line["probabilities"], list(bundle.predict([text])[0].probabilities.values()), atol=1e-6
        )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_folder_that_lacks_a_file(name: str, contents: Contents, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in contents.model_folder.iterdir():
        if path.name != name:
            (model / path.name).write_bytes(path.read_bytes())
    with pytest.raises(BundleError, match=rf"model: {name} is missing\. Train the student again"):
        write_bundle(tmp_path / "bundle", replace(contents, model_folder=model))
    assert not (tmp_path / "bundle").exists()


def test_labels_that_are_not_the_graphs(contents: Contents, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the graph's labels \['arrival', .* are not the model's \['password'"):
        write_bundle(tmp_path / "bundle", replace(contents, labels=["password", "arrival", "exchange"]))


def test_a_write_that_fails_leaves_the_old_bundle(contents: Contents, tmp_path: Path) -> None:
    """Whatever the step that fails: before, between or after the files are copied."""
    folder = tmp_path / "bundle"
    write_bundle(folder, contents)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x00")
    for change in ({"int8_onnx": broken}, {"fp32_onnx": tmp_path / "none.onnx"}, {"metrics": {"teacher": {}}}):
        with pytest.raises((BundleError, OSError, KeyError), match=r"no ONNX file|none\.onnx|metrics"):
            write_bundle(folder, replace(contents, **change))
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert verify_bundle(folder).ok


def test_writing_again_replaces_all_of_it(contents: Contents, tmp_path: Path) -> None:
    """A file of the old bundle must not survive in the new one."""
    folder = tmp_path / "bundle"
    write_bundle(folder, contents)
    (folder / "left-over.txt").write_text("old")
    write_bundle(folder, replace(contents, name="new"))
    assert not (folder / "left-over.txt").exists()
    assert json.loads((folder / "MANIFEST.json").read_text())["name"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_rest_of_the_tokenizer_travels_too(contents: Contents, tmp_path: Path) -> None:
    """Old clients read vocab.txt."""
    model = tmp_path / "model"
    model.mkdir()
    for path in contents.model_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "vocab.txt").write_text("[PAD]\n")
    write_bundle(tmp_path / "bundle", replace(contents, model_folder=model))
    assert (tmp_path / "bundle" / "vocab.txt").read_text() == "[PAD]\n"
    assert not (tmp_path / "bundle" / "model.safetensors").exists()


# -- labels and names that a file could trip over ---------------------------------------------------------------------


def test_odd_labels_survive_the_round_trip(odd_bundle: Path) -> None:
    bundle = Bundle.load(odd_bundle)
    assert bundle.labels == LABELS
    assert list(bundle("where is my card").probabilities) == LABELS
    assert json.loads(bundle.model.metadata["distill.labels"]) == LABELS
    assert json.loads((odd_bundle / "MANIFEST.json").read_text())["labels"] == LABELS
    assert verify_bundle(odd_bundle).ok


def test_odd_labels_are_escaped_in_the_readme(odd_bundle: Path) -> None:
    card = (odd_bundle / "README.md").read_text()
    assert "<script" not in card
    assert "<b>" not in card
    assert "](javascript" not in card.split("```json")[0]
    fences = [line for line in card.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0
    assert card.count("\n---\n") == 1  # the end of the front matter, and no other
    headings = [line for line in card.splitlines() if line.startswith("# ")]
    assert headings == ["# &#35; &#60;b&#62;big&#60;/b&#62; --- &#96;x&#96;"]
    assert html.unescape(headings[0]) == "# # <b>big</b> --- `x`"


def test_the_readmes_classes_parse_to_the_labels(odd_bundle: Path) -> None:
    """What a developer copies out of the README must be the labels."""
    block = re.search(r"```json\n(.*?)\n```", (odd_bundle / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert json.loads(block[1]) == LABELS


def manifest_of(labels: list[str], metrics: dict[str, Any]) -> dict[str, Any]:
    sizes = {"fp32": 8_000_000, "int8": 2_000_000}
    task = "text-classification"
    return {
        "name": "n",
        "task": task,
        "labels": labels,
        "max_length": 128,
        "onnx_bytes": sizes,
        "metrics": metrics,
    }


def test_the_card_shows_what_was_measured() -> None:
    metrics = {
        "teacher": {
            "metrics": {"accuracy": 0.9123, "macro_f1": 0.9},
            "bytes": 90e6,
            "retention": 1.0,
            "agreement": 1.0,
        },
        "student-int8": {"metrics": {"accuracy": 0.9, "macro_f1": 0.8}, "bytes": 2e6, "retention": 0.986},
    }
    card = model_card(manifest_of(["a", "b"], metrics), ["input_ids", "attention_mask"], ["logits", "probabilities"])
    assert "| model | accuracy | macro_f1 | of the teacher's | same answer as the teacher | MB |" in card
    assert "| Teacher, PyTorch fp32 | 0.9123 | 0.9000 | 100.0% | 100.0% | 90.0 |" in card
    assert "| **Student, ONNX int8 (ships)** | 0.9000 | 0.8000 | 98.6% | not measured | 2.0 |" in card
    assert "Feed `input_ids`, `attention_mask`\nas int64" in card
    assert card.startswith("---\npipeline_tag: text-classification\n")


def test_a_card_without_metrics_says_so() -> None:
    card = model_card(manifest_of([f"label {number}" for number in range(200)], {}), ["input_ids"], ["logits"])
    assert "Not measured." in card
    assert "200 labels: label 0, label 1" in card
    assert "label 12, " not in card.split("```json")[0]  # the list is cut, the JSON is not


def test_the_python_lines_of_the_readme_run(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (tiny_bundle / "README.md").read_text(), re.DOTALL)
    assert block is not None
    exec(block[1].replace("PATH/TO/THIS/FOLDER", str(tiny_bundle)), {})
    assert capsys.readouterr().out.strip() in ("arrival", "exchange", "password")


def test_a_reduced_build_finds_its_file_and_its_operators(contents: Contents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", replace(contents, ort=True))
    onnx = tmp_path / "bundle" / "onnx"
    assert (onnx / "model_quantized.ort").stat().st_size > 0
    assert "MatMul" in (onnx / "required_operators.config").read_text()
    assert "onnx/model_quantized.ort" in json.loads((tmp_path / "bundle" / "MANIFEST.json").read_text())["files"]
    assert verify_bundle(tmp_path / "bundle").ok


def test_golden_texts_hold_any_sign_that_a_text_may_hold(contents: Contents, tmp_path: Path) -> None:
    """Line ends of other scripts than ours are no line ends of the file, and half a surrogate pair is U+FFFD."""
    texts = ["a line\u2028and another", "next\x85line", "a paragraph\u2029ends", "half a pair \ud83d"]
    write_bundle(tmp_path / "bundle", replace(contents, golden_texts=texts))
    verdict = verify_bundle(tmp_path / "bundle")
    assert verdict.ok, str(verdict)
    kept = [line["text"] for line in json_lines(tmp_path / "bundle/golden.jsonl")]
    assert kept == [*texts[:3], "half a pair \ufffd"]


def test_what_stands_before_each_text_cannot_break_out_of_the_card() -> None:
    facts = {**manifest_of(["no", "yes"], {}), "prefix": '<s2s> `x` "q": '}
    card = model_card(facts, ["input_ids"], ["logits"])
    assert 'each text with "&#60;s2s&#62; &#96;x&#96; &#92;&#34;q&#92;&#34;: " put before it' in card
