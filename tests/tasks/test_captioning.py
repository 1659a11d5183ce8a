"""Captions: what a decoder is shown; scikit-learn's digits from a random ViT with a GPT-2 to a bundle that writes."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    ViTImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

from distill.cards import load_student_card
from distill.checks import check_problem
from distill.cli import app
from distill.data.splits import load_splits
from distill.errors import DataError, StudentError, TeacherError
from distill.evaluation import TorchPredictor
from distill.export.captioner import cut_captioner
from distill.export.graph import export_graph
from distill.export.pieces import files_of, pieces
from distill.export.runtime import Bundle, open_graph
from distill.export.verify import verify_bundle
from distill.features import TappedModel, describe
from distill.heads.generation import Rules
from distill.heads.images import encode_image
from distill.ledger import claim
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.rewriting import rewritten
from distill.run import Run
from distill.shipping import verify_with_data
from distill.student.start import start_student
from distill.tasks import TASKS, find_task
from distill.teacher import load_checkpoint

TASK = TASKS["image-captioning"]
PAD, BEGIN, END = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(captions, caption_words):
    return caption_words(captions)


@pytest.fixture(scope="module")
def make_reader(tokenizer, make_captioner, tmp_path_factory):
    """By layers: a ViT and a GPT-2, 48 wide, random weights. Only generation_config says what is written first."""

    def make(layers):
        folder = tmp_path_factory.mktemp("captioner")
        model = make_captioner(len(tokenizer), layers=layers)
        model.generation_config.max_new_tokens = 10
        model.generation_config.decoder_start_token_id = BEGIN
        model.config.decoder_start_token_id = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def start(make_reader):
    return make_reader(3)


@pytest.fixture(scope="module")
def checkpoint(start):
    return load_checkpoint(str(start), TASK)


def encode(checkpoint, images, captions, limit=8):
    rows = {"text": [{"bytes": encode_image(image), "path": "one.png"} for image in images], "label": captions}
    return TASK.encode(rows, checkpoint.tokenizer, limit)


def batch_of(checkpoint, images, captions, limit=8):
    encoded = encode(checkpoint, images, captions, limit)
    return TASK.collate([encoded[row] for row in range(len(images))], checkpoint.padding)


def test_a_captioner_is_this_task_and_may_be_called_seq2seq():
    assert find_task("auto", ["VisionEncoderDecoderModel"]) is TASK
    assert find_task("seq2seq", ["VisionEncoderDecoderModel"]) is TASK
    assert find_task("seq2seq", ["T5ForConditionalGeneration"]).name == "seq2seq"
    assert find_task("auto", ["BertModel"]).name == "sentence-embedding"


def test_a_caption_ends_and_is_shown_one_token_late(checkpoint, digits):
    words = checkpoint.tokenizer.tokenizer
    batch = batch_of(checkpoint, digits[0][:2], ["a bold narrow handwritten three", "a three"], limit=5)
    first, second = (words(text)["input_ids"] for text in ("a bold narrow handwritten three", "a three"))
    assert batch["labels"].tolist() == [[*first[:4], END], [*second, END, -100, -100]]
    assert batch["decoder_input_ids"].tolist() == [[BEGIN, *first[:4]], [BEGIN, *second, PAD, PAD]]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["attention_mask"].shape == (2, 17)
    assert TASK.tokens(batch).tolist() == [5, 3]


def test_hidden_states_are_those_of_the_image_encoder(checkpoint, digits):
    batch = batch_of(checkpoint, digits[0][:2], ["a three", "a bold four"])
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    features = TappedModel(checkpoint.model, ["logits", "hidden.0", "hidden.3", "scores.2"])(tensors)
    inputs = {name: tensors[name] for name in TASK.feeds}
    said = checkpoint.model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(features["hidden.3"], said.encoder_hidden_states[3])
    torch.testing.assert_close(features["hidden.0"], said.encoder_hidden_states[0])
    assert features["scores.2"].shape == (2, 4, 17, 17)
    assert (describe(checkpoint.model).layers, describe(checkpoint.model).paired) == (3, False)


def test_a_student_inherits_from_both_halves(checkpoint):
    teacher = checkpoint.model
    shape = {"layers": 2, "decoder_layers": 1}
    student = start_student(teacher, load_student_card("layers-6"), list, overrides=shape)
    assert student.layer_map == [(1, 1), (2, 3)]
    assert not student.fresh
    mine, theirs = student.model, teacher
    torch.testing.assert_close(mine.encoder.layers[1].mlp.fc1.weight, theirs.encoder.layers[2].mlp.fc1.weight)
    torch.testing.assert_close(
        mine.decoder.transformer.h[0].mlp.c_fc.weight, theirs.decoder.transformer.h[0].mlp.c_fc.weight
    )
    assert len(mine.decoder.transformer.h) == mine.config.decoder.n_layer == 1
    assert student.parameters == sum(value.numel() for value in mine.parameters())
    assert mine.generation_config.max_new_tokens == 10
    last = start_student(teacher, load_student_card("layers-6"), list, overrides=shape, layers="last").model
    torch.testing.assert_close(last.decoder.transformer.wpe.weight, theirs.decoder.transformer.wpe.weight)
    torch.testing.assert_close(
        last.decoder.transformer.h[0].mlp.c_fc.weight, theirs.decoder.transformer.h[2].mlp.c_fc.weight
    )
    with pytest.raises(StudentError, match="decoder_layers is 4 but the teacher's decoder has 3"):
        start_student(teacher, load_student_card("layers-6"), list, overrides={"layers": 2, "decoder_layers": 4})
    with pytest.raises(StudentError, match="an encoder and a decoder cannot be ranked"):
        start_student(teacher, load_student_card("layers-6"), list, overrides=shape, layers="important")


def test_a_bridge_between_widths_is_inherited_and_a_narrower_student_starts_it_anew(make_captioner):
    teacher = make_captioner(30, encoder=48, decoder=32)
    kept = start_student(teacher, load_student_card("layers-6"), list, overrides={"layers": 2})
    torch.testing.assert_close(kept.model.enc_to_dec_proj.weight, teacher.enc_to_dec_proj.weight)
    narrow = start_student(teacher, load_student_card("layers-6"), list, overrides={"layers": 2, "hidden_size": 16})
    assert not hasattr(narrow.model, "enc_to_dec_proj")
    assert any("random start" in remark for remark in narrow.remarks)
    reader = make_captioner(30, kind="trocr", encoder=48, decoder=32)
    small = start_student(reader, load_student_card("layers-6"), list, overrides={"layers": 1, "hidden_size": 16})
    assert small.model.config.decoder.cross_attention_hidden_size == 16


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"eos_token_id": None}, "no caption would end: .* must name decoder_start_token_id and eos_token_id"),
        ({"family": "donut-swin"}, "its encoder is of the family 'donut-swin'; known for captions are vit, deit"),
    ],
)
def test_teachers_that_would_teach_nothing_are_refused(start, change, match):
    checkpoint = load_checkpoint(str(start), TASK)
    if "family" in change:
        checkpoint.model.config.encoder.model_type = change["family"]
    else:
        checkpoint.model.generation_config.eos_token_id = None
    with pytest.raises(TeacherError, match=match) as caught:
        check_problem(checkpoint, TASK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("trocr", marks=pytest.mark.slow)])
def test_both_files_say_and_write_what_the_model_does(kind, make_captioner, tmp_path):
    """In one pass, token by token, greedily and by beams; widths differ, so a product stands between the halves."""
    model = make_captioner(30, kind=kind, decoder=32, layers=2).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2.0)  # or every text were the same
    export_graph(model, TASK.exported(model, []), tmp_path / "whole.onnx")
    cut_captioner(tmp_path / "whole.onnx", *pieces(tmp_path / "cut" / "model.onnx"))
    graph = open_graph(tmp_path / "cut" / "model.onnx")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    shown = torch.randint(3, 30, (3, 6), generator=generator)
    with torch.no_grad():
        expected = model(pixel_values=pixels, decoder_input_ids=shown).logits.numpy()
    values = {"pixel_values": pixels.numpy(), "decoder_input_ids": shown.numpy()}
    np.testing.assert_allclose(open_graph(tmp_path / "whole.onnx").predict(values)["logits"], expected, atol=1e-4)
    np.testing.assert_allclose(graph.predict(values)["logits"], expected, atol=1e-4)
    step, past, said = graph.stepper(values), None, []
    for place in range(6):
        logits, past = step(values["decoder_input_ids"][:, place : place + 1], past)
        said.append(logits)
    np.testing.assert_allclose(np.stack(said, axis=1), expected, atol=1e-4)
    for beams in (1, 3):
        rules = Rules(ends=(END,), max_new_tokens=8, start=BEGIN, beams=beams)
        assert graph.write(values, rules) == TorchPredictor(model, TASK).write(values, rules)
    encoder, decoder = (onnx.load(file).graph for file in files_of(tmp_path / "cut" / "model.onnx"))
    infix = ".decoder" if kind == "trocr" else ""  # as transformers.js names them by config.decoder
    assert [value.name for value in encoder.input] == ["pixel_values"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    past = [f"{layer}{infix}.{each}" for layer in range(2) for each in ("key", "value")]
    wanted = {"input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in past)}
    assert {value.name for value in decoder.input} == wanted
    assert {value.name for value in decoder.output} == {"logits", *(f"present.{name}" for name in past)}
    rows = {value.type.tensor_type.shape.dim[0].dim_param for value in decoder.input}
    assert rows == {"batch_size"}  # transformers.js makes the first, empty past by it


def read(folder, rows, **changes):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return load_splits(
        path, text="image", label="caption", inputs="image", target="text", validation_fraction=0.3, **changes
    )


def test_a_bad_image_or_no_caption_names_its_row(digits, captions, tmp_path):
    good = [{"image": image.tolist(), "caption": text} for image, text in zip(digits[0][:20], captions, strict=False)]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    pixels = digits[0][0].tolist()
    for row, reason in (
        ({"image": "broken.png", "caption": "a three"}, r"row 21: 'image' holds no image: 12 bytes do not decode"),
        ({"image": pixels, "caption": "  "}, r"row 21: 'caption' is empty"),
        ({"image": pixels, "caption": None}, r"row 21: 'caption' is missing"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            read(tmp_path, [*good, row])
        assert "\n" not in str(caught.value)
        skipped = read(tmp_path, [*good, row], on_bad_row="skip")
        assert len(skipped.train) + len(skipped.validation) == 20


def test_what_was_last_cut_is_no_part_of_a_reader(start, digits):
    """Else a run that is gone on with would not know its own tokenizer, and train again."""
    checkpoint = load_checkpoint(str(start), TASK)
    before = checkpoint.tokenizer_hash()
    encode(checkpoint, digits[0][:1], ["a three"], limit=2)
    assert checkpoint.tokenizer_hash() == before


@pytest.fixture(scope="module")
def finished(digits, captions, make_reader, run_example, rows_file):
    """scikit-learn's digits with what can be seen on them, from a random captioner to the bundle."""
    rows = [{"image": image.tolist(), "caption": text} for image, text in zip(digits[0], captions, strict=True)]
    data = rows_file(rows[:800])
    return data, *run_example(
        "image-captioning",
        f'data.train="{data}"',
        "data.validation_fraction=0.15",
        "data.max_length=8",
        f'teacher.start="{make_reader(2)}"',
        'teacher.checkpoint=""',
        "teacher.finetune={epochs=7, learning_rate=3e-3, batch_size=32}",
        "training={epochs=3, learning_rate=3e-3, batch_size=32, baseline=false}",
        "student.decoder_layers=1",
        "bench.runs=3",
    )


