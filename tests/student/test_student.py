"""Students: the exact shape a card asks for, starting from what the teacher knows, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from distill.cards import Inherits, StudentCard, list_cards, load_student_card
from distill.errors import StudentError
from distill.export.graph import export_graph
from distill.export.quantize import quantize_dynamic_int8
from distill.student.build import build_student, plan_student
from distill.student.inheritance import inherit
from distill.student.parts import layer_stack, part_of
from distill.student.shape import choose_layers, depth, reference_config, shape_config
from distill.student.size import measure
from distill.tasks import TASKS

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
DISTILBERT = {"vocab_size": 60, "dim": 16, "n_layers": 4, "n_heads": 4, "hidden_dim": 32, "max_position_embeddings": 24}
DEBERTA = SHAPE | {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "pooler_hidden_size": 16,
}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_inner": 32, "n_positions": 24, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "xlm-roberta": SHAPE,
    "distilbert": DISTILBERT,
    "electra": SHAPE | {"embedding_size": 8},  # a factorised embedding
    "mpnet": SHAPE | {"pad_token_id": 1},
    "deberta-v2": DEBERTA,
    "modernbert": SHAPE | SPECIALS | {"global_attn_every_n_layers": 3, "local_attention": 8},
    "albert": SHAPE | {"embedding_size": 8},  # every layer shares one set of weights
    "gpt2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
}


def tiny(family: str, auto: Any = AutoModelForSequenceClassification, **changes: Any) -> PreTrainedModel:
    """A four-layer teacher whose every parameter is random, norms and biases too."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Two rows of nine tokens, the second padded."""
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch())[0]


def card(**values: Any) -> StudentCard:
    return StudentCard(**({"name": "mine", "description": "for a test", "layers": 2} | values))


@pytest.mark.parametrize("name", list_cards("student"))
def test_every_card_has_the_size_it_declares(name):
    declared = load_student_card(name).declared
    assert declared is not None
    plan = plan_student(reference_config(declared.teacher), load_student_card(name))
    assert plan.size.parameters == declared.parameters
    assert plan.size.int8_bytes == declared.int8_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_as_deep_as_its_teacher_answers_the_same(family):
    teacher = tiny(family)
    student = build_student(teacher, card(layers=4))
    assert student.fresh == ()
    assert student.remarks == ()
    assert torch.equal(logits(student.model), logits(teacher))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
def test_half_the_layers_are_the_even_ones_of_the_teacher(family):
    teacher = tiny(family)
    student = build_student(teacher, card(layers=2))
    assert student.layer_map == [(1, 1), (2, 4)]
    stack = layer_stack(student.model)
    theirs, mine = dict(teacher.named_parameters()), dict(student.model.named_parameters())
    moved = [name for name in mine if name.startswith(f"{stack}.1.")]
    assert moved
    for name in moved:
        assert torch.equal(mine[name], theirs[name.replace(f"{stack}.1.", f"{stack}.3.", 1)])
    assert student.fresh == ()
    assert depth(student.model.config) == 2
    assert torch.isfinite(logits(student.model)).all()


def test_albert_gives_its_one_shared_layer_at_any_depth():
    student = build_student(tiny("albert"), card(layers=2))
    assert student.fresh == ()
    assert student.model.config.num_hidden_layers == 2
    assert student.parameters == measure(tiny("albert")).parameters


def test_modernbert_layers_keep_their_kind_of_attention():
    teacher = tiny("modernbert")
    student = build_student(teacher, card(layers=3, inherits=Inherits(layers=[1, 3, 4])))
    kinds = teacher.config.layer_types
    assert student.model.config.layer_types == [kinds[0], kinds[2], kinds[3]]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_distilbert_inherits_all_of_a_first_sentence_from_another_family(family):
    """Segment vectors and RoBERTa's shifted positions would silently be lost otherwise."""
    teacher = tiny(family, **({"embedding_size": 16} if family == "electra" else {"layer_norm_eps": 1e-12}))
    student = build_student(teacher, card(layers=4, family="distilbert"))
    with torch.no_grad():
        theirs = teacher.base_model(**batch())[0]
        mine = student.model.eval().base_model(**batch())[0]
    seen = batch()["attention_mask"].bool()
    torch.testing.assert_close(mine[seen], theirs[seen])
    assert student.fresh == ()
    assert logits(student.model).shape == (2, 2)


