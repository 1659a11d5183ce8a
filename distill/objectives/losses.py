"""The listed losses. A new one enters here, and the property tests run on it."""

from __future__ import annotations

from distill.objectives.attention import (
    attention_ce,
    attention_kl,
    attention_mse,
    head_relation,
    relation,
    sample_relation,
)
from distill.objectives.base import Loss, Unit
from distill.objectives.dual import pair_labels, pair_mse, similarity_kl
from distill.objectives.embedding import embedding
from distill.objectives.generation import jsd, reverse_kl, total_variation
from distill.objectives.grams import fsp, mmd, nst
from distill.objectives.hidden import feature_map, hidden_cosine, hidden_mse, pkd
from distill.objectives.relational import (
    candidates_kl,
    contrastive,
    dist,
    margin_mse,
    pairwise_cosine,
    pkt,
    rkd_angle,
    rkd_distance,
    spkd,
)
from distill.objectives.soft_labels import (
    hard_labels,
    multilabel_labels,
    regression,
    regression_labels,
    soft_labels,
    soft_labels_multilabel,
    soft_spans,
    span_labels,
)

_SOFT = {"temperature": 4.0, "standardise": False, "shift": False, "convention": "distill"}
_RELATION = {"relation_heads": 0, "convention": "distill"}
_SCORES = {"heads": "each", "causal": False}
_STATISTICS = {"means": 0.0, "variances": 0.0}
_POOLED = {"pooling": "mean"}
_SPANS = {"temperature": 4.0, "convention": "distill"}
_MARGIN = {"pooling": "mean", "metric": "cosine"}
_DIST = {"temperature": 1.0, "inter": 1.0, "intra": 1.0}
_CONTRASTIVE = {"temperature": 0.1, "pooling": "mean", "targets": "soft"}
_EMBEDDING = {"pooling": "mean", "metric": "cosine"}
_JSD = {"temperature": 1.0, "mix": 0.5}
_COSINES = {"temperature": 0.05}
_ONE = {"temperature": 1.0}

_MASK = ("mask",)
_SCORED = ("scored",)

_ON_LOGITS = (
    Loss(
        "soft_labels",
        soft_labels,
        "logits",
        Unit.SCORED,
        ("scored", "labels"),
        _SOFT,
        classes=True,
        source="1503.02531",
    ),
    Loss("hard_labels", hard_labels, "", Unit.LABELLED, ("labels", "scored"), classes=True),
    Loss("soft_labels_multilabel", soft_labels_multilabel, "logits", Unit.SCORED, _SCORED, _ONE),
    Loss("regression", regression, "logits", Unit.SCORED, _SCORED),
    Loss("regression_labels", regression_labels, "", Unit.LABELLED, ("labels", "scored")),
    Loss("multilabel_labels", multilabel_labels, "", Unit.LABELLED, ("labels", "scored")),
    Loss("soft_spans", soft_spans, "logits", Unit.SCORED, ("scored", "inside"), _SPANS, source="1503.02531"),
    Loss("span_labels", span_labels, "", Unit.LABELLED, ("labels", "scored", "inside")),
    Loss("jsd", jsd, "logits", Unit.SCORED, _SCORED, _JSD, classes=True, source="2306.13649"),
    Loss("reverse_kl", reverse_kl, "logits", Unit.SCORED, _SCORED, _ONE, classes=True, source="2306.08543"),
    Loss("total_variation", total_variation, "logits", Unit.SCORED, _SCORED, _ONE, classes=True, source="2307.15190"),
    Loss("dist", dist, "logits", Unit.BATCHES, _SCORED, _DIST, in_batch=True, classes=True, source="2205.10536"),
)