@pytest.mark.slow
def test_a_captioner_goes_the_whole_way(finished):
    data, _, result = finished
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    found = {role: row["metrics"] for role, row in models.items()}
    assert found["teacher"]["likelihood"] > 0.6  # by chance 1 / 24
    assert found["student"]["likelihood"] > 0.6
    assert found["student-int8"]["rouge_l"] > 70
    for role in ("student", "teacher"):
        assert found[f"{role}-onnx"] == pytest.approx(found[role], rel=1e-3)
    files = {path.name for path in (result.bundle / "onnx").iterdir()}
    assert files == {
        *("encoder_model.onnx", "encoder_model_quantized.onnx"),
        *("decoder_model_merged.onnx", "decoder_model_merged_quantized.onnx"),
    }
    verdict = verify_with_data(result.bundle, str(data), verify_bundle(result.bundle))
    assert verdict.ok
    assert verdict.facts["likelihood"] > 0.6
    golden = json.loads((result.bundle / "golden.jsonl").read_text().splitlines()[0])
    assert golden["image"]["shape"] == [8, 8, 3]
    assert golden["text"].startswith("a ")
    bench = json.loads((result.folder / "results.json").read_text())["bench"]
    assert {cell["step"] for cell in bench["cells"]} == {True, False}
    assert "rouge_l" in (result.folder / "report.md").read_text("utf-8")
    card = (result.bundle / "README.md").read_text("utf-8")
    assert 'pipeline("image-to-text"' in card
    assert "It reads an\nimage and writes a text for it" in card


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_the_bundle_writes_what_transformers_write(finished, digits, tmp_path, beams):
    _, _, result = finished
    student = str(result.folder / "student")
    model = AutoModelForImageTextToText.from_pretrained(student).eval()
    words, pictures = AutoTokenizer.from_pretrained(student), AutoImageProcessor.from_pretrained(student)
    images = digits[0][900:908]
    shown = pictures([Image.fromarray(image).convert("RGB") for image in images], return_tensors="pt")
    said = words.batch_decode(model.generate(**shown, num_beams=beams, do_sample=False), skip_special_tokens=True)
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    bundle.rules["beams"] = beams
    assert [one.text for one in bundle.predict(list(images))] == [text.strip() for text in said]
    assert len(set(said)) > 3


