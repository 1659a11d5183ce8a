"""The student's shape: its config, and the teacher layers it stands for.

Nothing here holds weights: a shape can be asked for or refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from distill.cards import StudentCard
from distill.errors import StudentError

LayerMap = list[tuple[int, int]]
"""Pairs (student layer, teacher layer), both counted from 1 as in the taps `hidden.1`, `hidden.2`, ..."""

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
_INNER_FIELDS = ("intermediate_size", "hidden_dim", "d_ff", "n_inner", "encoder_ffn_dim")
_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
_WIDTH_FOLLOWERS = ("embedding_size", "pooler_hidden_size", "pooler_output_size")  # equal to the width in most configs
_HEAD_WIDTH_FIELDS = ("attention_head_size", "head_dim", "d_kv")

FACTORISED = ("electra", "albert", "mobilebert")
"""Families whose table may be narrower than their states."""

CROSS_FAMILY = {
    "distilbert": ("bert", "roberta", "xlm-roberta", "electra"),
    "electra": ("bert", "roberta", "xlm-roberta"),
    "mobilebert": ("bert", "roberta", "xlm-roberta", "electra"),
}
"""Family of a student: families of teachers whose weights it can take over."""


def depth(config: PretrainedConfig) -> int:
    """Transformer layers that a config asks for."""
    return int(config.num_hidden_layers)


def decoder_depth(config: PretrainedConfig) -> int:
    """Layers of the decoder behind an encoder; 0 where there is none."""
    if not config.is_encoder_decoder:
        return 0
    return int(next(getattr(config, name) for name in _DECODER_LAYERS if getattr(config, name, None)))


def inner_width(config: PretrainedConfig) -> int:
    """Width inside the feed-forward; GPT-2 writes None for four times its width."""
    found = next((getattr(config, name) for name in _INNER_FIELDS if getattr(config, name, None)), None)
    return int(found or 4 * config.hidden_size)


def activation_of(config: PretrainedConfig) -> str:
    """Activation inside the feed-forward, by its name in transformers; empty where a config names none."""
    return next((str(getattr(config, name)) for name in _ACTIVATION_FIELDS if hasattr(config, name)), "")


def reference_config(name: Literal["bert-base"] = "bert-base") -> PretrainedConfig:
    """The teacher that a card's declared size refers to: 12 layers of 768, 30,522 tokens, two labels."""
    return AutoConfig.for_model({"bert-base": "bert"}[name])


def choose_layers(card: StudentCard, teacher_layers: int) -> LayerMap:
    """Which teacher layer each student layer stands for.

    `even` takes round(linspace(1, T, S)), so first and last are always among them: 1, 3, 4, 6 for four of six and
    DistilBERT's 1, 3, 5, 8, 10, 12 for six of twelve. A student deeper than its teacher, which inherits no layers,
    repeats some.

    Args:
        card: Holds the choice and the number of student layers S.
        teacher_layers: T.

    Raises:
        StudentError: When named layers are too few, too many or missing in the teacher.
    """
    choice, layers = card.inherits.layers, card.layers
    if isinstance(choice, list):
        if len(choice) != layers or max(choice) > teacher_layers:
            raise StudentError(
                f"inherits.layers is {choice} for {layers} student layers and {teacher_layers} teacher layers",
                where=f"student card {card.name!r}",
                fix=f"Name {layers} layers between 1 and {teacher_layers}.",
            )
        return list(enumerate(choice, start=1))
    if layers > teacher_layers or choice == "even":
        step = (teacher_layers - 1) / max(layers - 1, 1)
        return [(index + 1, int(index * step + 0.5) + 1) for index in range(layers)]
    offset = teacher_layers - layers if choice == "last" else 0
    return [(index, index + offset) for index in range(1, layers + 1)]


def choose_decoder_layers(student: PretrainedConfig, teacher: PretrainedConfig, choice: str | list[int]) -> LayerMap:
    """Which layer of the teacher's decoder each of the student's decoder stands for; named layers are the encoder's."""
    mine, theirs = decoder_depth(student), decoder_depth(teacher)
    if choice == "first" or mine == theirs:
        return [(layer, layer) for layer in range(1, mine + 1)]
    if choice == "last" and mine < theirs:
        return [(layer, layer + theirs - mine) for layer in range(1, mine + 1)]
    step = (theirs - 1) / max(mine - 1, 1)
    return [(index + 1, int(index * step + 0.5) + 1) for index in range(mine)]


