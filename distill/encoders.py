"""Where an encoder keeps what distillation reads: its layers, their queries, keys and values, and its shape.

One row of `FAMILIES` is all that a family of models needs. A model of another family still gives its logits and hidden
states, as long as its layers stand in one list.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from distill.errors import ObjectiveError

Score = Literal["dot", "bias", "rotary", "disentangled"]
"""How a family computes its scores: q k^T alone, plus a position bias, after a rotation, or as DeBERTa does."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a model, as far as objectives and layer maps depend on it.

    Attributes:
        family: transformers' `model_type`.
        layers: Transformer layers N; `hidden.0` to `hidden.N` exist.
        width: H, the last dimension of `hidden.k`.
        heads: A, attention heads in a layer.
        labels: C, the last dimension of `logits`.
        vocab: Rows of the word embedding; 0 for images.
        positions: Tokens that learnt positions reach; None where positions are computed.
        attention_width: The last dimension of `query.k`, all heads together; equal to the width in most families.
        paired: It has two encoders, and for `logits` the vectors of a text and of an image, side by side.
        causal: Its tokens see none that come later.
    """

    family: str
    layers: int
    width: int
    heads: int
    labels: int
    vocab: int
    positions: int | None = None
    attention_width: int = 0
    paired: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if not self.attention_width:
            object.__setattr__(self, "attention_width", self.width)


@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts are, as module paths.

    Attributes:
        layers: List of layers, seen from the encoder.
        attention: Self-attention, seen from a layer.
        queries: Query, key and value products, seen from the attention; a single name for one fused product.
        encoder: The encoder, seen from the base model. Its output is `hidden.N`.
        score: How the scores come about.
        mask: What the attention calls the mask it is given.
        normed_end: `hidden.N` is the encoder's output, after a closing norm if there is one, as in transformers'
            `hidden_states[-1]`; False where that is the last layer's own output.
        causal: As in `Architecture`.
    """

    layers: str
    attention: str
    queries: tuple[str, ...]
    encoder: str = ""
    score: Score = "dot"
    mask: str = "attention_mask"
    normed_end: bool = True
    causal: bool = False


_BART = Family("layers", "self_attn", ("q_proj", "k_proj", "v_proj"), encoder="encoder")
_BERT = Family("encoder.layer", "attention.self", ("query", "key", "value"))

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "mobilebert": _BERT,
    "distilbert": Family("transformer.layer", "attention", ("q_lin", "k_lin", "v_lin")),
    "albert": Family("encoder.albert_layer_groups", "attention", ("query", "key", "value")),
    "mpnet": Family("encoder.layer", "attention.attn", ("q", "k", "v"), score="bias"),
    "deberta-v2": Family(
        "encoder.layer", "attention.self", ("query_proj", "key_proj", "value_proj"), score="disentangled"
    ),
    "modernbert": Family("layers", "attn", ("Wqkv",), score="rotary"),
    "gpt2": Family("h", "attn", ("c_attn",), causal=True),
    "t5": Family("block", "layer.0.SelfAttention", ("q", "k", "v"), encoder="encoder", score="bias", mask="mask"),
    "bart": _BART,
    "mbart": _BART,
    "marian": _BART,
    "pegasus": _BART,
    "m2m_100": _BART,
    "clip": Family("encoder.layers", "self_attn", ("q_proj", "k_proj", "v_proj"), encoder="text_model", causal=True),
    "vit": Family("layers", "attention", ("q_proj", "k_proj", "v_proj"), normed_end=False),
}
"""By transformers' `model_type`."""


@dataclass(frozen=True)
class Encoder:
    """The parts of one model.

    Attributes:
        model: The model with its head.
        root: The module whose output is the last hidden state.
        layers: In the order they run; ALBERT's shared layer stands in it once for each time it runs.
        family: None for a family that is not listed: only logits and hidden states can be tapped.
    """

    model: Any
    root: nn.Module
    layers: list[nn.Module] = field(repr=False)
    family: Family | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of taps that exist for every layer."""
        return ("hidden", "query", "key", "value", "scores", "attention") if self.family else ("hidden",)

    def attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention of a layer."""
        if self.family is None:
            raise AttributeError(f"{self.model.config.model_type} has no known attention")
        return layer.get_submodule(self.family.attention)


