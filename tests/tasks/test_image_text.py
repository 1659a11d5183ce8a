import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from distill.cards import load_student_card
from distill.errors import StudentError
from distill.export.bundle import Contents, write_bundle
from distill.export.dual import part
from distill.export.graph import export_graph
from distill.export.pieces import towers
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.heads.images import encode_image
from distill.student.start import start_student
from distill.tasks import Encoded, find_task
from distill.teacher import load_checkpoint

TASK = find_task("image-text")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[END]", "a", "red", "blue", "one", "two", "three"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A CLIP of 3 layers, 32 wide, random weights."""
    folder = tmp_path_factory.mktemp("clip")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[END]", 3)]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [END]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**shape, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 24},
        vision_config={**shape, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(folder)
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
    assert batch["input_ids"][1].tolist() == [2, 6, 8, 3, 0]
    assert batch["pixel_values"].shape == (4, 3, 16, 16)
    assert batch["labels"][0] == batch["labels"][2] != batch["labels"][1]


def test_recall_looks_among_different_texts_and_all_images():
    texts = np.eye(3, dtype=np.float32)[[0, 1, 0]]
    images = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0]], np.float32)  # the third lies at the other text
    labels = np.array([7, 9, 7])
    encoded = Encoded({}, {"labels": labels}, np.arange(4), given={"text": ["one", "two", "one"]})
    found = TASK.metrics({"text_embeds": texts, "image_embeds": images}, encoded)
    assert found["text_recall_at_1"] == pytest.approx(1 / 3)  # of the first image alone
    assert found["image_recall_at_1"] == pytest.approx(1 / 2)  # of the text `one`; `two` finds the third image
    assert found["recall_at_5"] == 1.0
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