def shape_config(
    teacher: PretrainedConfig, card: StudentCard, *, labels: Sequence[str] | None = None
) -> PretrainedConfig:
    """The student's config: the teacher's, with what the card says put in its place.

    Args:
        teacher: The teacher's config, which stays as it is.
        card: The shape.
        labels: Label names in the order of the student's logits; None keeps the teacher's.

    Raises:
        StudentError: Naming every part of the shape that cannot be.
    """
    if not hasattr(teacher, "num_hidden_layers"):
        raise StudentError(
            f"a {teacher.model_type!r} model has no one list of layers that a card could shape",
            where=f"student card {card.name!r}",
            fix="`distill compress` shapes both encoders of CLIP; other families of several parts are not known.",
        )
    if not hasattr(teacher, "num_attention_heads"):
        raise StudentError(
            f"a {teacher.model_type!r} model has no attention heads, and students are Transformers that attend",
            where=f"student card {card.name!r}",
            fix="Take a teacher with attention, such as BERT's kin.",
        )
    problems: list[str] = []
    width = int(teacher.hidden_size if card.hidden_size == "teacher" else card.hidden_size)
    heads = _heads(teacher, card, width, problems)
    if card.layers > depth(teacher) and "layers" in card.inherits.parts:
        problems.append(
            f"layers is {card.layers} but the teacher has {depth(teacher)} to inherit from: set layers to "
            f"at most {depth(teacher)}, or leave `layers` out of the card's inherits.parts"
        )
    if card.decoder_layers != "same" and card.decoder_layers > decoder_depth(teacher):
        problems.append(
            f"decoder_layers is {card.decoder_layers} but the teacher's decoder has {decoder_depth(teacher)}"
        )
    if card.activation != "teacher":
        _check_activation(card.activation, problems)
    sources = CROSS_FAMILY.get(card.family, ())
    same_family = card.family in ("teacher", teacher.model_type)
    if not same_family and teacher.model_type not in sources:
        families = ", ".join(sources) or "none"
        problems.append(
            f"family {card.family!r} cannot be made from a {teacher.model_type!r} teacher (from: {families}): "
            f"take a card of the teacher's own family, such as layers-6"
        )
    _check_embedding(teacher, card, width, problems)
    _check_bottleneck(teacher, card, width, problems)
    if problems:
        raise StudentError("; ".join(problems), where=f"student card {card.name!r}")
    shape = {"num_hidden_layers": card.layers, "hidden_size": width, "num_attention_heads": heads}
    inner = _inner(teacher, card)
    activation = activation_of(teacher) if card.activation == "teacher" else card.activation
    if same_family:
        config = _own_family(teacher, card, shape, inner, activation)
    elif card.family == "electra":
        config = _as_electra(teacher, card, shape, inner, activation)
    elif card.family == "mobilebert":
        config = _as_mobilebert(teacher, card, shape, inner, activation)
    else:
        config = _as_distilbert(teacher, shape, inner, activation)
    if card.dropout not in (None, "teacher"):
        _set_dropout(config, float(card.dropout))
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
    return config


