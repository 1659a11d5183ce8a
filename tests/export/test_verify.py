from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from distill.errors import BundleError, VerificationError
from distill.export.bundle import golden_vectors
from distill.export.runtime import FULL, QUANTIZED, Bundle
from distill.export.verify import verify_bundle
from distill.files import sha256_file

FILES = (
    *("README.md", "config.json", "golden.jsonl", FULL, QUANTIZED),
    *("recipe.toml", "tokenizer.json", "tokenizer_config.json"),
)


def seal(folder: Path) -> None:
    """Writes the checksums anew, as somebody who tampers would: what lies behind them has to notice."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = sha256_file(folder / name)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def failed(folder: Path) -> dict[str, str]:
    """What failed, by check."""
    verdict = verify_bundle(folder)
    wrong = {name: detail for name, (holds, detail) in verdict.checks.items() if not holds}
    assert verdict.ok is not bool(wrong)
    return wrong


def test_what_was_just_written_holds(tiny_bundle: Path) -> None:
    verdict = verify_bundle(tiny_bundle)
    assert verdict.ok
    assert verdict.checks["files"] == (True, "8 files as shipped")
    assert verdict.checks["model_quantized.onnx loads"] == (True, "3 labels, at most 48 tokens")
    assert verdict.facts["golden"] == 7
    assert verdict.facts["golden_max_difference"] == pytest.approx(0.0, abs=1e-6)  # the same machine
    assert list(verdict.checks) == [
        "files",
        "single files",
        "model_quantized.onnx loads",
        "model.onnx loads",
        "golden vectors",
    ]
    assert [row[1] for row in verdict.rows()] == ["ok"] * 5


def test_the_verdict_as_json(tiny_bundle: Path) -> None:
    found = json.loads(json.dumps(verify_bundle(tiny_bundle).to_json(), allow_nan=False))
    assert found["ok"] is True
    assert found["checks"]["golden vectors"]["ok"] is True
    assert found["facts"]["golden_flips"] == 0
    assert {"cpu", "flags", "os"} <= set(found["machine"])
    assert set(found["versions"]) == {"distill", "onnxruntime", "tokenizers", "numpy"}


def test_it_reads_the_same_from_a_copy(tiny_bundle: Path, tmp_path: Path) -> None:
    """Nothing in the folder may depend on where it was made."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "elsewhere" / "other name")
    assert verify_bundle(copy).checks == verify_bundle(tiny_bundle).checks


@pytest.mark.parametrize("name", FILES)
def test_each_missing_file_is_named(name: str, own_bundle: Path) -> None:
    (own_bundle / name).unlink()
    assert failed(own_bundle)["files"] == f"{name} is missing"


@pytest.mark.parametrize("name", FILES)
def test_each_changed_file_is_named(name: str, own_bundle: Path) -> None:
    """One bit, anywhere."""
    path = own_bundle / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert failed(own_bundle)["files"] == f"{name} has changed since it was shipped"


@pytest.mark.parametrize("name", FILES)
def test_each_link_is_named(name: str, own_bundle: Path) -> None:
    """Even to the same bytes: what it leads to can change later."""
    inside = own_bundle / "copy"
    (own_bundle / name).rename(inside)
    (own_bundle / name).symlink_to(inside)
    assert failed(own_bundle)["files"] == f"{name} is a link, copy did not ship with it"


def test_several_problems_are_told_at_once(own_bundle: Path) -> None:
    for name in FILES[:3]:
        (own_bundle / name).unlink()
    for number in range(3):
        (own_bundle / f"extra {number}").touch()
    said = failed(own_bundle)["files"]
    assert said.startswith(
        "README.md is missing, config.json is missing, golden.jsonl is missing, extra 0 did not ship"
    )
    assert said.endswith("and 2 more")


@pytest.mark.parametrize("name", ["extra.bin", "onnx/other.onnx", ".hidden"])
def test_a_file_too_many(name: str, own_bundle: Path) -> None:
    (own_bundle / name).write_text("x")
    assert failed(own_bundle) == {"files": f"{name} did not ship with it"}


