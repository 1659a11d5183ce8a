"""Frozen layers are the teacher's, and what they say may come from it: equal features, equal gradients, equal runs."""

import copy

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LongformerConfig,
    LongformerForSequenceClassification,
)

from distill.encoders import find_encoder
from distill.errors import TrainingError
from distill.features import TappedModel
from distill.files import read_json
from distill.pipeline import run_stages
from distill.recipe import Recipe, TrainingRecipe
from distill.training import frozen as frozen_module
from distill.training.frozen import check_copies, frozen, states_given, states_read
from distill.training.lighter import lighter
from tests.test_features import CONFIGS, batch_for, build
from tests.training.test_lighter import TAPS, batch, bert, gradients


def test_frozen_layers_are_the_teachers_and_the_way_back_ends_above_them():
    model = bert()
    tapped = TappedModel(model, TAPS)
    with lighter(model, TrainingRecipe(freeze_layers=2), on_processor=True):
        model.train()  # as the Trainer does before each step
        found, _, said = gradients(model, tapped)
        rows = batch()
        one, other = tapped(rows), tapped(rows)
        assert torch.equal(one["hidden.2"], other["hidden.2"])  # nothing is dropped out inside
        assert not torch.equal(one["hidden.4"], other["hidden.4"])
        assert not said["hidden.2"].requires_grad
    assert {name.split(".")[3] for name in found if "encoder.layer" in name} == {"2", "3"}
    assert not any("embeddings" in name for name in found)
    assert all(part.training for part in model.modules())


def test_what_runs_before_the_frozen_layers_is_frozen_wherever_it_stands():
    """GPT-2's dropout gives way to a quick one; BART's first norm stands behind its layers."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=50, n_positions=16))
    seen = []
    with lighter(gpt2, TrainingRecipe(freeze_layers=1), on_processor=True):
        gpt2.train()
        gpt2.transformer.h[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
        for _ in range(2):
            gpt2(torch.arange(8)[None])
    assert torch.equal(*seen)
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_layers=3, decoder_layers=1, vocab_size=50, max_position_embeddings=16, **sizes)
    )
    with frozen(bart, 1):
        bart.train()
        assert not bart.model.encoder.layernorm_embedding.weight.requires_grad
        assert bart.model.encoder.layers[1].fc1.weight.requires_grad


@pytest.mark.parametrize("model", [bert(2), AlbertForSequenceClassification(AlbertConfig(
    vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=3, intermediate_size=40,
))])  # fmt: skip
def test_something_must_learn(model):
    """ALBERT's layers are one: freezing its first would freeze all."""
    with (
        pytest.raises(TrainingError, match=r"`training.freeze_layers` is 2, the student has . layers"),
        frozen(model, 2),
    ):
        pass


def test_only_copies_may_be_frozen():
    teacher, student = bert(6), bert(4, seed=1)
    with pytest.raises(TrainingError, match="the student's embeddings is no copy"):
        check_copies(student, teacher, 1, batch())
    mine, theirs = student.bert, teacher.bert
    mine.embeddings.load_state_dict(theirs.embeddings.state_dict())
    for number, source in enumerate((0, 2)):
        mine.encoder.layer[number].load_state_dict(theirs.encoder.layer[source].state_dict())
    check_copies(student, teacher, 1, batch())
    assert student.training
    with pytest.raises(TrainingError, match="the student's layer 2 is no copy"):
        check_copies(student, teacher, 2, batch())
    mine.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    with pytest.raises(TrainingError, match="layer 1 has the teacher's weights and says something else"):
        check_copies(student, teacher, 1, batch())


def test_groups_of_shared_layers_are_frozen_once_and_freed_once():
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=4,
        intermediate_size=40, num_hidden_groups=2,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).train()
    settings = TrainingRecipe(freeze_layers=2)
    with frozen(model, 2), states_given(model, settings, {"logits"}, batch()) as given:
        assert given is not None
        with torch.no_grad(), given.given({"hidden.2": torch.zeros(3, 9, 16)}):
            model(**batch())
    assert all(part.training for part in model.modules())


def test_layers_that_are_computed_again_are_frozen_all_the_same():
    """transformers makes embeddings ask for a gradient where it computes layers again."""
    model, settings = bert(dropout=0.0), TrainingRecipe(freeze_layers=2, gradient_checkpointing=True)
    with (
        lighter(model, settings, on_processor=True),
        states_given(model, settings, {"logits"}, batch()) as given,
    ):
        assert given is not None
        model(**batch()).logits.sum().backward()
    learnt = {name for name, value in model.named_parameters() if value.grad is not None}
    assert {name.split(".")[3] for name in learnt if "encoder.layer" in name} == {"2", "3"}
    assert not model.bert.embeddings(input_ids=batch()["input_ids"]).requires_grad


def test_no_layer_is_left_out_while_a_student_learns():
    """LayerDrop would give the layers above what an earlier one was given, and objectives nothing to read."""
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = BartConfig(
        d_model=16, encoder_layers=3, decoder_layers=1, vocab_size=50, max_position_embeddings=16,
        encoder_layerdrop=0.9, decoder_layerdrop=0.9, **sizes,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).train()
    ran = []
    for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
        layer.register_forward_hook(lambda *_: ran.append(1))
    with lighter(model, TrainingRecipe(), on_processor=True):
        model(input_ids=batch()["input_ids"], decoder_input_ids=batch()["input_ids"])
    assert len(ran) == 4
    assert (model.model.encoder.layerdrop, model.model.decoder.layerdrop) == (0.9, 0.9)


