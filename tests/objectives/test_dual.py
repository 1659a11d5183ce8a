"""Losses on pairs of vectors, beside what the formulas say of two pairs in two dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from distill.encoders import describe
from distill.errors import ObjectiveError
from distill.objectives import build_objective
from distill.objectives.dual import pair_labels, pair_mse, similarity_kl
from distill.recipe import TermRecipe

ALL = torch.tensor([True, True])
APART = torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 3]])  # each text at its own image, at right angles to the other's
CROSSED = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])  # each text at the other's image


def softmax_of(cosine: float, temperature: float) -> float:
    """The share of one of two, whose cosine is this and the other's 0."""
    return 1 / (1 + math.exp(-cosine / temperature))


def test_the_vectors_are_compared_at_length_one() -> None:
    total, count = pair_mse(7 * APART, APART, scored=ALL)
    assert (total.item(), count.item()) == (0.0, 2.0)
    total, _ = pair_mse(CROSSED, APART, scored=ALL)
    assert total.item() == pytest.approx(2 * (0 + 2) / 2)  # texts agree; images are at right angles, 2 apart squared
    total, count = pair_mse(CROSSED, APART, scored=torch.tensor([True, False]))
    assert (total.item(), count.item()) == (pytest.approx(1.0), 1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_rankings_are_compared_both_ways(temperature: float) -> None:
    high = softmax_of(1.0, temperature)
    wanted = high * math.log(high / (1 - high)) + (1 - high) * math.log((1 - high) / high)
    total, count = similarity_kl(CROSSED, APART, scored=ALL, temperature=temperature)
    assert (total.item(), count.item()) == (pytest.approx(wanted, rel=1e-5), 1.0)
    assert similarity_kl(APART, APART, scored=ALL, temperature=temperature)[0].item() == pytest.approx(0.0, abs=1e-6)


def test_rankings_may_differ_one_way_alone() -> None:
    """Both texts stand at the first image: images rank them alike, and each text ranks the first image highest."""
    student = torch.tensor([[1.0, 0, 1, 0], [1, 0, 0, 1]])
    high = softmax_of(1.0, 1.0)
    rows = [math.log(high / 0.5) * high + math.log((1 - high) / 0.5) * (1 - high)] * 2
    columns = [0.0, high * math.log(high / (1 - high)) + (1 - high) * math.log((1 - high) / high)]
    total, _ = similarity_kl(student, APART, scored=ALL, temperature=1.0)
    assert total.item() == pytest.approx(sum([*rows, *columns]) / 4, rel=1e-5)


def test_rows_with_one_text_share_the_mass() -> None:
    high = softmax_of(1.0, 0.5)
    known, one = torch.tensor([3, 7]), torch.tensor([5, 5])
    assert pair_labels(APART, labels=known, scored=ALL, temperature=0.5)[0].item() == pytest.approx(-math.log(high))
    shared = -(math.log(high) + math.log(1 - high)) / 2
    assert pair_labels(APART, labels=one, scored=ALL, temperature=0.5)[0].item() == pytest.approx(shared)
    alone = pair_labels(APART, labels=torch.tensor([3, -100]), scored=ALL, temperature=0.5)
    assert (alone[0].item(), alone[1].item()) == (pytest.approx(0.0, abs=1e-6), 1.0)


def test_clips_own_loss_is_ours_at_its_temperature() -> None:
    """transformers' CLIPModel(return_loss=True), where every row has a text of its own."""
    model, batch = a_clip(2, 16), a_batch()
    with torch.no_grad():
        said = model(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}, return_loss=True
        )
    vectors = torch.cat([said.text_embeds, said.image_embeds], dim=-1)
    temperature = 1 / model.logit_scale.exp().item()
    total, _ = pair_labels(vectors, labels=torch.arange(4), scored=torch.ones(4).bool(), temperature=temperature)
    assert total.item() == pytest.approx(said.loss.item(), rel=1e-4)


def test_a_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="temperature must be above 0; got 0"):
        similarity_kl(APART, APART, scored=ALL, temperature=0.0)
    with pytest.raises(ObjectiveError, match="temperature must be above 0; got -1"):
        pair_labels(APART, labels=torch.tensor([0, 1]), scored=ALL, temperature=-1.0)


def a_clip(layers: int, width: int) -> CLIPModel:
    torch.manual_seed(layers)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 32}
    text = {**shape, "vocab_size": 30, "max_position_embeddings": 16, "eos_token_id": 3}
    images = {**shape, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=images, projection_dim=8)).eval()


def a_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 30, (4, 6), generator=generator)
    ids[:, -1] = 3
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
        "labels": torch.tensor([0, 1, 2, 0]),
        "scored": torch.ones(4).bool(),
    }


@pytest.mark.parametrize("name", ["similarity_kl", "pair_mse", "pair_labels", "hidden_mse", "value_relation"])
def test_gradients_reach_a_small_clip(name: str) -> None:
    """A CLIP of 2 layers, 16 wide, learns from one of 4 layers, 24 wide."""
    from distill.features import TappedModel

    student, teacher, batch = a_clip(2, 16), a_clip(4, 24), a_batch()
    objective = build_objective([TermRecipe(loss=name)], describe(student), describe(teacher))
    with torch.no_grad():
        target = TappedModel(teacher, objective.teacher_taps)(batch)
    total, count = objective(TappedModel(student, objective.student_taps)(batch), target, batch)[name]
    torch.testing.assert_close(count, objective.counts(batch)[objective.units[name]])
    total.backward()
    reached = {key.split(".")[0] for key, value in student.named_parameters() if value.grad is not None}
    images = {"vision_model", "visual_projection", "text_projection"}
    assert reached >= {"text_model", *(images if objective.plans[0].loss.paired else ())}


def test_logits_of_a_head_are_none_of_two_encoders() -> None:
    shape = describe(a_clip(2, 16))
    with pytest.raises(ObjectiveError, match="soft_labels: reads logits, and two encoders give vectors; take sim"):
        build_objective([TermRecipe(loss="soft_labels")], shape, shape)