@pytest.mark.parametrize("name", [".gitattributes", ".git/config", ".cache/huggingface/download/config.json.lock"])
def test_what_the_hub_puts_beside_it_is_let_be(name: str, own_bundle: Path) -> None:
    (own_bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (own_bundle / name).write_text("*.onnx filter=lfs")
    assert failed(own_bundle) == {}


def test_a_snapshot_in_the_hubs_cache(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its files are links to those of the repository, and to no others."""
    blobs, snapshot = tmp_path / "models--me--it/blobs", tmp_path / "models--me--it/snapshots/0123abc"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in tiny_bundle.rglob("*") if path.is_file()):
        shutil.copyfile(file, blobs / str(number))
        link = snapshot / file.relative_to(tiny_bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert failed(snapshot) == {}
    (snapshot / "config.json").unlink()
    (tmp_path / "elsewhere.json").write_text((tiny_bundle / "config.json").read_text())
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere.json")
    assert "config.json lies outside the bundle" in failed(snapshot)["files"]


def test_a_link_too_many(own_bundle: Path, tmp_path: Path) -> None:
    (own_bundle / "way-out").symlink_to(tmp_path)
    assert failed(own_bundle) == {"files": "way-out did not ship with it"}


def test_a_manifest_that_names_a_path_outside(own_bundle: Path) -> None:
    """Or `distill verify` would tell the checksum of any file of the machine."""
    manifest = json.loads((own_bundle / "MANIFEST.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"sha256": "0" * 64, "bytes": 1}
    (own_bundle / "MANIFEST.json").write_text(json.dumps(manifest))
    assert failed(own_bundle) == {"files": "../../etc/passwd lies outside the bundle"}


# -- what checksums cannot tell, since whoever changes a file can change them too ------------------------------------


def test_a_changed_weight_is_noticed(own_bundle: Path) -> None:
    """Of the last layer's bias, written back with fresh checksums: only the golden answers tell."""
    model = onnx.load(own_bundle / QUANTIZED)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3])
    values = numpy_helper.to_array(bias) + np.array([-1.5, 1.5, 0.0], np.float32)
    bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), bias.name))
    onnx.save(model, own_bundle / QUANTIZED)
    seal(own_bundle)
    wrong = failed(own_bundle)
    assert list(wrong) == ["golden vectors"]
    assert "golden probabilities differ by up to" in wrong["golden vectors"]


def test_a_small_change_of_every_weight_is_let_pass_up_to_the_tolerance(own_bundle: Path) -> None:
    """Another CPU's rounding is no tampering: the tolerance decides, and the fact is told either way."""
    lines = [json.loads(line) for line in (own_bundle / "golden.jsonl").read_text().splitlines()]
    for line in lines:
        first, *rest = line["probabilities"]
        step = 0.01 if first < 0.5 else -0.01
        line["probabilities"] = [first + step, *rest]
    (own_bundle / "golden.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seal(own_bundle)
    verdict = verify_bundle(own_bundle)
    assert verdict.ok
    assert verdict.facts["golden_max_difference"] == pytest.approx(0.01, abs=1e-3)
    assert not verify_bundle(own_bundle, tolerance=0.005).ok


def move(folder: Path, steps: list[float]) -> None:
    """Shifts the first two probabilities of the golden answers, as if they had come from another machine."""
    lines = [json.loads(line) for line in (folder / "golden.jsonl").read_text().splitlines()]
    for line, step in zip(lines, [*steps, *[0.0] * len(lines)], strict=False):
        line["probabilities"][:2] = [line["probabilities"][0] + step, line["probabilities"][1] - step]
    (folder / "golden.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seal(folder)


def test_one_text_may_move_farther_than_all_of_them(own_bundle: Path) -> None:
    """Arm rounds one text in hundreds by 0.03 and the others hardly at all; another weight moves every text."""
    move(own_bundle, [0.045])
    assert verify_bundle(own_bundle).ok
    move(own_bundle, [0.0, *[0.03] * 6])
    assert "on average (allowed 0.05 and 0.02)" in failed(own_bundle)["golden vectors"]


def test_a_tie_that_another_cpu_decides_otherwise_is_no_failure(own_bundle: Path) -> None:
    """Or a sound bundle would be refused on a phone for a text that was a coin's throw here."""
    lines = [json.loads(line) for line in (own_bundle / "golden.jsonl").read_text().splitlines()]
    first, second, _ = lines[0]["probabilities"]
    graph = onnx.load(own_bundle / QUANTIZED)
    bias = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) == [3])
    tie = np.log(second / first) / 2
    shift = np.array([tie, -tie, -9.0])  # makes the first two alike, and the third no rival
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) + shift).astype(np.float32), bias.name))
    onnx.save(graph, own_bundle / QUANTIZED)
    bundle = Bundle.load(own_bundle)
    lines = golden_vectors(bundle, [line["text"] for line in lines if "text_pair" not in line])
    high, low = max(lines[0]["probabilities"][:2]), min(lines[0]["probabilities"][:2])
    order = [low - 0.01, high + 0.01] if lines[0]["probabilities"][0] == high else [high + 0.01, low - 0.01]
    lines[0]["probabilities"][:2] = order
    (own_bundle / "golden.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seal(own_bundle)
    verdict = verify_bundle(own_bundle)
    assert verdict.ok
    assert verdict.facts["golden_flips"] == 1
    assert "1 labels too close to call flip" in verdict.checks["golden vectors"][1]


def test_another_tokenizer_is_noticed(own_bundle: Path) -> None:
    path = own_bundle / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["please"], vocab["hello"] = vocab["hello"], vocab["please"]
    path.write_text(json.dumps(content))
    seal(own_bundle)
    assert failed(own_bundle) == {"golden vectors": "golden.jsonl:1 is now split into other tokens"}


def test_ids_that_the_graph_has_not_are_a_verdict(own_bundle: Path) -> None:
    path = own_bundle / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["vocab"] = {piece: number + 5000 for piece, number in words["model"]["vocab"].items()}
    path.write_text(json.dumps(words))
    seal(own_bundle)
    assert failed(own_bundle) == {"golden vectors": "golden.jsonl:1 is now split into other tokens"}
    golden = [json.loads(line) for line in (own_bundle / "golden.jsonl").read_text().splitlines()]
    bundle = Bundle.load(own_bundle)
    read = [row["input_ids"] for row in bundle.encode([bundle.head.asked(line) for line in golden])]
    lines = [json.dumps({**line, "ids": ids}) for line, ids in zip(golden, read, strict=True)]
    (own_bundle / "golden.jsonl").write_text("\n".join(lines))
    seal(own_bundle)
    assert "out of data bounds" in failed(own_bundle)["golden vectors"]


def test_a_graph_that_answers_nan_is_noticed(own_bundle: Path) -> None:
    """NaN compares false with everything, so a careless comparison lets it pass."""
    model = onnx.load(own_bundle / QUANTIZED)
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3])
    bias.CopyFrom(numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save(model, own_bundle / QUANTIZED)
    seal(own_bundle)
    verdict = verify_bundle(own_bundle)
    assert not verdict.ok
    assert "nan" in verdict.checks["golden vectors"][1]
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", [QUANTIZED, FULL])
def test_either_graph_may_not_point_outside(name: str, own_bundle: Path) -> None:
    model = onnx.load(own_bundle / name)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 64)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    (own_bundle / name).write_bytes(model.SerializeToString())
    seal(own_bundle)
    wrong = failed(own_bundle)
    assert "it keeps weights outside itself" in wrong["single files"]
    assert f"{Path(name).name} loads" in wrong