def test_a_family_without_an_entry_runs_its_layers():
    """Longformer pads a text to whole windows inside, and gives its states without them."""
    config = LongformerConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        attention_window=8, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = LongformerForSequenceClassification(config)
    with frozen(model, 1), states_given(model, TrainingRecipe(freeze_layers=1), {"logits"}, batch(11)) as given:
        assert given is None


READ = {"logits", "hidden.0", "hidden.1", "hidden.3"}


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"albert", "albert two groups"}))
@pytest.mark.parametrize("layers", [1, 2])
def test_given_states_pass_through_and_nothing_else_changes(family, layers):
    """Where layers share what learns, or hand on more than their states, they are left to run."""
    student, rows = build(family), batch_for(family)
    taps = READ - {"logits"} if family == "t5" else READ
    first = find_encoder(student).layers[0]
    ran: list[torch.nn.Module] = []
    for part in first.children():
        part.register_forward_hook(lambda part, *_: ran.append(part))
    with (
        frozen(student, layers),
        states_given(student, TrainingRecipe(freeze_layers=layers), taps, rows) as given,
    ):
        shared = family in ("mpnet", "t5") or family.startswith("deberta")
        assert (given is None) == shared
        if given is None:
            return
        tapped = TappedModel(student, sorted(taps))
        computed, found = tapped(rows), []
        with torch.no_grad():
            teacher = TappedModel(student, sorted(given.taps))(rows)
        for said in ({}, teacher):
            ran.clear()
            with given.given(said):
                features = tapped(rows)
            assert bool(ran) == (not said)
            torch.stack([value.square().mean() for value in features.values()]).sum().backward()
            found.append({name: value.grad for name, value in student.named_parameters() if value.grad is not None})
            student.zero_grad()
            for tap in taps:
                torch.testing.assert_close(features[tap], computed[tap])
        assert found[0].keys() == found[1].keys()
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value)
    assert "forward" not in vars(first)


def test_what_stands_for_frozen_layers():
    two = TrainingRecipe(freeze_layers=2)
    assert states_read(two, {"logits"}) == {"hidden.2"}
    assert states_read(two, {"logits", "hidden.0", "hidden.1", "hidden.3"}) == {"hidden.1", "hidden.2"}
    assert states_read(two, {"scores.3", "query.3"}) == {"hidden.2"}
    assert states_read(two, {"scores.2"}) == frozenset()  # it is computed inside a frozen layer
    assert states_read(TrainingRecipe(), {"logits"}) == frozenset()
    assert states_read(two.model_copy(update={"compile": True}), {"logits"}) == frozenset()
    assert states_read(two.model_copy(update={"sharding": "fsdp"}), {"logits"}) == frozenset()


def test_a_student_that_reads_states_still_answers_new_texts():
    """Within the block it is measured on rows that its teacher was never asked about."""
    student, rows = bert(dropout=0.0), batch()
    before = copy.deepcopy(student)(**rows).logits
    with frozen(student, 2), states_given(student, TrainingRecipe(freeze_layers=2), {"logits"}, rows) as given:
        with given.given({"hidden.2": torch.zeros(3, 9, 32)}):
            assert not torch.allclose(student(**rows).logits, before)
        torch.testing.assert_close(student(**rows).logits, before)


def test_a_run_reads_states_from_its_cache_and_ends_where_one_that_computes_them_ends(
    quiet_teacher, intents_folder, tmp_path, monkeypatch
):
    def trained(name, **cache):
        recipe = Recipe.parse(
            {
                "task": "text-classification",
                "output": str(tmp_path / name),
                "teacher": {"checkpoint": str(quiet_teacher)},
                "student": {"layers": 2, "inherit_layers": "first"},
                "data": {
                    **{split: str(intents_folder / f"{split}.csv") for split in ("train", "validation", "test")},
                    "max_length": 48,
                },
                "objective": {"preset": "logits"},
                "training": {"epochs": 2, "precision": "fp32", "freeze_layers": 1, "baseline": False},
                "cache": cache,
            }
        )
        run_stages(recipe, until="train")
        model = BertForSequenceClassification.from_pretrained(recipe.folder / "student")
        taps = read_json(recipe.folder / "work/cache/index.json")["taps"]
        return model, taps, read_json(recipe.folder / "work/state/train.json")["facts"]["curve"]

    student, taps, curve = trained("read")
    assert taps == ["hidden.1", "logits"]
    again, taps, limited = trained("limited", max_bytes=100_000)  # logits fit, states are not kept for their own sake
    assert taps == ["logits"]
    monkeypatch.setattr(frozen_module, "states_read", lambda *_: frozenset())
    computed, taps, plain = trained("computed")
    assert taps == ["logits"]
    taught = BertForSequenceClassification.from_pretrained(quiet_teacher).state_dict()
    for one, other in ((student, curve), (again, limited)):
        state = one.state_dict()
        for name, value in computed.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=2e-4)  # the cache holds fp16
        losses = [[point["loss"] for point in points if "loss" in point] for points in (other, plain)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        weight = "bert.encoder.layer.{}.output.dense.weight"
        assert [torch.equal(state[weight.format(layer)], taught[weight.format(layer)]) for layer in (0, 1)] == [
            True,
            False,
        ]
