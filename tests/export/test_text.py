"""The text model: the same tokens, the same answers, or no file."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import BundleError, ExportError, OutputError, VerificationError
from distill.export.runtime import Bundle
from distill.export.strings import SCRIPTS, odd_strings
from distill.export.text import TEXT, TextModel, build_token_model, export_text, other_ids
from distill.export.verify import verify_bundle

pytest.importorskip("onnxruntime_extensions", reason='needs pip install "distill[text]"')


@pytest.fixture
def real_bundle(minilm_folder: Path, own_bundle: Path) -> Bundle:
    """With a vocabulary of 30,522 pieces, so that most of a text is known."""
    shutil.copyfile(minilm_folder / "tokenizer.json", own_bundle / "tokenizer.json")
    return Bundle.load(own_bundle)


@pytest.fixture
def change(own_bundle: Path) -> Callable[[Callable[[Any], None]], Bundle]:
    """The bundle with another tokenizer."""

    def make(edit: Callable[[Any], None]) -> Bundle:
        tokenizer = Tokenizer.from_file(str(own_bundle / "tokenizer.json"))
        edit(tokenizer)
        tokenizer.save(str(own_bundle / "tokenizer.json"))
        return Bundle.load(own_bundle)

    return make


@pytest.mark.slow
def test_the_tokens_of_every_script_are_the_bundles(real_bundle: Bundle) -> None:
    texts = odd_strings(3000, sorted(real_bundle.tokenizer.get_vocab()))
    assert other_ids(real_bundle, build_token_model(real_bundle), texts) == []
    known = {identity for row in real_bundle.encode(texts) for identity in row["input_ids"]}
    assert len(known) > 3000  # or little is proved


@pytest.mark.slow
def test_every_character_alone_and_inside_a_word(real_bundle: Bundle) -> None:
    letters = [chr(code) for low, high in SCRIPTS.values() for code in range(low, high + 1, 7)]
    texts = [f"a{letter}b {letter} {letter}{letter}" for letter in letters]
    assert len(texts) > 10_000
    joined = [" ".join(texts[begin : begin + 8]) for begin in range(0, len(texts), 8)]
    assert other_ids(real_bundle, build_token_model(real_bundle), joined) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lowercase": False}, "Ünder ÉCOLE"),
        ({"lowercase": True, "strip_accents": False}, "Ünder ÉCOLE"),
        ({"handle_chinese_chars": False}, "日本 a日b"),
    ],
)
def test_the_normalizers_settings_are_followed(
    settings: dict[str, bool], text: str, change: Callable[[Callable[[Any], None]], Bundle]
) -> None:
    def edit(tokenizer: Any) -> None:
        tokenizer.normalizer = normalizers.BertNormalizer(**settings)

    bundle = change(edit)
    assert other_ids(bundle, build_token_model(bundle), [text, *odd_strings(300)]) == []


def test_texts_go_in_and_labels_come_out(own_bundle: Path) -> None:
    done = CliRunner().invoke(app, ["export-text", str(own_bundle)])
    assert done.exit_code == 0, done.output
    asked, ours = TextModel(own_bundle / TEXT), Bundle.load(own_bundle)
    texts = ["where is my card", "", "what the euro rate is"]
    assert list(asked.predict(texts)["labels"]) == [answer.label for answer in ours.predict(texts)]
    for text in texts:
        wanted = list(ours(text).probabilities.values())
        np.testing.assert_allclose(asked.predict([text])["probabilities"][0], wanted, atol=1e-6)
    verdict = verify_bundle(own_bundle)
    assert verdict.ok  # the manifest knows the new file
    with (own_bundle / TEXT).open("ab") as file:
        file.write(b"x")
    assert "model_text.onnx has changed" in verify_bundle(own_bundle).checks["files"][1]


def test_a_file_that_cannot_be_written_leaves_the_bundle_as_it_was(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="full"):
        export_text(own_bundle, strings=10)
    monkeypatch.undo()
    assert verify_bundle(own_bundle).ok
    assert not list(own_bundle.parent.glob("*.writing"))


def test_doing_it_again_gives_the_same_file(own_bundle: Path) -> None:
    first = export_text(own_bundle, strings=100).read_bytes()
    assert export_text(own_bundle, strings=100).read_bytes() == first
    assert verify_bundle(own_bundle).ok


def test_texts_that_differ_are_named(own_bundle: Path) -> None:
    """Broken on purpose: words of more than three letters are unknown to this graph."""
    bundle = Bundle.load(own_bundle)
    model = build_token_model(bundle)
    for node in model.graph.node:
        if node.op_type == "WordpieceTokenizer":
            next(a for a in node.attribute if a.name == "max_input_chars_per_word").i = 3
    assert other_ids(bundle, model, ["where", "is", "card"]) == ["where", "card"]


def test_a_difference_keeps_the_file_from_shipping(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.export.text_graph.MARK_ID", 7)  # a real piece is now taken for the end of a row
    with pytest.raises(VerificationError, match=r"in the graph \d+ of \d+ texts get other tokens, such as '"):
        export_text(own_bundle, strings=200)
    assert not (own_bundle / TEXT).exists()
    assert verify_bundle(own_bundle).ok


def byte_level(tokenizer: Any) -> None:
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel()


def with_a_word(tokenizer: Any) -> None:
    tokenizer.add_tokens(["distillation"])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (byte_level, "normalizer is NFC, not BertNormalizer; pre_tokenizer is ByteLevel"),
        (with_a_word, "token 'distillation' is no plain special token"),
    ],
)
def test_other_tokenizers_are_refused(
    edit: Callable[[Any], None],
    said: str,
    change: Callable[[Callable[[Any], None]], Bundle],
) -> None:
    bundle = change(edit)
    with pytest.raises(ExportError, match=said):
        export_text(bundle.folder, strings=10)
    assert not (bundle.folder / TEXT).exists()


@pytest.mark.parametrize(("field", "value"), [("task", "token-classification"), ("pairs", True)])
def test_other_tasks_are_refused(field: str, value: Any, own_bundle: Path) -> None:
    manifest = json.loads((own_bundle / "MANIFEST.json").read_text())
    (own_bundle / "MANIFEST.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(BundleError, match="text models are made for text-classification of single texts"):
        export_text(own_bundle, strings=10)
