import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

from distill.cards import load_student_card
from distill.cli import app
from distill.data.splits import load_splits
from distill.errors import DataError, RecipeError, StudentError
from distill.export.bundle import Contents, write_bundle
from distill.export.dual import part
from distill.export.graph import export_graph
from distill.export.pieces import towers
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.heads.images import encode_image
from distill.pipeline import run_stages
from distill.recipe import Recipe
from distill.shipping import verify_with_data
from distill.student.start import start_student
from distill.tasks import Encoded, find_task, image_text
from distill.teacher import load_checkpoint

TASK = find_task("image-text")


@pytest.fixture(scope="module")
def checkpoint(make_clip):
    """A CLIP of 3 layers, 32 wide, random weights."""
    folder = make_clip(["a red blue one two three"], width=32, layers=3, side=16, positions=24)
    return load_checkpoint(str(folder), TASK)


def a_batch(checkpoint):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    texts = ["a red one", "blue two", "a red one", "a three"]
    rows = {"text": [{"bytes": encode_image(image)} for image in images], "text_pair": texts, "label": [None] * 4}
    encoded = TASK.encode(rows, checkpoint.tokenizer, 24)
    return images, encoded, TASK.collate([encoded[row] for row in range(4)], checkpoint.padding)


def test_a_clip_is_this_task_and_other_models_are_not():
    assert find_task("auto", ["CLIPModel"]) is TASK
    assert find_task("auto", ["BertModel"]).name == "sentence-embedding"


def test_texts_are_padded_and_equal_ones_have_one_label(checkpoint):
    _, _, batch = a_batch(checkpoint)
    end = checkpoint.tokenizer.tokenizer.eos_token_id
    assert batch["input_ids"][1, -2:].tolist() == [end, end]  # CLIP is padded with what ends its texts
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 1, 0]
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert batch["labels"][0] == batch["labels"][2] != batch["labels"][1]


@pytest.mark.parametrize("block", [1024, 2])  # in two blocks as in one
def test_recall_looks_among_different_texts_and_all_images(block, monkeypatch):
    monkeypatch.setattr(image_text, "BLOCK", block)
    texts = np.eye(3, dtype=np.float32)[[0, 1, 0]]
    images = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0]], np.float32)  # the third lies at the other text
    labels = np.array([7, 9, 7])
    encoded = Encoded({}, {"labels": labels}, np.arange(4), given={"text": ["one", "two", "one"]})
    found = TASK.metrics({"text_embeds": texts, "image_embeds": images}, encoded)
    assert found["text_recall_at_1"] == pytest.approx(1 / 3)  # of the first image alone
    assert found["image_recall_at_1"] == pytest.approx(1 / 2)  # of the text `one`; `two` finds the third image
    assert found["image_recall_at_5"] == found["text_recall_at_5"] == found["text_recall_at_10"] == 1.0
    assert found["mean_recall"] == pytest.approx((1 / 3 + 1 / 2 + 4) / 6)
    assert TASK.told({"text_embeds": texts, "image_embeds": images}, encoded)[1] == ("one", pytest.approx(0.8))


def test_a_student_inherits_from_both_encoders(checkpoint):
    teacher = checkpoint.model
    student = start_student(teacher, load_student_card("layers-6"), list, overrides={"layers": 2})
    assert student.layer_map == [(1, 1), (2, 3)]
    assert not student.fresh
    for tower in ("text_model", "vision_model"):
        mine, theirs = (model.get_submodule(f"{tower}.encoder.layers") for model in (student.model, teacher))
        torch.testing.assert_close(mine[1].mlp.fc1.weight, theirs[2].mlp.fc1.weight)
    assert student.parameters == sum(value.numel() for value in student.model.parameters())
    narrow = start_student(teacher, load_student_card("layers-6"), list, overrides={"layers": 2, "hidden_size": 16})
    assert "random start" in narrow.remarks[0]
    with pytest.raises(StudentError, match="two encoders cannot be ranked"):
        start_student(teacher, load_student_card("layers-6"), list, layers="important")


