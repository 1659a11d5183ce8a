"""The listed losses. A new one enters here, and the property tests run on it."""

from __future__ import annotations

from distill.objectives.attention import attention_ce, attention_kl, attention_mse, relation
from distill.objectives.base import Loss, Unit
from distill.objectives.hidden import feature_map, hidden_cosine, hidden_mse, pkd
from distill.objectives.soft_labels import hard_labels, regression, soft_labels, soft_labels_multilabel

_SOFT = {"temperature": 4.0, "standardise": False, "convention": "distill"}
_RELATION = {"relation_heads": 0, "convention": "distill"}

_LISTED = (
    Loss("soft_labels", soft_labels, "logits", Unit.SCORED, ("scored",), _SOFT, source="1503.02531"),
    Loss("hard_labels", hard_labels, "", Unit.LABELLED, ("labels", "scored")),
    Loss("soft_labels_multilabel", soft_labels_multilabel, "logits", Unit.SCORED, ("scored",), {"temperature": 1.0}),
    Loss("regression", regression, "logits", Unit.SCORED, ("scored",)),
    Loss(
        "hidden_mse", hidden_mse, "hidden", Unit.TOKENS, ("mask",), {"convention": "distill"}, True, source="1909.10351"
    ),
    Loss("hidden_cosine", hidden_cosine, "hidden", Unit.TOKENS, ("mask",), projects=True, source="1910.01108"),
    Loss("pkd", pkd, "hidden", Unit.EXAMPLES, ("mask",), projects=True, source="1908.09355"),
    Loss("feature_map", feature_map, "hidden", Unit.TOKENS, ("mask",), {"transfer": 0.0}, True, source="2004.02984"),
    Loss(
        "attention_mse", attention_mse, "scores", Unit.TOKENS, ("mask",), {"convention": "distill"}, source="1909.10351"
    ),
    Loss("attention_kl", attention_kl, "scores", Unit.TOKENS, ("mask",), source="2002.10957"),
    Loss("attention_ce", attention_ce, "scores", Unit.TOKENS, ("mask",), source="2004.02984"),
    Loss("query_relation", relation, "query", Unit.TOKENS, ("mask",), _RELATION, source="2012.15828"),
    Loss("key_relation", relation, "key", Unit.TOKENS, ("mask",), _RELATION, source="2012.15828"),
    Loss("value_relation", relation, "value", Unit.TOKENS, ("mask",), _RELATION, source="2012.15828"),
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _LISTED}
