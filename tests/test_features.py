"""Taps against transformers' own hidden states and eager attention, on a tiny model of every family."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from distill.encoders import Architecture, describe
from distill.errors import ObjectiveError
from distill.features import TappedModel, record

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DEBERTA = {**SHAPE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}

CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: t.BertConfig(**SHAPE),
    "roberta": lambda: t.RobertaConfig(**SHAPE),
    "xlm-roberta": lambda: t.XLMRobertaConfig(**SHAPE),
    "electra": lambda: t.ElectraConfig(**SHAPE, embedding_size=16),  # narrower embeddings, projected
    "mobilebert": lambda: t.MobileBertConfig(
        **SHAPE, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16, num_feedforward_networks=2
    ),
    "distilbert": lambda: t.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=40, num_labels=3
    ),
    "mpnet": lambda: t.MPNetConfig(**SHAPE),  # position bias
    # As microsoft/deberta-v3: shared projections for positions; a convolution beside layer 1 as in deberta-v2.
    "deberta-v2": lambda: t.DebertaV2Config(
        **DEBERTA, share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3, position_biased_input=False
    ),
    "deberta-v2 own projections": lambda: t.DebertaV2Config(**DEBERTA),
    "albert": lambda: t.AlbertConfig(**SHAPE, embedding_size=16),  # one layer, run three times
    "albert two groups": lambda: t.AlbertConfig(**{**SHAPE, "num_hidden_layers": 4}, num_hidden_groups=2),
    "modernbert": lambda: t.ModernBertConfig(
        **SHAPE, cls_token_id=2, sep_token_id=3, global_attn_every_n_layers=2, local_attention=4
    ),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=40,
        num_labels=3,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "t5": lambda: t.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        num_labels=3,
        pad_token_id=1,
        eos_token_id=3,
        decoder_start_token_id=1,
    ),
    "vit": lambda: t.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=3,
    ),
}
KINDS = ("query", "key", "value", "scores", "attention")


def build(name: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if attention:
        config._attn_implementation = attention
    if name == "t5":
        return t.T5EncoderModel(config).eval()
    if name == "vit":
        return t.ViTForImageClassification(config).eval()
    return t.AutoModelForSequenceClassification.from_config(config).eval()


def batch_for(name: str) -> dict[str, Tensor]:
    """Two rows of seven positions, the second padded; a column that no model takes beside them."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "scored": torch.ones(2).bool()}
    ids = torch.randint(4, 64, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    ids[1, 5:] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
        "labels": torch.tensor([0, 1]),
        "scored": torch.ones(2, dtype=torch.bool),
        "example": torch.arange(2),
    }