def test_distilbert_takes_a_tagger_whole():
    teacher = tiny("bert", AutoModelForTokenClassification, layer_norm_eps=1e-12)
    student = build_student(teacher, card(layers=4, family="distilbert"))
    assert type(student.model).__name__ == "DistilBertForTokenClassification"
    seen = batch()["attention_mask"].bool()
    torch.testing.assert_close(logits(student.model)[seen], logits(teacher)[seen])


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForQuestionAnswering, AutoModelForMaskedLM])
def test_any_head_comes_along(auto):
    teacher = tiny("bert", auto)
    student = build_student(teacher, card(layers=4))
    assert type(student.model) is type(teacher)
    assert student.fresh == ()
    assert torch.equal(logits(student.model), logits(teacher))


def test_a_tied_output_stays_tied():
    student = build_student(tiny("bert", AutoModelForMaskedLM), card()).model
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_labels_in_another_order_take_their_own_rows():
    teacher = tiny("bert", id2label={0: "bad", 1: "fine", 2: "good"}, label2id={"bad": 0, "fine": 1, "good": 2})
    student = build_student(teacher, card(layers=4), labels=["good", "bad", "fine"])
    assert torch.equal(logits(student.model), logits(teacher)[:, [2, 0, 1]])
    assert student.model.config.label2id == {"good": 0, "bad": 1, "fine": 2}


def test_another_number_of_labels_starts_the_classifier_anew_and_says_so():
    student = build_student(tiny("bert"), card(layers=4), labels=["a", "b", "c"])
    assert student.fresh == ("classifier.weight", "classifier.bias")
    assert student.remarks == ("random start: head (classifier)",)
    assert logits(student.model).shape == (2, 3)


def test_one_seed_gives_one_student_and_leaves_the_global_generator_alone():
    teacher = tiny("bert")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    narrow = card(hidden_size=8, attention_heads=2)
    first, again = build_student(teacher, narrow, seed=1), build_student(teacher, narrow, seed=1)
    other = build_student(teacher, narrow, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(first.model), logits(again.model))
    assert not torch.equal(logits(first.model), logits(other.model))
    assert first.inherited == ()
    assert [line.split(" (")[0] for line in first.remarks] == [
        "random start: embeddings",
        "random start: layers",
        "random start: head",
    ]


def test_random_init_inherits_nothing_and_parts_can_be_chosen():
    teacher = tiny("bert")
    assert build_student(teacher, card(), init="random").inherited == ()
    some = build_student(teacher, card(inherits=Inherits(parts=["embeddings"])))
    assert {part_of(some.model, name) for name in some.inherited} == {"embeddings"}
    assert {part_of(some.model, name) for name in some.fresh} == {"layers", "head"}


def test_the_teacher_is_left_as_it_was():
    teacher = tiny("bert")
    before = {name: values.clone() for name, values in teacher.state_dict().items()}
    config = teacher.config.to_dict()
    student = build_student(teacher, card(layers=4), labels=["x", "y"])
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], values) for name, values in teacher.state_dict().items())
    assert teacher.config.to_dict() == config


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "deberta-v2", "gpt2", "albert"])
def test_a_thinner_feed_forward_keeps_the_neurons_that_matter(family):
    """With half of the neurons dead in the teacher, the half that is kept must answer exactly as the whole."""
    teacher = tiny(family)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            axis = next((axis for axis, size in enumerate(parameter.shape) if size in (32, 64)), None)
            if axis is not None and part_of(teacher, name) == "layers":
                blocks = parameter.movedim(axis, 0).view(-1, 32, *parameter.movedim(axis, 0).shape[1:])
                blocks[:, 1::2] = 0
    student = build_student(teacher, card(layers=4, intermediate_size="teacher/2"))
    assert student.fresh == ()
    assert "feed-forward cut to the 16 strongest neurons of each layer" in student.remarks
    torch.testing.assert_close(logits(student.model), logits(teacher))


def test_regrouped_heads_and_another_activation_are_said_aloud():
    student = build_student(tiny("bert"), card(head_size=8, activation="relu"))
    assert student.model.config.num_attention_heads == 2
    assert student.model.config.hidden_act == "relu"
    assert student.remarks == (
        "4 heads of the teacher regrouped into 2",
        "activation relu in place of the teacher's gelu",
    )


