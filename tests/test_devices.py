"""Where models run, told without a card: by what is asked to move, and by tensors of the meta device."""

import pytest
import torch
from torch import nn

from distill import devices
from distill.devices import placed, teacher_device, training_device
from distill.errors import TrainingError
from distill.ledger import Ledger
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.run import Run
from distill.teacher import use_bf16
from distill.training.quick import attention, dropout

CARD = torch.device("cuda", 0)


class Moving(nn.Linear):
    """Says where it is, and notes where it is asked to go."""

    def __init__(self):
        super().__init__(1, 1)
        self.asked = []

    def to(self, device):
        self.asked.append(torch.device(device))
        return super().to("meta" if torch.device(device).type == "cuda" else device) if device == CARD else self


def test_models_go_to_the_card_and_come_back():
    one = Moving()
    with placed([one], CARD):
        assert one.asked == [CARD]
        assert one.weight.device.type == "meta"
    assert one.asked == [CARD, torch.device("cpu")]
    other = Moving()
    with placed([other], torch.device("cpu")):
        assert other.asked == []


def test_models_come_back_after_an_error():
    one = Moving()
    with pytest.raises(ValueError, match="inside"), placed([one], CARD):
        raise ValueError("inside")
    assert one.asked[-1] == torch.device("cpu")


def test_the_teacher_is_where_it_is_wanted(monkeypatch):
    assert teacher_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(devices, "training_device", lambda: CARD)
    assert teacher_device("auto") == CARD
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert teacher_device("cuda:1") == torch.device("cuda", 1)
    assert teacher_device("cuda") == CARD
    with pytest.raises(TrainingError, match=r"`training.teacher_device` is 'cuda:2', .* has 2 CUDA cards"):
        teacher_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_all_is_on_the_processor():
    assert training_device() == teacher_device("auto") == torch.device("cpu")
    with pytest.raises(TrainingError, match="no CUDA cards"):
        teacher_device("cuda")


def test_precision_is_that_of_the_device(monkeypatch, tiny_start, intents_folder, tmp_path):
    """Asked of the processor, key and evaluation were in fp32 beside a card that trains in bf16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert use_bf16("auto", CARD)
    assert not use_bf16("auto", "cpu")
    recipe = Recipe.parse({"teacher": {"start": str(tiny_start)}, "data": {"train": str(intents_folder / "train.csv")}})
    run = Run(recipe, Ledger(tmp_path), SILENT)
    run.__dict__ |= {"teacher": Known(), "texts_hash": "-", "others": []}
    assert run.cache_inputs(Objective())["dtype"] == "fp32"
    monkeypatch.setattr(devices, "training_device", lambda: CARD)
    assert run.cache_inputs(Objective())["dtype"] == "bf16"
    moved = Moving()
    run.teacher.model = moved
    with run.teaching():
        assert moved.asked == [CARD]


class Known:
    """A checkpoint as far as keys read it."""

    def weights_hash(self):
        return "w"

    def tokenizer_hash(self):
        return "t"

    class model:  # noqa: N801
        get_output_embeddings = staticmethod(lambda: None)


class Objective:
    """An objective as far as keys read it."""

    teacher_taps = frozenset({"logits"})
    plans = ()


def test_quick_parts_leave_other_devices_alone():
    """On a card attention with dropout is the card's own; random numbers are drawn where the values are."""
    q, k, v = (torch.empty(3, 2, 7, 8, device="meta", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.empty(3, 1, 7, 7, device="meta", dtype=torch.bool)
    said, _ = attention(nn.Identity(), q, k, v, mask, dropout=0.1)
    assert said.device.type == "meta"
    assert dropout(torch.empty(5, 3, device="meta"), 0.1).device.type == "meta"
