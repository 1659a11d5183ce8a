"""A budget for the cache: what is chosen for it, how far values move, and that each choice trains."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from distill.cache.cached_teacher import CachedTeacher, build_cache
from distill.cache.labelling import label_rows
from distill.cache.storage import MixedTeacher, Need, QuantisedTeacher, measure_need, quantise, size
from distill.cache.top_k import IDS, TOP, TopKTeacher
from distill.errors import CacheError, TeacherError
from distill.pipeline import run_stages
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.teacher import LiveTeacher

TAPS = ("logits", "hidden.2", "query.1", "scores.2")
INPUTS = {
    "weights_hash": "w", "tokenizer_hash": "t", "max_length": 32, "taps": TAPS, "dtype": "fp32", "texts_hash": "x",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(1)
    return [
        {"input_ids": random.integers(5, 500, 3 + row % 17), "length": 3 + row % 17, "example": 40 + row}
        for row in range(50)
    ]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.from_numpy(row["input_ids"])
        mask[number, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "example": torch.tensor([row["example"] for row in rows])}


def bytes_of_tensors(folder):
    """Bytes of the shards less their headers and lengths."""
    total = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        begin, end = header["lengths"]["data_offsets"]
        total += len(data) - 8 - size - (end - begin)
    return total


@pytest.mark.parametrize("kept", ["fp16", "int8", "top-k"])
def test_the_need_is_what_the_files_take(model, rows, tmp_path, kept):
    live = LiveTeacher(model, TAPS if kept != "top-k" else ["logits"])
    if kept == "top-k":
        live = TopKTeacher(live, 2)
    need = measure_need(live, rows, collate)
    teacher = QuantisedTeacher(live) if kept == "int8" else live
    build_cache(teacher, rows, collate, tmp_path / "cache", key="a", shard_examples=16, batch_size=8)
    expected = {"fp16": need.logits + need.fp16, "int8": need.logits + need.int8, "top-k": need.logits}[kept]
    slack = 50 * 3 * 2 if kept == "top-k" else 0  # one answer a row is written in fp32, whatever it is
    assert expected <= bytes_of_tensors(tmp_path / "cache") <= expected + slack


def test_the_choice_follows_the_budget():
    need = Need(logits=100, fp16=2000, int8=1100, taps=("hidden.2", "hidden.4"))
    kept = {budget: need.choose(budget)[0] for budget in (0, 2100, 2099, 1200, 1199, 100)}
    assert kept == {0: "fp16", 2100: "fp16", 2099: "int8", 1200: "int8", 1199: "live", 100: "live"}
    assert need.choose(1199)[1] == (
        "teacher cache: logits alone, 100 bytes; the teacher runs at every step for hidden.2, hidden.4: in fp16 they "
        "would take 2.00 kB, in int8 1.10 kB, cache.max_bytes allows 1.20 kB"
    )
    assert "hidden.2, hidden.4 in int8, 1.20 kB; in fp16 they would take 2.00 kB" in need.choose(2099)[1]
    with pytest.raises(CacheError, match=r"the logits alone take 100 bytes, cache.max_bytes allows 99 bytes.*top_k"):
        need.choose(99)
    assert Need(100, 0, 0, ()).choose(0) == ("fp16", "teacher cache: logits, 100 bytes")
    assert size(1_500_000_000) == "1.50 GB"


@pytest.mark.parametrize("large", [1.0, 5e4, 1e9, 1e-9, 0.0])
def test_int8_moves_a_value_by_half_a_step_at_most(large):
    torch.manual_seed(0)
    value = torch.randn(3, 5, 64) * large
    numbers, scale = quantise(value, torch.ones(3, 5, dtype=torch.bool))
    assert numbers.dtype == torch.int8
    error = (numbers.float() * scale - value).abs()
    bound = value.abs().amax(-1, keepdim=True) / 254 * 1.002 + 127 * 6e-8  # steps below the least fp16 number are 0
    assert (error <= bound).all()


def features_of(teacher, batch):
    """Valid values of each tap, flat, padding left out."""
    mask = batch["attention_mask"].bool()
    found = {}
    for tap, value in teacher.features(batch).items():
        assert value.dtype == torch.float32
        if value.ndim == 4:
            rows = [one[:, keep][:, :, keep] for one, keep in zip(value, mask, strict=True)]
            found[tap] = [row.reshape(-1, row.shape[-1]) for row in rows]
        else:
            found[tap] = [value[mask] if value.ndim == 3 else value]
    return found


@pytest.mark.parametrize("budget", ["fp16", "int8", "live"])
def test_features_are_read_back_within_the_stated_error(model, rows, tmp_path, budget):
    need = measure_need(LiveTeacher(model, TAPS), rows, collate)
    allowed = {"fp16": 0, "int8": need.logits + need.int8, "live": need.logits}[budget]
    teacher = label_rows(
        lambda taps: LiveTeacher(model, taps), TAPS, rows, collate, tmp_path / "cache", inputs=INPUTS, max_bytes=allowed
    )
    assert teacher.taps == set(TAPS)
    assert isinstance(teacher, MixedTeacher if budget == "live" else CachedTeacher)
    batch = collate([rows[place] for place in (3, 40, 12, 49)])
    there, here = features_of(teacher, batch), features_of(LiveTeacher(model, TAPS), batch)
    for tap in TAPS:
        for found, wanted in zip(there[tap], here[tap], strict=True):
            largest = wanted.abs().amax(-1, keepdim=True)
            bound = {"fp16": largest / 2048, "int8": largest / 253, "live": largest * 1e-5}[budget]
            bound = bound + 1e-6 if tap != "logits" else torch.full_like(bound, 1e-5)
            assert ((found - wanted).abs() <= bound).all(), tap
            if budget == "int8" and tap != "logits":
                assert not torch.equal(found, wanted)


def test_a_live_teacher_reads_its_own_token_ids(model, rows, tmp_path):
    """A student with another vocabulary hands over other ids: the teacher must not read those."""
    need = measure_need(LiveTeacher(model, TAPS), rows, collate)
    teacher = label_rows(
        lambda taps: LiveTeacher(model, taps), TAPS, rows, collate, tmp_path / "c", inputs=INPUTS, max_bytes=need.logits
    )
    batch = collate(rows[4:9])
    features = teacher.features({**batch, "input_ids": batch["input_ids"] * 0 + 1})
    torch.testing.assert_close(features["hidden.2"], LiveTeacher(model, ["hidden.2"]).features(batch)["hidden.2"])


def test_the_choice_is_said_once_and_made_again_for_another_budget(model, rows, tmp_path):
    class Said(type(SILENT)):
        def say(self, line):
            lines.append(line)

    lines: list[str] = []
    sizes = []
    for budget in (0, 0, 20_000, 20_000):
        teacher = label_rows(
            lambda taps: LiveTeacher(model, taps), ["logits", "hidden.2"], rows, collate, tmp_path / "cache",
            inputs=INPUTS | {"taps": ["logits", "hidden.2"]}, max_bytes=budget, progress=Said(),
        )  # fmt: skip
        sizes.append(teacher.nbytes)
    assert [line.split(",")[1].strip() for line in lines] == ["35.29 kB; no limit is set", "and hidden.2 in int8"]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]


def test_an_answer_in_int8_that_is_not_finite_is_named(model, rows, tmp_path):
    class Broken(LiveTeacher):
        def features(self, batch):
            features = super().features(batch)
            features["hidden.2"][batch["example"] == 47, 1, 3] = value
            return features

    for value in (torch.nan, torch.inf):
        with pytest.raises(TeacherError, match=r"its hidden.2 are not finite \(NaN or infinite\) for row 8"):
            build_cache(QuantisedTeacher(Broken(model, TAPS)), rows, collate, tmp_path / str(value), key="a")


def test_the_likeliest_classes_within_a_budget(model, rows, tmp_path):
    inputs = INPUTS | {"taps": ["logits", "hidden.2"], "top_k": 2}
    teacher = label_rows(
        lambda taps: LiveTeacher(model, taps), ["logits", "hidden.2"], rows, collate, tmp_path / "cache",
        inputs=inputs, max_bytes=5_000,
    )  # fmt: skip
    assert isinstance(teacher, MixedTeacher)
    assert teacher.taps == {IDS, TOP, "hidden.2"}
    assert teacher.features(collate(rows[:3]))[IDS].shape == (3, 2)


@pytest.fixture(scope="module")
def teacher_folder(intents_folder, tiny_start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_stages(recipe_for(folder / "first", intents_folder, {"start": str(tiny_start)}), until="finetune")
    return folder / "first" / "teacher"


def recipe_for(folder, intents, teacher, **cache):
    return Recipe.parse(
        {
            "output": str(folder),
            "teacher": {"finetune": {"epochs": 4, "learning_rate": 3e-3}, **teacher},
            "student": {"layers": 1, "vocabulary": "used"},
            "data": {name: str(intents / f"{name}.csv") for name in ("train", "validation", "test")}
            | {"max_length": 32},
            "objective": {"preset": "logits+hidden"},
            "training": {"epochs": 2, "learning_rate": 3e-3, "baseline": False, "precision": "fp32"},
            "cache": cache,
        }
    )


def test_each_choice_trains_and_learns_the_same(tmp_path, intents_folder, teacher_folder):
    losses = {}
    for kept, allowed in (("fp16", 0), ("int8", 230_000), ("live", 10_000)):
        folder = tmp_path / kept
        recipe = recipe_for(folder, intents_folder, {"checkpoint": str(teacher_folder)}, max_bytes=allowed)
        run_stages(recipe, until="train")
        index = json.loads((folder / "work/cache/index.json").read_text())
        assert index["key"]["kept"] == kept
        state = json.loads((folder / "work/state/train.json").read_text())
        losses[kept] = [point["loss"] for point in state["facts"]["curve"] if "loss" in point]
    assert len(losses["fp16"]) > 3
    assert losses["fp16"][-1] < losses["fp16"][0]
    assert losses["live"] == pytest.approx(losses["fp16"], rel=0.01)
    assert losses["int8"] == pytest.approx(losses["fp16"], rel=0.03)