def test_a_teacher_without_attention_is_refused():
    with pytest.raises(StudentError, match=r"a 'fnet' model has no attention heads"):
        shape_config(AutoConfig.for_model("fnet"), card())


def test_a_window_of_each_layer_is_that_of_the_layer_it_stands_for():
    teacher = AutoConfig.for_model("longformer", **SHAPE, attention_window=[2, 4, 6, 8])
    assert shape_config(teacher, card(layers=2)).attention_window == [2, 8]


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "deberta-v2"])
def test_a_student_drops_what_its_card_says_wherever_its_teacher_drops_some(family):
    def shares(model):
        return {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}

    teacher = tiny(family)
    dropped = {name for name, share in shares(teacher).items() if share}
    assert dropped
    same = shares(build_student(teacher, card()).model)
    assert {same[name] for name in dropped & set(same)} == {shares(teacher)[name] for name in dropped}
    assert not any(shares(build_student(teacher, card(dropout=0.0)).model).values())
    some = shares(build_student(teacher, card(), overrides={"dropout": 0.25}).model)
    assert {share for name, share in some.items() if name in dropped} == {0.25}


@pytest.mark.parametrize(("dropout", "found"), [(None, 0.0), (0.3, 0.3), ("teacher", 0.1), (0.0, 0.0)])
def test_a_bottleneck_drops_nothing_unless_it_is_told_to(dropout, found):
    teacher = AutoConfig.for_model("bert", **SHAPE)
    wanted = card(layers=2, family="mobilebert", bottleneck_size=8, dropout=dropout)
    assert shape_config(teacher, wanted).hidden_dropout_prob == found


def test_overrides_replace_what_the_card_says():
    teacher = tiny("bert")
    student = build_student(
        teacher, card(head_size=8), overrides={"layers": 3, "attention_heads": 8, "activation": None}
    )
    assert (student.model.config.num_hidden_layers, student.model.config.num_attention_heads) == (3, 8)
    with pytest.raises(StudentError, match=r"student: `layers`: .*got 0"):
        build_student(teacher, card(), overrides={"layers": 0})
    listed = card(layers=2, inherits=Inherits(layers=[2, 3]))
    assert build_student(teacher, listed).layer_map == [(1, 2), (2, 3)]
    assert build_student(teacher, listed, overrides={"layers": 3}).layer_map == [(1, 1), (2, 3), (3, 4)]


def test_layer_choices():
    def chosen(layers: int, of: int, choice: Any = "even") -> list[int]:
        return [theirs for _, theirs in choose_layers(card(layers=layers, inherits=Inherits(layers=choice)), of)]

    assert chosen(4, 6) == [1, 3, 4, 6]
    assert chosen(6, 12) == [1, 3, 5, 8, 10, 12]  # DistilBERT's, counted from 1
    assert chosen(1, 12) == [1]
    assert chosen(3, 12, "first") == [1, 2, 3]
    assert chosen(3, 12, "last") == [10, 11, 12]
    assert chosen(2, 12, [4, 9]) == [4, 9]
    with pytest.raises(StudentError, match=r"inherits.layers is \[4, 13\] .* Name 2 layers between 1 and 12\."):
        chosen(2, 12, [4, 13])
    with pytest.raises(StudentError, match=r"inherits.layers is \[4\] for 2 student layers"):
        chosen(2, 12, [4])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"attention_heads": 3}, r"3 attention_heads do not divide hidden_size 16: 1, 2, 4 would do"),
        ({"head_size": 5}, r"head_size 5 does not divide hidden_size 16: 2, 4, 8 would do"),
        ({"layers": 9}, r"layers is 9 but the teacher has 4 to inherit from: set layers to at most 4"),
        ({"activation": "gleu"}, r"activation 'gleu' is unknown to transformers: gelu"),
        ({"family": "mpnet"}, r"family 'mpnet' cannot be made from a 'bert' teacher .* such as layers-6"),
        ({"attention_heads": 3, "layers": 9}, r"layers is 9 .*|3 attention_heads"),
    ],
)
def test_impossible_shapes_are_refused_with_the_fix(values, message):
    with pytest.raises(StudentError, match=message):
        build_student(tiny("bert"), card(**values))


def test_all_problems_of_a_shape_are_told_at_once():
    with pytest.raises(StudentError, match=r"student card 'mine': 3 attention_heads .*; layers is 9 .*; activation"):
        build_student(tiny("bert"), card(attention_heads=3, layers=9, activation="no"))