@pytest.mark.slow
def test_the_command_reads_files_and_says_how_likely_a_caption_is(finished, digits, captions, tmp_path):
    _, _, result = finished
    path = tmp_path / "one.png"
    Image.fromarray(digits[0][900]).save(path)
    found = CliRunner().invoke(app, ["predict", str(result.bundle), str(path)])
    assert found.output == f"{Bundle.load(result.bundle)(digits[0][900]).text}\t{path}\n"
    model = load_checkpoint(str(result.folder / "student"), TASK)
    batch = batch_of(model, digits[0][900:901], captions[900:901])
    tensors = {name: torch.from_numpy(batch[name]) for name in (*TASK.feeds, "labels")}
    with torch.no_grad():
        loss = float(model.model(**tensors).loss)
    full = ["--file", "onnx/model.onnx", "--json", "--pair", captions[900]]
    found = CliRunner().invoke(app, ["predict", str(result.bundle), str(path), *full])
    assert json.loads(found.output)["likelihood"] == pytest.approx(math.exp(-loss), rel=1e-3)
    path.write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"one\.png: 12 bytes do not decode as an image"):
        Bundle.load(result.bundle)(str(path))


@pytest.mark.slow
def test_a_student_can_learn_what_its_teacher_writes(finished, digits, tmp_path):
    _, _, result = finished
    teacher = load_checkpoint(str(result.folder / "teacher"), TASK)
    images = [{"bytes": encode_image(image), "path": "one.png"} for image in digits[0][900:903]]
    found = rewritten(images, teacher, TASK, tmp_path / "targets.json", max_length=8)
    batch = batch_of(teacher, digits[0][900:903], [None] * 3)
    ids = teacher.model.generate(pixel_values=torch.from_numpy(batch["pixel_values"]), do_sample=False, num_beams=4)
    assert found == [text.strip() for text in teacher.tokenizer.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@pytest.mark.slow
def test_a_recipe_that_says_seq2seq_takes_the_captioner(finished, tmp_path):
    recipe, result = finished[1:]
    values = recipe.model_dump(mode="json") | {"task": "seq2seq", "output": str(tmp_path / "run")}
    values["teacher"] = {"checkpoint": str(result.folder / "teacher")}
    asked = Recipe.parse(values)
    with claim(asked) as ledger:
        assert Run(asked, ledger, SILENT).task is TASK