def find_encoder(model: Any) -> Encoder:
    """Finds the layers of a transformers model.

    Raises:
        ObjectiveError: Its layers do not stand in one list.
    """
    if is_captioner(model.config):
        return replace(find_encoder(model.encoder), model=model)
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return Encoder(model, model.base_model, _only_stack(model), None)
    root = model.base_model.get_submodule(family.encoder)
    layers = list(root.get_submodule(family.layers))
    if model.config.model_type == "albert":
        layers = _albert_order(layers, model.config)
    return Encoder(model, root, layers, family)


def describe(model: Any) -> Architecture:
    """The shape of a transformers model.

    Raises:
        ObjectiveError: Its layers do not stand in one list.
    """
    encoder, config = find_encoder(model), own_config(model.config)
    width, paired = int(config.hidden_size), hasattr(model.config, "text_config")
    return Architecture(
        family=str(model.config.model_type),
        layers=len(encoder.layers),
        width=width,
        heads=int(config.num_attention_heads),
        labels=2 * int(model.config.projection_dim) if paired else int(config.num_labels),
        vocab=int(getattr(config, "vocab_size", 0) or 0),
        positions=_positions(config),
        attention_width=_attention_width(encoder, width),
        paired=paired,
        causal=encoder.family is not None and encoder.family.causal,
    )


def token_embedding(model: Any) -> Any:
    """The module that embeds what is read; of two encoders the text's."""
    return getattr(model, "text_model", model).get_input_embeddings()


def own_config(config: Any) -> Any:
    """The part of a config that speaks of the encoder that is tapped: of CLIP's two, the text's."""
    return config.encoder if is_captioner(config) else getattr(config, "text_config", config)


def written_config(config: Any) -> Any:
    """The part of a config that speaks of texts: of a captioner its decoder's."""
    return config.decoder if is_captioner(config) else getattr(config, "text_config", config)


def is_captioner(config: Any) -> bool:
    """An image encoder with a decoder behind it, each with a config of its own."""
    return str(config.model_type) == "vision-encoder-decoder"


def _albert_order(groups: list[nn.Module], config: Any) -> list[nn.Module]:
    """Layers as they run: each of N rounds goes through one group, as AlbertTransformer.forward chooses it."""
    rounds = int(config.num_hidden_layers)
    chosen = [groups[int(turn / (rounds / len(groups)))] for turn in range(rounds)]
    return [layer for group in chosen for layer in group.get_submodule("albert_layers").children()]


def _only_stack(model: Any) -> list[nn.Module]:
    """The layers of a model of an unlisted family: the one list that is as long as its config says."""
    depth = int(getattr(model.config, "num_hidden_layers", 0))
    stacks = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(stacks) != 1:
        raise ObjectiveError(
            f"the layers of a {model.config.model_type!r} model cannot be told: {len(stacks)} lists of {depth} modules",
            where="objective",
            fix=f"Known families: {', '.join(FAMILIES)}.",
        )
    return list(stacks[0])


def _attention_width(encoder: Encoder, width: int) -> int:
    """All heads together: heads * d_kv in T5, the width nearly everywhere else."""
    if encoder.family is None:
        return width
    product = encoder.attention(encoder.layers[0]).get_submodule(encoder.family.queries[0])
    rows = int(getattr(product, "out_features", 0) or getattr(product, "nf", 0))  # nf: GPT-2's Conv1D
    return rows // 3 if len(encoder.family.queries) == 1 else rows


def _positions(config: Any) -> int | None:
    """Rows of the position table that texts reach; RoBERTa and its kin count from `padding_idx + 1`."""
    rows = getattr(config, "max_position_embeddings", None)
    if rows is None or rows <= 0 or config.model_type in ("t5", "modernbert"):
        return None
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return int(rows) - int(offset)