def test_a_student_deeper_than_its_teacher_is_possible_without_its_layers():
    deep = card(layers=6, inherits=Inherits(parts=["embeddings", "head"]))
    student = build_student(tiny("bert"), deep)
    assert student.model.config.num_hidden_layers == 6
    assert [theirs for _, theirs in student.layer_map] == [1, 2, 2, 3, 3, 4]


def test_a_plan_is_what_gets_built():
    teacher = tiny("electra")
    wanted = card(hidden_size=8, intermediate_size=12)
    plan = plan_student(teacher.config, wanted, labels=["a", "b", "c"])
    student = build_student(teacher, wanted, labels=["a", "b", "c"])
    assert plan.size == student.size
    assert plan.layer_map == student.layer_map
    assert plan.rows() == student.rows()
    assert plan.size.parameters == sum(parameter.numel() for parameter in student.model.parameters())
    assert plan.config.to_diff_dict() == student.model.config.to_diff_dict()


def test_rows_add_up_and_show_the_layer_map():
    rows = build_student(tiny("bert"), card()).rows()
    assert rows[0][1] == "1 from 1, 2 from 4"
    for column in (1, 2, 3):
        numbers = [int(row[column].replace(",", "")) for row in rows[1:]]
        assert sum(numbers[:-1]) == numbers[-1]


def test_int4_saves_what_the_table_of_the_tokens_weighs_less_and_nothing_where_it_is_tied():
    config = AutoConfig.for_model("bert", **SHAPE | {"vocab_size": 99, "hidden_size": 48})
    size = measure(AutoModelForSequenceClassification.from_config(config))
    assert size.int8_bytes - size.int4_bytes == 99 * ((48 + 4) - (24 + 2 * 2))
    assert [part.saved > 0 for part in size.components] == [True, False, False, False]
    tied = measure(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT2 | {"vocab_size": 99})))
    assert tied.int4_bytes == tied.int8_bytes


def test_a_family_without_a_classifier_is_refused():
    with pytest.raises(StudentError, match="the family 'vit' has no sequence classifier"):
        plan_student(AutoConfig.for_model("vit"), card())


def test_the_real_teacher_gives_its_layers(minilm_folder):
    teacher = AutoModelForSequenceClassification.from_pretrained(minilm_folder, num_labels=2)
    student = build_student(teacher, load_student_card("layers-4"))
    assert student.layer_map == [(1, 1), (2, 3), (3, 4), (4, 6)]
    assert student.parameters == 19_165_058
    assert student.fresh == ()


def test_the_real_int8_file_weighs_what_was_expected(minilm_folder, tmp_path):
    teacher = AutoModelForSequenceClassification.from_pretrained(minilm_folder, num_labels=2)
    overrides = {"layers": 2}
    student = build_student(teacher, load_student_card("mobile-4"), overrides=overrides, kept_ids=range(8_000))
    spec = TASKS["text-classification"].graph(("input_ids", "attention_mask", "token_type_ids"))
    export_graph(student.model.eval(), spec, tmp_path / "model.onnx")
    report = quantize_dynamic_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert student.int8_bytes == pytest.approx((tmp_path / "int8.onnx").stat().st_size, rel=0.02)
    small = quantize_dynamic_int8(tmp_path / "model.onnx", tmp_path / "int4.onnx", tables="int4")
    assert student.size.int4_bytes == pytest.approx(small.bytes, rel=0.02)
    assert report.bytes == (tmp_path / "int8.onnx").stat().st_size


def test_inherit_reads_half_precision_teachers():
    teacher = tiny("bert").to(torch.bfloat16)
    student = build_student(teacher, card(layers=4))
    assert {parameter.dtype for parameter in student.model.parameters()} == {torch.float32}
    assert inherit(teacher, student.model, student.layer_map).names == set(student.inherited)


def test_the_config_survives_saving(tmp_path):
    student = build_student(tiny("modernbert"), card(layers=2, intermediate_size=20), labels=["a", "b"])
    student.model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student.model))
    assert isinstance(again.config, PretrainedConfig)