_ON_HIDDEN_STATES = (
    Loss("hidden_mse", hidden_mse, "hidden", Unit.TOKENS, _MASK, {"convention": "distill"}, True, source="1909.10351"),
    Loss("hidden_cosine", hidden_cosine, "hidden", Unit.TOKENS, _MASK, projects=True, source="1910.01108"),
    Loss("pkd", pkd, "hidden", Unit.EXAMPLES, _MASK, projects=True, source="1908.09355"),
    Loss("feature_map", feature_map, "hidden", Unit.TOKENS, _MASK, _STATISTICS, True, source="2004.02984"),
    Loss("embedding", embedding, "hidden", Unit.EXAMPLES, _MASK, _EMBEDDING, True, source="sentence-transformers"),
    Loss("nst", nst, "hidden", Unit.TOKEN_PAIRS, _MASK, source="1707.01219"),
    Loss("mmd", mmd, "hidden", Unit.TOKEN_PAIRS, _MASK, layers_per_item=2, source="1707.01219"),
    Loss("fsp", fsp, "hidden", Unit.EXAMPLES, _MASK, projects=True, layers_per_item=2, source="CVPR 2017"),
)

_ON_ATTENTION = (
    Loss(
        "attention_mse", attention_mse, "scores", Unit.TOKENS, _MASK, {**_SCORES, "convention": "distill"},
        source="1909.10351",
    ),
    Loss("attention_kl", attention_kl, "scores", Unit.TOKENS, _MASK, _SCORES, source="2002.10957"),
    Loss(
        "attention_ce", attention_ce, "scores", Unit.TOKENS, _MASK, {**_SCORES, "convention": "distill"},
        source="2004.02984",
    ),
    *(
        Loss(f"{kind}_relation", relation, kind, Unit.TOKENS, _MASK, _RELATION, source="2012.15828")
        for kind in ("query", "key", "value")
    ),
    *(
        Loss(f"{kind}_head_relation", head_relation, kind, Unit.TOKENS, _MASK, _RELATION, source="PP-MiniLM")
        for kind in ("query", "key", "value")
    ),
)  # fmt: skip

_ON_BATCHES = (
    *(
        Loss(f"{kind}_sample_relation", sample_relation, kind, Unit.TOKENS, _MASK, _RELATION, in_batch=True,
             source="PP-MiniLM")
        for kind in ("query", "key", "value")
    ),
    Loss("rkd_distance", rkd_distance, "hidden", Unit.BATCHES, _MASK, _POOLED, in_batch=True, source="1904.05068"),
    Loss("rkd_angle", rkd_angle, "hidden", Unit.BATCHES, _MASK, _POOLED, in_batch=True, source="1904.05068"),
    Loss("spkd", spkd, "hidden", Unit.BATCHES, _MASK, _POOLED, in_batch=True, source="1907.09682"),
    Loss("margin_mse", margin_mse, "hidden", Unit.BATCHES, _MASK, _MARGIN, in_batch=True, source="2010.02666"),
    Loss("pkt", pkt, "hidden", Unit.BATCHES, _MASK, _POOLED, in_batch=True, source="1803.10837"),
    Loss(
        "candidates_kl", candidates_kl, "hidden", Unit.BATCHES, _MASK, {"temperature": 1.0, **_MARGIN}, in_batch=True,
        source="sentence-transformers",
    ),
    Loss("pairwise_cosine", pairwise_cosine, "hidden", Unit.BATCHES, _MASK, _POOLED, in_batch=True, source="SetFit"),
    Loss(
        "contrastive", contrastive, "hidden", Unit.BATCHES, _MASK, _CONTRASTIVE, projects=True, in_batch=True,
        remembers=True,
        source="2101.04731",
    ),
)  # fmt: skip

_ON_PAIRS = (
    Loss(
        "similarity_kl", similarity_kl, "logits", Unit.BATCHES, _SCORED, _COSINES, in_batch=True, paired=True,
        source="2307.12732",
    ),
    Loss("pair_mse", pair_mse, "logits", Unit.SCORED, _SCORED, paired=True, source="2307.12732"),
    Loss(
        "pair_labels", pair_labels, "", Unit.BATCHES, ("labels", "scored"), _COSINES, in_batch=True, paired=True,
        source="2103.00020",
    ),
)  # fmt: skip

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (*_ON_LOGITS, *_ON_HIDDEN_STATES, *_ON_ATTENTION, *_ON_BATCHES, *_ON_PAIRS)
}