def test_labels_that_changed_places(own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "MANIFEST.json").read_text())
    manifest["labels"] = ["password", "exchange", "arrival"]
    (own_bundle / "MANIFEST.json").write_text(json.dumps(manifest))
    wrong = failed(own_bundle)
    assert set(wrong) == {"model_quantized.onnx loads", "model.onnx loads"}
    assert "are not the manifest's ['password'" in wrong["model.onnx loads"]


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"text": "a"}', '{"text": "a", "ids": [2, 3], "probabilities": [1]}', "[]"],
    ids=["empty", "cut", "part", "one of three", "list"],
)
def test_golden_lines_that_prove_nothing(text: str, own_bundle: Path) -> None:
    (own_bundle / "golden.jsonl").write_text(text)
    seal(own_bundle)
    assert "golden.jsonl" in failed(own_bundle)["golden vectors"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "7", "null", "\x00"])
def test_a_broken_manifest(text: str, own_bundle: Path) -> None:
    (own_bundle / "MANIFEST.json").write_text(text)
    with pytest.raises(BundleError, match=r"MANIFEST\.json cannot be read\. Copy the whole bundle again"):
        verify_bundle(own_bundle)


@pytest.mark.parametrize("part", ['"files": {}', '"files": {"a": 3}, "labels": []', '"files": [], "labels": []'])
def test_a_manifest_without_its_parts(part: str, own_bundle: Path) -> None:
    (own_bundle / "MANIFEST.json").write_text(f'{{"format": 1, {part}}}')
    with pytest.raises(BundleError, match=r"MANIFEST\.json names no files or labels"):
        verify_bundle(own_bundle)


def test_a_manifest_of_another_format(own_bundle: Path) -> None:
    (own_bundle / "MANIFEST.json").write_text('{"format": 2}')
    with pytest.raises(BundleError, match=r"has format 2, this version of distill reads 1\. Upgrade distill"):
        verify_bundle(own_bundle)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"there is no such folder\. Name the folder of a bundle"):
        verify_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match=r"MANIFEST\.json is missing\. Copy the whole bundle again"):
        verify_bundle(tmp_path)


def test_a_failed_verdict_as_one_line(own_bundle: Path) -> None:
    (own_bundle / "README.md").unlink()
    error: Any = verify_bundle(own_bundle).error()
    assert isinstance(error, VerificationError)
    assert str(error) == f"{own_bundle}: files: README.md is missing. Copy or export the bundle again."