SIZES = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads", "layers")}
SIZES |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "max_position_embeddings": 24}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
TRANSLATORS: dict[str, dict[str, Any]] = {
    "t5": T5 | {"num_layers": 3, "num_decoder_layers": 3},
    "bart": SIZES | {"encoder_layers": 3, "decoder_layers": 3},
    "marian": SIZES | {"encoder_layers": 3, "decoder_layers": 3},
}


def make_translator(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **TRANSLATORS[family], **ids)).eval()


@pytest.mark.parametrize("family", TRANSLATORS)
def test_encoder_and_decoder_are_cut_each_by_itself(family: str) -> None:
    teacher = make_translator(family)
    teacher.generation_config.num_beams = 3
    card = load_student_card("layers-4")
    student = build_student(teacher, card, overrides={"layers": 2, "decoder_layers": 1})
    assert student.layer_map == [(1, 1), (2, 3)]
    assert student.fresh == ()
    theirs, mine = dict(teacher.named_parameters()), dict(student.model.named_parameters())
    encoder = layer_stack(student.model)
    decoder = encoder.replace("encoder", "decoder")
    for origin, name in ((f"{encoder}.2.", f"{encoder}.1."), (f"{decoder}.0.", f"{decoder}.0.")):
        copied = [key for key in mine if key.startswith(name)]
        assert copied
        assert all(torch.equal(mine[key], theirs[key.replace(name, origin, 1)]) for key in copied)
    assert not any(key.startswith(f"{decoder}.1.") for key in mine)
    assert student.model.generation_config.num_beams == 3
    assert build_student(teacher, card, overrides={"layers": 3}).layer_map == [(1, 1), (2, 2), (3, 3)]


def test_a_decoder_has_no_more_layers_than_its_teachers() -> None:
    with pytest.raises(StudentError, match="decoder_layers is 4 but the teacher's decoder has 3"):
        build_student(
            make_translator("t5"), load_student_card("layers-4"), overrides={"layers": 2, "decoder_layers": 4}
        )


@pytest.mark.parametrize("family", TRANSLATORS)
def test_a_student_as_deep_as_its_translator_says_the_same(family: str) -> None:
    teacher = make_translator(family)
    student = build_student(teacher, load_student_card("layers-4"), overrides={"layers": 3}).model.eval()
    given = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 8, 9]])}
    with torch.no_grad():
        assert torch.equal(teacher(**given).logits, student(**given).logits)


WIDE_HEADS = {
    "t5": {"d_model": 16, "d_kv": 4, "num_heads": 3, "num_layers": 4, "d_ff": 32, "vocab_size": 60},  # as mT5's
    "qwen3": {"hidden_size": 16, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60}
    | {"num_hidden_layers": 4, "intermediate_size": 32},
}


@pytest.mark.parametrize("family", WIDE_HEADS)
def test_heads_as_wide_as_the_teachers_come_along(family: str) -> None:
    """Where heads together are not as wide as states, a cut in depth alone copies all."""
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    ids = {"decoder_start_token_id": 0} if family == "t5" else {}
    teacher = auto.from_config(AutoConfig.for_model(family, **WIDE_HEADS[family], **ids))
    student = build_student(teacher, card())
    assert student.fresh == ()
    assert student.model.config.num_attention_heads == teacher.config.num_attention_heads


def test_fewer_heads_share_fewer_keys() -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    teacher = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", **shape, intermediate_size=32, vocab_size=60)
    )
    for changes, wanted in (({"attention_heads": 2}, 2), ({"hidden_size": 24}, 3), ({}, 4)):
        student = build_student(teacher, card(**changes)).model
        assert student.config.num_key_value_heads == wanted
        assert student(input_ids=batch()["input_ids"])[0].shape == (2, 9, 60)


def test_a_norm_without_a_place_is_told() -> None:
    """ModernBERT's first layer has no norm before its attention."""
    teacher = tiny("modernbert")
    told = build_student(teacher, card(inherits=Inherits(layers=[3, 4]))).remarks
    assert "attn_norm of the teacher's layer 3 has no place in the student's layer 1" in told
    assert build_student(teacher, card(inherits=Inherits(layers=[1, 4]))).remarks == ()


def test_a_plan_for_few_pieces_needs_no_padding_row() -> None:
    config = AutoConfig.for_model("qwen2", vocab_size=60, pad_token_id=55, hidden_size=16, num_attention_heads=4)
    plan = plan_student(config, card(), vocabulary=20)
    assert plan.config.vocab_size == 20
