"""Writing token by token over any step function: greedy and beam search as transformers do them, on NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Past = Mapping[str, Array]
"""What a step remembers: arrays whose first axis runs over rows, so that rows can be chosen, repeated and dropped."""

Step = Callable[[Array, Past | None], tuple[Array, Past]]
"""(ids (B, T) int64, past) -> (logits (B, V) of the token behind the last id, past).

The first call has the whole prompt and no past; each later one the last token of every row (B, 1) and the past of the
call before, its rows put in order. What else must follow the rows, such as an encoder's states, belongs in the past.
"""


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be written. "Text" is the prompt, or what a decoder starts with, and all that is written behind it.

    Attributes:
        ends: Ids that end a text.
        max_new_tokens: Tokens at most, the end included.
        min_new_tokens: No end before so many.
        min_length: No end before the text has so many.
        start: What a decoder behind an encoder is shown before it writes.
        first: The token behind a text of one, whatever the model says.
        last: The token at the maximum, whatever the model says.
        never: Ids that are never written, such as the padding.
        bad_words: Runs of ids that are never written whole.
        no_repeat: No run of so many tokens comes twice in the text; 0 lets them.
        no_repeat_source: No run of so many tokens of the source comes in the text; 0 lets them.
        repetition_penalty: A token that the text has is made less likely: its logit is divided by this, or multiplied
            where it is below 0. Beam search takes the log-probability in its place.
        beams: Texts that are followed at once; 1 is greedy.
        renormalize: In beam search, what the rules leave of the probabilities adds up to 1 again.
        length_penalty: A text's score is its log-probability divided by its tokens to this power.
        early_stopping: Stop at as many finished texts as beams; else go on while a better one seems possible.
    """

    ends: tuple[int, ...] = ()
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    min_length: int = 0
    start: int = 0
    first: int | None = None
    last: int | None = None
    never: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    no_repeat: int = 0
    no_repeat_source: int = 0
    repetition_penalty: float = 1.0
    beams: int = 1
    renormalize: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Rules:
        """From plain values, as JSON keeps them; what they do not name stays as it is."""
        known = {name: _tuples(settings[name]) for name in Rules.__dataclass_fields__ if name in settings}
        return Rules(**known)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def greedy(step: Step, prompts: Array, rules: Rules, sources: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """The most probable token each time.

    Args:
        step: The model.
        prompts: (B, T) int64, without padding.
        rules: `beams` is not read.
        sources: By row the ids that an encoder read, none of an image; without an encoder the prompts.

    Returns:
        By row the new ids, with the end that closed it.
    """
    written: list[list[int]] = [[] for _ in prompts]
    begun: list[list[int]] = np.asarray(prompts).tolist()
    alive = np.ones(len(prompts), bool)
    ids, past = np.asarray(prompts, np.int64), None
    for count in range(rules.max_new_tokens):
        logits, past = step(ids, past)
        scores = [
            _allowed(np.array(row, np.float64), [*prompt, *new], source, count, rules)
            for row, prompt, new, source in zip(logits, begun, written, sources or begun, strict=True)
        ]
        chosen = np.array([row.argmax() for row in scores], np.int64)
        for row in np.flatnonzero(alive):
            written[row].append(int(chosen[row]))
        alive &= ~np.isin(chosen, rules.ends)
        if not alive.any():
            break
        ids = chosen[:, None]
    return written


def beam(
    step: Step, prompt: Sequence[int], rules: Rules, source: Sequence[int] | None = None
) -> list[tuple[list[int], float]]:
    """The best texts of a beam search from one prompt, as transformers' `generate(num_beams=...)` finds them.

    Args:
        step: The model; it is called with one row first and with up to `rules.beams` rows then.
        prompt: (T,) ids.
        rules: How many beams, and what a score is.
        source: The ids that an encoder read, none of an image; without an encoder the prompt.

    Returns:
        Up to `rules.beams` texts, best first: the new ids, with the end that closed them, and the score.
    """
    width, finished = rules.beams, list[tuple[list[int], float]]()
    running: list[tuple[list[int], float]] = [([], 0.0)]
    source = prompt if source is None else source
    ids, past = np.array([prompt], np.int64), None
    for count in range(1, rules.max_new_tokens + 1):
        logits, past = step(ids, past)
        found = _continuations(logits, running, prompt, source, count - 1, rules)
        done = [new[-1] in rules.ends or count == rules.max_new_tokens for _, new, _ in found]
        closed = [(new, score / count**rules.length_penalty) for _, new, score in _where(found[:width], done)]
        finished = sorted([*finished, *closed], key=lambda text: -text[1])[:width]
        going = _where(found, [not one for one in done])[:width]
        if not going or (
            len(finished) == width and (rules.early_stopping or not _hopeful(going, finished, count, rules))
        ):
            break
        running = [(new, score) for _, new, score in going]
        past = _reordered(past, [parent for parent, _, _ in going])
        ids = np.array([[new[-1]] for new, _ in running], np.int64)
    return finished or running  # where the rules forbid every token, what was written so far


Candidate = tuple[int, list[int], float]
"""Number of the running text it continues, its ids and its log-probability."""


def _continuations(
    logits: Array,
    running: Sequence[tuple[list[int], float]],
    prompt: Sequence[int],
    source: Sequence[int],
    count: int,
    rules: Rules,
) -> list[Candidate]:
    """The best continuations of all running texts, best first: enough that some go on if others end."""
    rows = []
    for row, (new, score) in zip(logits, running, strict=True):
        allowed = _allowed(_log_softmax(row), [*prompt, *new], source, count, rules)
        rows.append(score + (_log_softmax(allowed) if rules.renormalize else allowed))
    scores = np.stack(rows)
    flat, most = scores.reshape(-1), max(2, 1 + len(rules.ends)) * rules.beams
    top = np.argpartition(-flat, most)[:most] if most < len(flat) else np.arange(len(flat))
    top = top[np.argsort(-flat[top], kind="stable")]
    places = [(int(place) // scores.shape[1], int(place) % scores.shape[1], float(flat[place])) for place in top]
    return [(row, [*running[row][0], token], score) for row, token, score in places if np.isfinite(score)]


def _hopeful(going: Sequence[Candidate], finished: Sequence[tuple[list[int], float]], count: int, rules: Rules) -> bool:
    """Whether the best running text could still be better than the worst finished one, judged at its present length."""
    return going[0][2] / count**rules.length_penalty > finished[-1][1]


def _where(found: Sequence[Candidate], keep: Sequence[bool]) -> list[Candidate]:
    return [one for one, wanted in zip(found, keep, strict=False) if wanted]


def _reordered(past: Past, rows: Sequence[int]) -> Past:
    if any(len(value) != len(rows) for value in past.values()) or list(rows) != list(range(len(rows))):
        return {name: value[list(rows)] for name, value in past.items()}
    return past


def _allowed(scores: Array, text: Sequence[int], source: Sequence[int], count: int, rules: Rules) -> Array:
    """(V,) scores of the token behind `text`, -inf where the rules forbid it; the last `count` tokens are written."""
    forced = rules.last if count == rules.max_new_tokens - 1 else None
    forced = rules.first if forced is None and len(text) == 1 else forced
    if forced is not None:
        only = np.full_like(scores, -np.inf)
        only[forced] = 0.0
        return only
    if rules.repetition_penalty != 1.0:
        known = np.unique(text)
        penalty = np.where(scores[known] < 0, rules.repetition_penalty, 1 / rules.repetition_penalty)
        scores[known] *= penalty
    banned = [*rules.never, *_closing(text, text, rules.no_repeat), *_closing(text, source, rules.no_repeat_source)]
    banned += [run[-1] for run in rules.bad_words if list(text[len(text) - len(run) + 1 :]) == list(run[:-1])]
    banned += rules.ends if count < rules.min_new_tokens or len(text) < rules.min_length else ()
    scores[banned] = -np.inf
    return scores


def _closing(text: Sequence[int], other: Sequence[int], size: int) -> list[int]:
    """Tokens that would close, behind `text`, a run of `size` tokens that `other` has."""
    if not 0 < size <= len(text) + 1:
        return []
    tail = list(text[len(text) - size + 1 :])
    return [other[at + size - 1] for at in range(len(other) - size + 1) if list(other[at : at + size - 1]) == tail]


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