def test_a_bundle_has_a_file_for_texts_and_one_for_images(checkpoint, tmp_path):
    images, _, batch = a_batch(checkpoint)
    metadata = {"distill.format": "1", "distill.task": TASK.name, "distill.max_length": "24", "distill.labels": "[]"}
    model = checkpoint.model
    export_graph(model, TASK.exported(model, []), tmp_path / "whole.onnx", metadata=metadata)
    quantize_dynamic_int8(tmp_path / "whole.onnx", tmp_path / "int8.onnx", target="portable", metadata=metadata)
    cut = {name: tmp_path / "cut" / f"{name}.onnx" for name in ("whole", "int8")}
    for name, path in cut.items():
        part(tmp_path / f"{name}.onnx", *towers(path))
    checkpoint.save(tmp_path / "model", TASK, 24)
    pairs = [(images[0], "a red one"), (images[1], "blue two")]
    write_bundle(
        tmp_path / "bundle",
        Contents(
            name="clip",
            task=TASK.name,
            labels=[],
            max_length=24,
            fp32_onnx=cut["whole"],
            int8_onnx=cut["int8"],
            model_folder=tmp_path / "model",
            golden_texts=pairs,
            metrics={},
            verification=[],
            recipe_toml='name = "clip"\n',
            versions={},
        ),
    )
    names = {path.name for path in (tmp_path / "bundle" / "onnx").iterdir()}
    assert names == {f"{kind}_model{end}.onnx" for kind in ("text", "vision") for end in ("", "_quantized")}
    assert verify_bundle(tmp_path / "bundle").ok
    assert json.loads((tmp_path / "bundle" / "golden.jsonl").read_text("utf-8").splitlines()[0])["text"] == "a red one"
    bundle = Bundle.load(tmp_path / "bundle", file="onnx/model.onnx")
    with torch.no_grad():
        whole = model(**{name: torch.from_numpy(batch[name]) for name in TASK.feeds})
    text, image, pair = bundle.predict(["a red one", images[1], (images[1], "a red one")])
    np.testing.assert_allclose(text.vector, whole.text_embeds[0], atol=1e-5)
    np.testing.assert_allclose(image.vector, whole.image_embeds[1], atol=1e-5)
    assert pair.similarity == pytest.approx(float(text.vector @ image.vector), abs=1e-5)


def read(folder, rows, **changes):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return load_splits(
        path, text="image", text_pair="caption", inputs="image", target="nothing", validation_fraction=0.3, **changes
    )


