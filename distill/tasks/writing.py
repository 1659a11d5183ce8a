"""How a model of transformers writes by its own `generation_config`, and what of that a bundle does not follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.heads.generation import Rules

MOST = 128
"""Tokens written at most where the model's generation_config names no other number."""

UNFOLLOWED: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "early_stopping": (None, False, True),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
    "begin_suppress_tokens": (None, []),
    "force_words_ids": (None,),
    "constraints": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
}
"""Options that change what `generate` writes and that `Rules` has not, each with the values that change nothing.
What only says how to sample (temperature, top_k) changes nothing without `do_sample`."""


def rules_of(model: Any) -> Rules:
    """How a model writes by its own `generation_config`, `UNFOLLOWED` left out."""
    config = generation_config(model)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    longest = config.max_new_tokens or (config.max_length - 1 if config.max_length and config.max_length > 1 else MOST)
    written = getattr(model.config, "decoder", model.config)  # behind an image encoder it has a config of its own
    positions = getattr(written, "max_position_embeddings", None)
    bad = [tuple(run) for run in config.bad_words_ids or [] if run not in [[end] for end in ends]]
    never = [run[0] for run in bad if len(run) == 1]
    return Rules(
        ends=tuple(end for end in ends if end is not None),
        max_new_tokens=min(longest, positions - 1 if positions else longest),
        start=int(getattr(model.config, "decoder_start_token_id", None) or 0),  # `restore` sees to it
        min_new_tokens=config.min_new_tokens or 0,
        min_length=(config.min_length or 0) if config.min_new_tokens is None else 0,  # as `generate` has it
        first=config.forced_bos_token_id,
        last=config.forced_eos_token_id,
        never=tuple(dict.fromkeys([*never, *(config.suppress_tokens or [])])),
        bad_words=tuple(run for run in bad if len(run) > 1),
        no_repeat=config.no_repeat_ngram_size or 0,
        no_repeat_source=config.encoder_no_repeat_ngram_size or 0,
        repetition_penalty=1.0 if config.repetition_penalty is None else float(config.repetition_penalty),
        beams=config.num_beams or 1,
        renormalize=config.renormalize_logits is True,
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=config.early_stopping is True,
    )


def unfollowed(model: Any) -> list[str]:
    """`name = value` of each of `UNFOLLOWED` that a model's `generation_config` sets."""
    config = generation_config(model)
    found = {name: getattr(config, name, None) for name in UNFOLLOWED}
    return [f"{name} = {value!r}" for name, value in found.items() if value not in UNFOLLOWED[name]]


def spelled(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """What rows of ids say, as a bundle's tokenizer spells it: spaces before signs are not tidied up.

    Args:
        tokenizer: A tokenizer of transformers, or an `ImageReader` with one.
        rows: Ids; those that are special say nothing.
    """
    words = getattr(tokenizer, "tokenizer", tokenizer)
    texts = words.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def generation_config(model: Any) -> Any:
    """The model's own; of an architecture that transformers does not write with, what its config says of that."""
    from transformers import GenerationConfig

    return model.generation_config if model.can_generate() else GenerationConfig.from_model_config(model.config)
