import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from distill.candidates import fastest, machine_target
from distill.cards import load_student_card
from distill.data.splits import load_splits
from distill.errors import DataError, RecipeError, StudentError, TeacherError
from distill.export.calibrate import observe
from distill.export.graph import export_forms
from distill.export.onnx_model import OnnxModel
from distill.export.passes import DEFAULT, FUSED
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.features import TappedModel
from distill.heads.images import encode_image
from distill.shipping import verify_with_data
from distill.student.build import build_student
from distill.tasks import find_task
from distill.teacher import load_checkpoint

TASK = find_task("image-classification")


@pytest.fixture
def pictures(digits, tmp_path):
    """Twenty digits as PNG files, and their numbers."""
    images, labels = digits
    for number, image in enumerate(images[:20]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    return tmp_path, images[:20], labels[:20]


def read(path, **changes):
    return load_splits(path, text="image", inputs="image", validation_fraction=0.3, **changes)


def as_csv(folder, lines):
    path = folder / "rows.csv"
    path.write_text("\n".join(["image,label", *lines]) + "\n", encoding="utf-8")
    return path


def every_row(splits):
    parts = [splits.train, splits.validation]
    return {row["text"]["path"]: row for part in parts for row in part}


def test_an_architecture_for_image_classification_is_this_task():
    assert find_task("auto", ["ViTForImageClassification"]).name == "image-classification"


def test_images_come_from_paths_bytes_numbers_and_folders(pictures, tmp_path):
    folder, images, labels = pictures
    by_path = read(as_csv(folder, [f"{number}.png,{label}" for number, label in enumerate(labels)]))
    rows = every_row(by_path)
    assert set(rows) == {f"{number}.png" for number in range(20)}
    assert rows["3.png"]["label"] == labels[3]
    assert rows["3.png"]["text"]["bytes"] == (folder / "3.png").read_bytes()
    lists = folder / "rows.jsonl"
    lists.write_text(
        "\n".join(
            json.dumps({"image": image.tolist(), "label": label}) for image, label in zip(images, labels, strict=True)
        )
    )
    table = folder / "rows.parquet"
    import datasets

    bytes_of = [{"image": encode_image(image), "label": label} for image, label in zip(images, labels, strict=True)]
    datasets.Dataset.from_list(bytes_of).to_parquet(table)
    labelled = folder / "labelled"
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (labelled / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(labelled / label / f"{number}.png")
    wanted = {bytes(image) for image in images}
    reader = Image.open
    for source in (lists, table, labelled):
        splits = read(source)
        parts = [splits.train, splits.validation]
        import io

        found = {bytes(np.asarray(reader(io.BytesIO(one["bytes"])))) for part in parts for one in part["text"]}
        assert found == wanted


def test_bad_images_name_their_row(pictures, tmp_path):
    folder, _, labels = pictures
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    (folder.parent / "outside.png").write_bytes((folder / "0.png").read_bytes())
    good = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    for line, reason in {
        "broken.png,1": r"row 21: 'image' holds no image: 12 bytes do not decode",
        "none.png,1": r"row 21: there is no image file 'none\.png' in",
        "../outside.png,1": r"row 21: the image '\.\./outside\.png' lies outside",
        ",1": r"row 21: there is no image file ''",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            read(as_csv(folder, [*good, line]))
        assert "\n" not in str(caught.value)
        skipped = read(as_csv(folder, [*good, line]), on_bad_row="skip")
        assert len(every_row(skipped)) == 20


def test_an_image_column_is_no_text_and_a_text_no_image(pictures):
    import datasets

    folder, images, labels = pictures
    table = folder / "rows.parquet"
    rows = [{"image": encode_image(image), "label": label} for image, label in zip(images, labels, strict=True)]
    datasets.Dataset.from_list(rows).to_parquet(table)
    with pytest.raises(DataError, match="row 1: 'image' holds images, not text; task image-classification reads those"):
        load_splits(table, text="image")
    with pytest.raises(DataError, match="there is no image file 'a fine film' in"):
        read(as_csv(folder, ["a fine film,1", "dull,2"]))


def test_a_processor_of_another_size_is_refused(make_vit):
    folder = make_vit(side=16)
    with pytest.raises(TeacherError, match=r"makes images of shape \(3, 16, 16\), the model reads \(3, 8, 8\)"):
        load_checkpoint(str(folder), TASK)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(TeacherError, match="names no height and width"):
        load_checkpoint(str(folder), TASK)


def test_patches_are_tokens(make_vit, digits):
    checkpoint = load_checkpoint(str(make_vit()), TASK)
    images = digits[0][:3]
    rows = {"text": [{"bytes": encode_image(image)} for image in images], "label": [1, None, 3]}
    encoded = TASK.encode(rows, checkpoint.tokenizer, 4)
    batch = TASK.collate([encoded[row] for row in range(3)], checkpoint.padding)
    assert batch["attention_mask"].shape == (3, 17)
    assert encoded.lengths.tolist() == [17, 17, 17]
    processor = AutoImageProcessor.from_pretrained(checkpoint.source)
    wanted = processor([Image.fromarray(image).convert("RGB") for image in images], return_tensors="pt")
    np.testing.assert_allclose(batch["pixel_values"], wanted["pixel_values"].numpy(), atol=1e-6)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    features = TappedModel(checkpoint.model, ["logits", "hidden.0", "hidden.4", "scores.2"])(tensors)
    assert features["hidden.4"].shape == (3, 17, 48)
    assert features["scores.2"].shape == (3, 4, 17, 17)
    states = checkpoint.model(**wanted, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features["hidden.0"], states[0])
    torch.testing.assert_close(features["hidden.4"], states[4])


@pytest.mark.parametrize("card", ["layers-4", "layers-6", "tinybert-4", "mobile-4", "distilbert-6", "factorised-4"])
def test_a_card_makes_a_vit_or_says_why_not(card, make_vit):
    teacher = ViTForImageClassification.from_pretrained(make_vit(hidden_size=96, num_hidden_layers=6))
    refused = {
        "distilbert-6": "cannot be made",
        "factorised-4": "'vit'",
        "mobile-4": "head_size 64",
    }
    if card in refused:
        with pytest.raises(StudentError, match=refused[card]):
            build_student(teacher, load_student_card(card))
        return
    student = build_student(teacher, load_student_card(card))
    assert student.model.config.num_hidden_layers == len(student.layer_map)
    with torch.no_grad():
        assert student.model.eval()(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 10)


def test_auto_looks_at_images_and_times_at_their_one_length(make_vit, digits, tmp_path):
    """Calibration sees every patch of every image, and all six forms are made, asked and timed."""
    checkpoint = load_checkpoint(str(make_vit(num_hidden_layers=1)), TASK)
    rows = {"text": [{"bytes": encode_image(image)} for image in digits[0][:8]], "label": list(digits[1][:8])}
    encoded = TASK.encode(rows, checkpoint.tokenizer, 4)
    batches = [TASK.collate([encoded[row] for row in part], checkpoint.padding) for part in (range(5), range(5, 8))]
    spec = TASK.exported(checkpoint.model, TASK.inputs_of(encoded))
    metadata = {"distill.max_length": "17"}
    sources = {name: tmp_path / f"{name}.onnx" for name in ("separate heads", "fused attention")}
    forms = dict(zip(sources.values(), (DEFAULT, FUSED), strict=True))
    export_forms(checkpoint.model, spec, forms, metadata=metadata)
    seen = observe(sources["separate heads"], batches).values
    assert {each.rows for each in seen.values()} == {8 * 17, 8}  # every token of eight images; the last, the class's
    limits = {"measure": lambda _: 1.0, "max_drop": 0.5, "lengths": [17], "target": machine_target()}
    choice = fastest(sources, tmp_path / "int8.onnx", batches=batches, metadata=metadata, **limits)
    assert [set(each.latency_ms) for each in choice.tried] == [{17}] * 6
    exact, made = (OnnxModel(path) for path in (sources["separate heads"], tmp_path / "int8.onnx"))
    wanted, found = (model.predict(batches[0])["logits"] for model in (exact, made))
    assert np.abs(found - wanted).mean() < 0.1 * wanted.std()


@pytest.fixture(scope="module")
def finished(digits, make_vit, run_example, tmp_path_factory):
    images, labels = digits
    data = tmp_path_factory.mktemp("digits") / "train.jsonl"
    rows = [{"image": image.tolist(), "label": label} for image, label in zip(images, labels, strict=True)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return data, *run_example(
        "image-classification",
        f'data.train="{data}"',
        "data.validation_fraction=0.2",
        f'teacher.start="{make_vit(num_hidden_layers=2)}"',
        'teacher.checkpoint=""',
        "teacher.finetune={epochs=8, learning_rate=2e-3, batch_size=64}",
        "training={epochs=8, learning_rate=2e-3, batch_size=64, baseline=false}",
        "student.intermediate_size=48",
    )


@pytest.mark.slow
def test_a_vit_goes_the_whole_way(finished, pictures):
    data, _, result = finished
    folder, images, _ = pictures
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["student"]["metrics"]["accuracy"] > 0.8  # by chance 0.1
    assert models["student-onnx"]["metrics"] == models["student"]["metrics"]
    assert models["teacher-onnx"]["metrics"] == models["teacher"]["metrics"]
    assert verify_bundle(result.bundle).ok
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    assert bundle.model.outputs == ("logits", "probabilities")
    assert bundle.model.inputs == ("pixel_values",)
    assert bundle.max_length == 17
    paths = [str(folder / f"{number}.png") for number in range(20)]
    found = bundle.predict(paths)
    written = json.loads((result.bundle / "preprocessor_config.json").read_text("utf-8"))
    assert json.loads(bundle.model.metadata["distill.preprocessing"]) == written
    assert [one.probabilities for one in bundle.predict(list(images))] == [one.probabilities for one in found]
    ask = pipeline("image-classification", str(result.folder / "student"), top_k=1)
    for one, (best,) in zip(found, ask(paths), strict=True):
        assert one.label == best["label"]
        assert one.probability == pytest.approx(best["score"], abs=1e-4)
    verdict = verify_with_data(result.bundle, str(data), verify_bundle(result.bundle))
    assert verdict.facts["accuracy"] > 0.8
    assert 'pipeline("image-classification", "THIS-FOLDER"' in (result.bundle / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_a_changed_golden_image_is_noticed(finished, tmp_path):
    import shutil

    _, _, result = finished
    copy = tmp_path / "bundle"
    shutil.copytree(result.bundle, copy)
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text("utf-8").replace("0.5", "0.1"), "utf-8")
    verdict = verify_bundle(copy)
    assert not verdict.checks["files"][0]
    assert not verdict.checks["golden vectors"][0]


def test_a_smaller_vocabulary_is_refused(make_vit, tmp_path):
    from distill.pipeline import run_stages
    from distill.recipe import Recipe

    recipe = Recipe.parse(
        {
            "task": "image-classification",
            "output": str(tmp_path / "run"),
            "teacher": {"checkpoint": str(make_vit())},
            "student": {"vocabulary": "used"},
            "data": {"train": str(tmp_path / "none.csv")},
        }
    )
    with pytest.raises(RecipeError, match=r'`student\.vocabulary` must be "full" for image-classification'):
        run_stages(recipe, until="label")