def _heads(teacher: PretrainedConfig, card: StudentCard, width: int, problems: list[str]) -> int:
    """Attention heads, adding to `problems` what does not divide."""
    width = card.bottleneck_size or width
    if card.attention_heads == "teacher" and card.head_size is not None:
        if width % card.head_size:
            fitting = _near_divisors(width, card.head_size)
            problems.append(f"head_size {card.head_size} does not divide hidden_size {width}: {fitting} would do")
        return max(width // card.head_size, 1)
    heads = int(teacher.num_attention_heads)
    if card.attention_heads != "teacher":
        heads = card.attention_heads
    elif width != teacher.hidden_size and _free_head_width(teacher):
        heads = max(round(heads * width / int(teacher.hidden_size)), 1)
    elif width != teacher.hidden_size:
        head_width = max(int(teacher.hidden_size) // heads, 1)
        heads = width // head_width if width % head_width == 0 else heads
    if width % heads and not _free_head_width(teacher):
        fitting = _near_divisors(width, heads)
        problems.append(f"{heads} attention_heads do not divide hidden_size {width}: {fitting} would do")
    return heads


def _free_head_width(config: PretrainedConfig) -> int:
    """Width of a head where heads together are not as wide as states (T5's `d_kv`, `head_dim`); else 0."""
    width = next((int(getattr(config, name)) for name in _HEAD_WIDTH_FIELDS if getattr(config, name, None)), 0)
    return width if width * int(config.num_attention_heads) != int(config.hidden_size) else 0


def _near_divisors(number: int, wanted: int) -> str:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    near = sorted(divisors, key=lambda n: (abs(n - wanted), n))[:3]
    return ", ".join(str(n) for n in sorted(near))


def _inner(teacher: PretrainedConfig, card: StudentCard) -> int:
    if isinstance(card.intermediate_size, int):
        return card.intermediate_size
    _, _, divisor = card.intermediate_size.partition("/")
    return inner_width(teacher) // int(divisor or 1)


def _check_activation(name: str, problems: list[str]) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        problems.append(f"activation {name!r} is unknown to transformers: gelu, gelu_new or relu would do")


def _check_embedding(teacher: PretrainedConfig, card: StudentCard, width: int, problems: list[str]) -> None:
    if card.embedding_size == "teacher":
        return
    family = teacher.model_type if card.family == "teacher" else card.family
    if family not in FACTORISED:
        problems.append(
            f"embedding_size is {card.embedding_size}, and the family {family!r} has a table as wide as its states: "
            f"set family to electra, or take embedding_size away"
        )
    elif card.embedding_size >= width:
        problems.append(f"embedding_size must be less than hidden_size {width}; got {card.embedding_size}")


def _check_bottleneck(teacher: PretrainedConfig, card: StudentCard, width: int, problems: list[str]) -> None:
    if (card.bottleneck_size is None) == (card.family != "mobilebert") and card.feed_forwards == 1:
        return
    if card.family != "mobilebert":
        problems.append("bottleneck_size and feed_forwards are for the family mobilebert: set family to it")
    elif card.bottleneck_size is None:
        problems.append("bottleneck_size must be given for the family mobilebert: a quarter of the width would do")
    elif card.bottleneck_size > width or width != teacher.hidden_size:
        problems.append(f"bottleneck_size must be at most the teacher's hidden_size {width}, which the student keeps")


def _own_family(
    teacher: PretrainedConfig, card: StudentCard, shape: dict[str, int], inner: int, activation: str
) -> PretrainedConfig:
    """The teacher's config with another shape, and what follows from the shape."""
    values = teacher.to_dict()
    names: dict[str, str] = teacher.attribute_map
    values.update({names.get(key, key): value for key, value in shape.items()})
    _put(values, [names.get(name, name) for name in _INNER_FIELDS], inner, only_if=inner != inner_width(teacher))
    _put(values, _ACTIVATION_FIELDS, activation, only_if=activation != activation_of(teacher))
    if teacher.is_encoder_decoder:
        _shape_decoder(values, teacher, card, inner)
    for key in _WIDTH_FOLLOWERS:
        if values.get(key) == teacher.hidden_size:
            values[key] = shape["hidden_size"]
    for key in _HEAD_WIDTH_FIELDS:
        if values.get(key):
            free = _free_head_width(teacher) if card.head_size is None else card.head_size
            values[key] = free or shape["hidden_size"] // shape["num_attention_heads"]
    shared = values.get("num_key_value_heads")
    if shared:  # as many as the teacher's where they divide the student's heads, and each its own where each had
        heads = shape["num_attention_heads"]
        most = heads if shared == teacher.num_attention_heads else min(shared, heads)
        values["num_key_value_heads"] = next(count for count in range(most, 0, -1) if heads % count == 0)
    for key, value in values.items():
        if ("layer" in key or "window" in key) and isinstance(value, list) and len(value) == depth(teacher):
            values[key] = [value[layer - 1] for _, layer in choose_layers(card, depth(teacher))]
    if card.embedding_size != "teacher":
        values["embedding_size"] = card.embedding_size
    values["dtype"] = "float32"
    return type(teacher).from_dict(values)


def _shape_decoder(values: dict[str, Any], teacher: PretrainedConfig, card: StudentCard, inner: int) -> None:
    """A decoder as wide as the encoder."""
    most = decoder_depth(teacher)
    _put(values, _DECODER_LAYERS, min(card.layers, most) if card.decoder_layers == "same" else card.decoder_layers)
    _put(values, ("decoder_attention_heads",), values.get("encoder_attention_heads"))
    _put(values, ("decoder_ffn_dim",), inner, only_if=inner != inner_width(teacher))


def _put(values: dict[str, Any], names: Sequence[str], value: Any, *, only_if: bool = True) -> None:
    """Sets the first of `names` that the config has."""
    key = next((name for name in names if name in values), None)
    if only_if and key is not None:
        values[key] = value


def _set_dropout(config: PretrainedConfig, share: float) -> None:
    """In place of every dropout above 0, under whichever name; whole layers that are dropped are another matter."""
    for key, value in config.to_dict().items():
        if "drop" in key and "layerdrop" not in key and isinstance(value, float) and value > 0.0:
            setattr(config, key, share)


def _as_distilbert(teacher: PretrainedConfig, shape: dict[str, int], inner: int, activation: str) -> PretrainedConfig:
    """DistilBERT's config for a teacher laid out like BERT. RoBERTa keeps its first positions unused."""
    return AutoConfig.for_model(
        "distilbert",
        **_kept(teacher),
        dim=shape["hidden_size"],
        n_layers=shape["num_hidden_layers"],
        n_heads=shape["num_attention_heads"],
        hidden_dim=inner,
        activation=activation,
        dropout=teacher.hidden_dropout_prob,
        attention_dropout=teacher.attention_probs_dropout_prob,
    )


def _as_electra(
    teacher: PretrainedConfig, card: StudentCard, shape: dict[str, int], inner: int, activation: str
) -> PretrainedConfig:
    """ELECTRA's config for a teacher laid out like BERT: the same layers, an embedding of its own width."""
    return AutoConfig.for_model("electra", **_like_bert(teacher, card, shape, inner, activation))


def _as_mobilebert(
    teacher: PretrainedConfig, card: StudentCard, shape: dict[str, int], inner: int, activation: str
) -> PretrainedConfig:
    """MobileBERT's config (Sun et al. 2020, arXiv:2004.02984) for a teacher laid out like BERT, and as wide outside."""
    own = {
        "true_hidden_size": card.bottleneck_size,
        "intra_bottleneck_size": card.bottleneck_size,
        "num_feedforward_networks": card.feed_forwards,
        "normalization_type": "no_norm",
        **({"hidden_dropout_prob": 0.0} if card.dropout is None else {}),  # small students underfit
    }
    return AutoConfig.for_model("mobilebert", **_like_bert(teacher, card, shape, inner, activation) | own)


def _like_bert(
    teacher: PretrainedConfig, card: StudentCard, shape: dict[str, int], inner: int, activation: str
) -> dict[str, Any]:
    """A config of BERT's names with an embedding of the card's width."""
    return {
        **_kept(teacher),
        **shape,
        "embedding_size": shape["hidden_size"] if card.embedding_size == "teacher" else card.embedding_size,
        "type_vocab_size": teacher.type_vocab_size,
        "intermediate_size": inner,
        "hidden_act": activation,
        "layer_norm_eps": teacher.layer_norm_eps,
        "hidden_dropout_prob": teacher.hidden_dropout_prob,
        "attention_probs_dropout_prob": teacher.attention_probs_dropout_prob,
        "classifier_dropout": teacher.classifier_dropout,
    }


def _kept(teacher: PretrainedConfig) -> dict[str, Any]:
    """What a student of another family takes from a teacher laid out like BERT as it is: its words and its classes."""
    return {
        "vocab_size": teacher.vocab_size,
        "max_position_embeddings": teacher.max_position_embeddings - position_offset(teacher),
        "initializer_range": teacher.initializer_range,
        "pad_token_id": teacher.pad_token_id,
        "id2label": dict(teacher.id2label),
        "label2id": dict(teacher.label2id),
        "problem_type": teacher.problem_type,
    }


def position_offset(config: PretrainedConfig) -> int:
    """Rows at the start of the position table that no text reaches: RoBERTa counts from padding_idx + 1."""
    return int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