def inputs_for(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    accepted = t.utils.generic.inspect.signature(model.forward).parameters
    return {key: value for key, value in batch.items() if key in accepted and key != "labels"}


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_numbered_as_transformers_numbers_them(name: str) -> None:
    """A tap that is one layer off trains happily towards the wrong target."""
    model, batch = build(name), batch_for(name)
    layers = describe(model).layers
    with torch.no_grad():
        features = TappedModel(model, [f"hidden.{k}" for k in range(layers + 1)])(batch)
        expected = model(**inputs_for(model, batch), output_hidden_states=True).hidden_states
    assert len(expected) == layers + 1
    for k, state in enumerate(expected):
        torch.testing.assert_close(features[f"hidden.{k}"], state, rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_what_the_eager_model_computes(name: str) -> None:
    """Scores with a term missing, the wrong scale or unrotated queries would not give the model's own weights."""
    model, eager, batch = build(name), build(name, "eager"), batch_for(name)
    assert model.config._attn_implementation in ("sdpa", "eager")
    layers = describe(model).layers
    with torch.inference_mode():
        features = TappedModel(model, [f"attention.{k}" for k in range(1, layers + 1)])(batch)
        expected = eager(**inputs_for(eager, batch), output_attentions=True).attentions
    assert len(expected) == layers
    mask = batch.get("attention_mask", torch.ones(2, expected[0].shape[-1]))
    valid = mask.bool()[:, None, :, None]  # padded rows of queries mean nothing, and differ between kernels
    for k, weights in enumerate(expected, start=1):
        torch.testing.assert_close(features[f"attention.{k}"] * valid, weights * valid, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert", "t5"])
def test_attention_without_padding(name: str) -> None:
    """sdpa is then given no mask at all, and GPT-2 still looks back only."""
    model, eager, batch = build(name), build(name, "eager"), batch_for(name)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        weights = TappedModel(model, ["attention.1"])(batch)["attention.1"]
        expected = eager(**inputs_for(eager, batch), output_attentions=True).attentions[0]
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_the_student_through_every_tap(name: str) -> None:
    """In training mode, with dropout. A detached tap would leave its loss without effect."""
    model, batch = build(name).train(), batch_for(name)
    layers = describe(model).layers
    for kind in ("hidden", *KINDS):
        model.zero_grad()
        torch.manual_seed(0)
        feature = TappedModel(model, [f"{kind}.{layers}"])(batch)[f"{kind}.{layers}"]
        assert torch.isfinite(feature).all()
        (feature * torch.randn_like(feature)).sum().backward()
        embedding = next(model.base_model.parameters())
        assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0, kind
        assert embedding.grad is not None, kind


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name: str) -> None:
    model, batch = build(name), batch_for(name)
    shape = describe(model)
    features = TappedModel(model, [f"{kind}.1" for kind in KINDS])(batch)
    length = 17 if name == "vit" else 7
    for kind in ("query", "key", "value"):
        assert features[f"{kind}.1"].shape == (2, length, shape.attention_width)
    for kind in ("scores", "attention"):
        assert features[f"{kind}.1"].shape == (2, shape.heads, length, length)
        assert features[f"{kind}.1"].dtype == torch.float32


def test_logits_and_nothing_but_what_is_asked() -> None:
    model, batch = build("bert"), batch_for("bert")
    features = TappedModel(model, ["logits", "query.2"])(batch)
    assert list(features) == ["logits", "query.2"]
    torch.testing.assert_close(features["logits"], model(**inputs_for(model, batch)).logits)


def test_queries_are_the_output_of_the_models_own_products() -> None:
    """A fused product split in the wrong order would swap queries and values."""
    batch = batch_for("gpt2")
    model = build("gpt2")
    entering, values = {}, {}
    model.transformer.h[1].attn.register_forward_pre_hook(
        lambda module, args, kwargs: entering.update(x=kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    features = TappedModel(model, ["query.2", "key.2", "value.2"])(batch)
    values = dict(
        zip(("query", "key", "value"), model.transformer.h[1].attn.c_attn(entering["x"]).split(32, 2), strict=True)
    )
    for kind, value in values.items():
        torch.testing.assert_close(features[f"{kind}.2"], value)


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "modernbert"])
def test_bf16_autocast(name: str) -> None:
    model, batch = build(name), batch_for(name)
    taps = ["logits", "hidden.0", "hidden.3", "query.1", "scores.3", "attention.3"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = TappedModel(model, taps)(batch)
    with torch.no_grad():
        full = TappedModel(model, taps)(batch)
    for tap in taps:
        torch.testing.assert_close(low[tap].float(), full[tap], rtol=0.05, atol=0.05)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """The recomputation runs every hook a second time, when nothing must be recorded."""
    batch, gradients = batch_for("bert"), []
    for checkpointing in (False, True):
        model = build("bert").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        features = TappedModel(model, ["hidden.1", "scores.2", "hidden.3"])(batch)
        sum(value.square().sum() for value in features.values()).backward()
        gradients.append(model.bert.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_torch_compile_takes_the_hooks_along() -> None:
    """Dynamo may leave out hooks that come after compilation; these are there before."""
    model, batch = build("bert"), batch_for("bert")
    tapped = TappedModel(model, ["logits", "hidden.1", "scores.3"])
    compiled = torch.compile(lambda rows: tapped(rows), backend="eager")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for tap, value in compiled(batch).items():
            torch.testing.assert_close(value, tapped(batch)[tap])


def hooks(model: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_hooks_go_when_closed_or_collected() -> None:
    """Hooks left behind would slow the student down and end up in what is exported."""
    model = build("bert")
    tapped = TappedModel(model, ["hidden.1", "scores.2", "hidden.3"])
    assert hooks(model) > 0
    tapped.close()
    assert hooks(model) == 0
    tapped = TappedModel(model, ["value.2"])
    del tapped
    gc.collect()
    assert hooks(model) == 0
    with record(model, ["attention.1"]) as inside:
        assert inside(batch_for("bert"))["attention.1"].shape == (2, 4, 7, 7)
    assert hooks(model) == 0


def test_two_taps_on_one_model_and_a_copy_of_it_stay_apart() -> None:
    model, batch = build("bert"), batch_for("bert")
    first, second = TappedModel(model, ["hidden.1"]), TappedModel(model, ["hidden.2"])
    twin = copy.deepcopy(model)
    before = first(batch)
    twin(**inputs_for(twin, batch))
    assert list(before) == ["hidden.1"]
    assert list(second(batch)) == ["hidden.2"]
    assert first._notes.kept is None


def test_a_copied_tap_reads_its_own_model() -> None:
    """As a callback that keeps an averaged copy of the trained module would make it."""
    model, batch = build("bert"), batch_for("bert")
    tapped = TappedModel(model, ["hidden.2"])
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        twin.model.bert.embeddings.word_embeddings.weight.mul_(2.0)
        assert not torch.allclose(twin(batch)["hidden.2"], tapped(batch)["hidden.2"])


def test_a_failing_forward_leaves_nothing_recorded() -> None:
    model = build("bert")
    tapped = TappedModel(model, ["hidden.1"])
    with pytest.raises(IndexError):
        tapped({"input_ids": torch.full((1, 3), 999)})
    assert tapped._notes.kept is None


@pytest.mark.parametrize(
    ("tap", "said"),
    [
        ("hidden.4", r"hidden\.4\. It has logits, hidden\.0 to hidden\.3, query\.1 to query\.3"),
        ("query.0", r"query\.0"),
        ("scores.x", r"scores\.x"),
        ("pooled", r"pooled"),
        ("hidden", r"hidden\."),
    ],
)
def test_a_tap_that_does_not_exist_is_named_with_those_that_do(tap: str, said: str) -> None:
    with pytest.raises(ObjectiveError, match=said):
        TappedModel(build("bert"), ["logits", tap])


def test_a_model_without_a_head_has_no_logits() -> None:
    with pytest.raises(ObjectiveError, match=r"T5EncoderModel returns no logits. Load it with its head"):
        TappedModel(build("t5"), ["logits"])(batch_for("t5"))


def test_an_unlisted_family_gives_hidden_states_and_says_what_it_cannot() -> None:
    torch.manual_seed(0)
    model = t.AutoModelForSequenceClassification.from_config(t.ErnieConfig(**SHAPE)).eval()
    batch = batch_for("ernie")
    features = TappedModel(model, ["hidden.0", "hidden.2", "hidden.3"])(batch)
    expected = model(**inputs_for(model, batch), output_hidden_states=True).hidden_states
    for k in (0, 2, 3):
        torch.testing.assert_close(features[f"hidden.{k}"], expected[k])
    with pytest.raises(ObjectiveError, match=r"ernie model: query\.1\. It has logits, hidden\.0 to hidden\.3\."):
        TappedModel(model, ["query.1"])


def test_describe() -> None:
    assert describe(build("bert")) == Architecture("bert", 3, 32, 4, 3, 64, positions=40)
    assert describe(build("roberta")) == Architecture("roberta", 3, 32, 4, 3, 64, positions=38)
    assert describe(build("distilbert")) == Architecture("distilbert", 3, 32, 4, 3, 64, positions=40)
    assert describe(build("t5")) == Architecture("t5", 3, 32, 4, 3, 64, attention_width=24)
    assert describe(build("gpt2")) == Architecture("gpt2", 3, 32, 4, 3, 64, positions=40, causal=True)
    assert describe(build("modernbert")) == Architecture("modernbert", 3, 32, 4, 3, 64)
    assert describe(build("vit")) == Architecture("vit", 3, 32, 4, 3, 0)