def test_a_bad_image_or_no_text_names_its_row(digits, captions, tmp_path):
    images, _ = digits
    good = [
        {"image": image.tolist(), "caption": caption} for image, caption in zip(images[:20], captions[:20], strict=True)
    ]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    for row, reason in (
        ({"image": "broken.png", "caption": "a three"}, r"row 21: 'image' holds no image: 12 bytes do not decode"),
        ({"image": images[0].tolist(), "caption": "  "}, r"row 21: 'caption' is empty"),
        ({"image": images[0].tolist(), "caption": None}, r"row 21: 'caption' is missing"),
        ({"image": images[0].tolist()}, r"row 21: 'caption' is missing"),
        ({"image": images[0].tolist(), "caption": 3}, r"row 21: 'caption' is int, not text"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            read(tmp_path, [*good, row])
        assert "\n" not in str(caught.value)
        skipped = read(tmp_path, [*good, row], on_bad_row="skip")
        assert len(skipped.train) + len(skipped.validation) == 20


def test_a_recipe_without_a_column_of_texts_is_refused(tmp_path):
    recipe = Recipe.parse(
        {
            "task": "image-text",
            "output": str(tmp_path / "run"),
            "teacher": {"checkpoint": "none"},
            "data": {"train": str(tmp_path / "none.csv"), "text": "image"},
        }
    )
    with pytest.raises(RecipeError, match=r"`data\.text_pair` must name a column for image-text"):
        run_stages(recipe, until="label")


@pytest.fixture(scope="module")
def finished(digits, captions, make_clip, run_example, rows_file):
    """scikit-learn's digits with what can be seen on them, from a random CLIP to the bundle."""
    images, _ = digits
    data = rows_file({"image": image.tolist(), "caption": text} for image, text in zip(images, captions, strict=True))
    return data, *run_example(
        "image-text",
        f'data.train="{data}"',
        "data.validation_fraction=0.2",
        "data.max_length=12",
        f'teacher.start="{make_clip(captions)}"',
        'teacher.checkpoint=""',
        "teacher.finetune={epochs=20, learning_rate=2e-3, batch_size=64}",
        "training={epochs=10, learning_rate=2e-3, batch_size=64, baseline=false}",
    )


@pytest.mark.slow
def test_a_clip_goes_the_whole_way(finished, outputs_of):
    data, _, result = finished
    assert outputs_of(result.bundle / "onnx/text_model_quantized.onnx") == ["text_embeds"]
    assert outputs_of(result.bundle / "onnx/vision_model_quantized.onnx") == ["image_embeds"]
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    found = {role: row["metrics"] for role, row in models.items()}
    assert found["teacher"]["text_recall_at_1"] > 0.7  # by chance 0.03
    assert found["student"]["text_recall_at_1"] > 0.6
    assert found["student-int8"]["mean_recall"] > 0.8  # by chance 0.09
    assert models["student-onnx"]["metrics"] == models["student"]["metrics"]
    assert models["teacher-onnx"]["metrics"] == models["teacher"]["metrics"]
    assert models["student-int8"]["latency_ms"]["12"]["p50"] > 0
    assert verify_bundle(result.bundle).ok
    verdict = verify_with_data(result.bundle, str(data), verify_bundle(result.bundle))
    assert verdict.facts["mean_recall"] > 0.7  # among all 1,797 images
    assert "image_recall_at_5" in (result.folder / "report.md").read_text("utf-8")
    assert "CLIPVisionModelWithProjection" in (result.bundle / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_transformers_reads_the_student_and_says_what_the_files_say(finished, digits, captions, tmp_path):
    images, texts = digits[0][:6], sorted(set(captions))[:6]
    _, _, result = finished
    student = str(result.folder / "student")
    model = CLIPModel.from_pretrained(student)
    words, pictures = AutoTokenizer.from_pretrained(student), AutoImageProcessor.from_pretrained(student)
    shown = [Image.fromarray(image).convert("RGB") for image in images]
    with torch.no_grad():
        said = model(**words(texts, padding=True, return_tensors="pt"), **pictures(shown, return_tensors="pt"))
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    full = ["--file", "onnx/model.onnx", "--json"]
    second = [part for text in texts for part in ("--pair", text)]
    found = CliRunner().invoke(app, ["predict", str(result.bundle), *paths, *second, *full])
    assert found.exit_code == 0, found.output
    answers = [json.loads(line)["similarity"] for line in found.output.splitlines()]
    np.testing.assert_allclose(answers, (said.image_embeds * said.text_embeds).sum(-1), atol=1e-5)
    found = CliRunner().invoke(app, ["predict", str(result.bundle), *paths, *texts, *full])
    vectors = np.array([json.loads(line)["vector"] for line in found.output.splitlines()])
    np.testing.assert_allclose(vectors, torch.cat([said.image_embeds, said.text_embeds]), atol=1e-5)
    logits = float(model.logit_scale.detach().exp()) * vectors[: len(images)] @ vectors[len(images) :].T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ask = pipeline("zero-shot-image-classification", student)
    for answers, chances in zip(ask(shown, candidate_labels=texts, hypothesis_template="{}"), expected, strict=True):
        found = {answer["label"]: answer["score"] for answer in answers}
        np.testing.assert_allclose([found[text] for text in texts], chances, atol=1e-4)


@pytest.mark.slow
def test_an_image_that_does_not_decode_is_one_line(finished, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    bundle = Bundle.load(finished[2].bundle)
    with pytest.raises(DataError, match=r"broken\.png: 12 bytes do not decode as an image"):
        bundle.predict(["a bold wide handwritten three", str(tmp_path / "broken.png")])


def test_an_image_is_on_one_side_with_all_its_captions(tmp_path):
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (40, 4, 4)).tolist()
    lines = [{"image": picture, "caption": f"caption {n} of it"} for picture in pictures for n in range(3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    columns = {"text": "image", "text_pair": "caption", "inputs": "image", "target": "nothing"}
    splits = load_splits(path, **columns)
    trained, measured = ({row["bytes"] for row in side["text"]} for side in (splits.train, splits.validation))
    assert trained
    assert measured
    assert not trained & measured
    assert len(splits.train) + len(splits.validation) == len(lines)
    free = tmp_path / "free.jsonl"
    free.write_text("\n".join(json.dumps({"image": [[n] * 4] * 4, "caption": f"{m}"}) for n in range(2) for m in "ab"))
    assert len(load_splits(path, unlabelled=[free], **columns).unlabelled) == 4
