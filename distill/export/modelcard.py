"""The bundle's README: a model card with measured numbers, and how to call the file from an app."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.export.clients import CLIENTS, Facts, as_json, usage
from distill.export.sessions import PRECISE, Sums


@dataclass(frozen=True)
class Card:
    """What differs from task to task.

    Attributes:
        pipeline: The hub's `pipeline_tag`.
        answer: What the model answers with, a sentence's end; `{labels}` are its labels, `{count}` how many.
        shapes: What the graph returns, by the shape of each output.
        clients: Languages of `clients.CLIENTS` whose code is written out.
        code: Python that asks the bundle, `{asked}` for a text or a pair; None for the classifier's.
        files: What the int8 graph is in.
        fed: What its inputs are, where they are not token ids.
        reads: What it takes at most, a part of a sentence.
    """

    pipeline: str
    answer: str
    shapes: str
    clients: tuple[str, ...] = ("Python",)
    code: str | None = None
    files: str = "`onnx/model_quantized.onnx`"
    fed: str = "int64 of shape (batch, length), made by `tokenizer.json`"
    reads: str = "It reads at most\n{most} tokens"


_EACH = "answers with {count} labels: {labels}"

CARDS = {
    "text-classification": Card(
        "text-classification", _EACH, "(batch, {count})", tuple(client.title for client in CLIENTS)
    ),
    "masked-lm": Card(
        "feature-extraction",
        "answers with a vector for each token",
        "(batch, length, width)",
        code='print(bundle("a text").vectors.shape)',
    ),
    "multi-label": Card(
        "text-classification",
        "gives any of {count} labels: {labels}",
        "(batch, {count})",
        code="print(bundle({asked}).labels)",
    ),
    "question-answering": Card(
        "question-answering",
        "answers a question with a part of a text",
        "(batch, length)",
        code='print(bundle("a question", "a text").text)',
    ),
    "regression": Card(
        "text-classification",
        "answers with a number, the output `value`",
        "(batch, 1) and (batch)",
        code="print(bundle({asked}).value)",
    ),
    "token-classification": Card(
        "token-classification",
        "gives each word one of {count} labels: {labels}",
        "(batch, length, {count})",
        code='for one in bundle("a text").entities:\n    print(one.label, one.text, one.start, one.end)',
    ),
    "causal-lm": Card(
        "text-generation",
        "says of each token what comes next",
        "(batch, length, tokens)",
        code='print(bundle("a text").next)\nprint(bundle("a text").perplexity)',
    ),
    "seq2seq": Card(
        "text2text-generation",
        "writes a text for a text, token by token",
        "(batch, written, tokens), the decoder's, with keys and values as transformers.js and optimum feed them",
        code='print(bundle("a text").text)\nprint(bundle("a text", "what came of it").likelihood)',
        files="`onnx/encoder_model_quantized.onnx` and `onnx/decoder_model_merged_quantized.onnx`",
    ),
    "image-classification": Card(
        "image-classification",
        _EACH,
        "(batch, {count})",
        clients=("Python", "JavaScript"),
        code='print(bundle("an-image.png").label)  # or an array (height, width, 3) of uint8',
        fed="float32 of shape (batch, channels, height, width), made as `preprocessor_config.json` says",
    ),
    "image-captioning": Card(
        "image-to-text",
        "writes a text for it, token by token",
        "(batch, written, tokens), the decoder's, with keys and values as transformers.js and optimum feed them",
        clients=("Python", "JavaScript"),
        code='print(bundle("an-image.png").text)  # or an array (height, width, 3) of uint8\n'
        'print(bundle("an-image.png", "a caption").likelihood)',
        files="`onnx/encoder_model_quantized.onnx` and `onnx/decoder_model_merged_quantized.onnx`",
        fed="float32 of shape (batch, channels, height, width), made as `preprocessor_config.json` says; hand the\n"
        "encoder's `last_hidden_state` to the decoder as `encoder_hidden_states`, beside `input_ids`",
        reads="It reads an\nimage",
    ),
    "image-text": Card(
        "zero-shot-image-classification",
        "gives an image and a text vectors of length 1 in one space: the product of two is their similarity",
        "(batch, width) each",
        clients=("Python", "JavaScript"),
        code='print(bundle("an-image.png", "a text").similarity)\nprint(bundle("a text").vector)',
        files="`onnx/text_model_quantized.onnx` and `onnx/vision_model_quantized.onnx`",
        fed="int64 of shape (batch, length), made by `tokenizer.json`, and float32 of shape (batch, channels, height,\n"
        "width), made as `preprocessor_config.json` says",
    ),
    "sentence-embedding": Card(
        "sentence-similarity",
        "gives a vector of length 1, the output `sentence_embedding`: the product of two is their similarity",
        "(batch, length, width) and (batch, width)",
        code='print(bundle("a text").vector)\nprint(bundle("a text", "another one").similarity)',
    ),
}
"""By task."""

ROLES = {
    "teacher": "Teacher, PyTorch fp32",
    "teacher-onnx": "Teacher, ONNX fp32",
    "baseline": "Same student without a teacher, PyTorch fp32",
    "student": "Student, PyTorch fp32",
    "student-onnx": "Student, ONNX fp32",
    "student-int8": "**Student, ONNX {weights} (ships)**",
}


def model_card(
    manifest: Mapping[str, Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    sums: Sums = "exact",
    side: str = "right",
) -> str:
    """Markdown with the hub's front matter.

    Args:
        manifest: The bundle's, without its files.
        inputs: Names that the int8 graph is fed.
        outputs: Names that it returns.
        sums: What its int8 products are on x86 without VNNI: see `distill.export.sessions.sums_of`.
        side: Where texts are cut that are too long.
    """
    labels, card = list(manifest["labels"]), CARDS[manifest["task"]]
    weights = manifest.get("weights", "int8")
    stored = f"{weights} with {manifest['embeddings']} embeddings" if manifest.get("embeddings") else weights
    front = [
        "---",
        f"pipeline_tag: {card.pipeline}",
        "library_name: transformers.js",
        f"tags: [onnx, {weights}, knowledge-distillation, distill]",
        "---",
    ]
    shown = ", ".join(map(_plain, labels[:12])) + (", ..." if len(labels) > 12 else "")
    megabytes = manifest["onnx_bytes"]["int8"] / 1e6
    pairs, precise = bool(manifest.get("pairs")), sums == "on request"
    facts = Facts(labels, manifest["max_length"], inputs, pairs, card.code, card.pipeline, precise, side)
    columns = f"Its columns:\n\n```json\n{as_json(labels)}\n```\n" if labels else ""
    answer = card.answer.format(count=len(labels), labels=shown)
    says = f"{card.reads.format(most=manifest['max_length'])} and {answer}"
    text = f"""
# {_plain(manifest["name"])}

A distilled {manifest["task"]} model: {card.files}, {stored}, {megabytes:.1f} MB, for CPUs. {says}.

## Measured

{_measured_on(manifest)} Each number was measured on the file or model named.

{_table(manifest["metrics"], weights)}

## Use

{usage(facts, card.clients)}

### Any other ONNX Runtime

Feed {_names(inputs)}
as {card.fed}{_before(manifest)}; read {_names(outputs)}
as float32 of shape {card.shapes.format(count=len(labels))}. {columns}
{_needs(manifest, sums, side)}## Check

```sh
distill verify PATH/TO/THIS/FOLDER
```

compares checksums, labels, tokens and the golden answers in `golden.jsonl` with what was shipped. Ask one text at a
time where answers must repeat to the last digit: int8 rounds by the range of the whole batch.
"""
    return "\n".join(front) + "\n" + text


def _measured_on(manifest: Mapping[str, Any]) -> str:
    if manifest.get("measured_on") == "validation":
        return "On the validation data, which also chose: there was no test data."
    return "On the test data."


def _table(metrics: Mapping[str, Any], weights: str) -> str:
    if not metrics:
        return "Not measured."
    names = list(next(iter(metrics.values()))["metrics"])
    lines = [
        f"| model | {' | '.join(names)} | of the teacher's | same answer as the teacher | MB |",
        f"|---|{'---:|' * len(names)}---:|---:|---:|",
    ]
    for role, title in ROLES.items():
        if role in metrics:
            facts = metrics[role]
            numbers = " | ".join(f"{facts['metrics'][name]:.4f}" for name in names)
            kept, same = _percent(facts.get("retention")), _percent(facts.get("agreement"))
            lines.append(
                f"| {title.format(weights=weights)} | {numbers} | {kept} | {same} | {facts['bytes'] / 1e6:.1f} |"
            )
    return "\n".join(lines)


def _before(manifest: Mapping[str, Any]) -> str:
    """How the words that stand before every text come into those that other clients read."""
    prefix = _escaped(json.dumps(manifest.get("prefix", ""))[1:-1])
    return f' from each text with "{prefix}" put before it' if prefix else ""


def _needs(manifest: Mapping[str, Any], sums: Sums, side: str) -> str:
    """Paragraphs on what the file asks of a runtime and of a processor."""
    said = []
    if side == "left":
        said.append(
            "Texts that are too long lose their beginning (`truncation_side` of the tokenizer is left), as measured.\n"
            "transformers.js and DJL cut the end instead: hand them texts that fit."
        )
    if sums == "on request":
        said.append(
            f'On x86 processors without VNNI set the session option `{PRECISE}` to "1": products of bytes overflow\n'
            "there otherwise, and answers are others. distill sets it where they do, the code above everywhere: take\n"
            "it out for servers with AMX (Xeon since 2023), which answer two to three times as fast without. All\n"
            "other processors ignore it."
        )
    if sums == "inexact":
        said.append(
            "On x86 processors without VNNI products of bytes overflow, and answers are others: layers share their\n"
            'weights, for which ONNX Runtime has no remedy. Export it with `target = "x86-avx2"` for those.'
        )
    if manifest.get("embeddings") == "int4":
        said.append(
            "The embeddings are in int4, which ONNX Runtime reads from version 1.23 on, in browsers too. A reduced\n"
            "build needs its operator `GatherBlockQuantized`."
        )
    return "".join(f"{paragraph}\n\n" for paragraph in said)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _plain(text: str) -> str:
    """A name as Markdown text that cannot break out of its place: one line, every sign of HTML and Markdown escaped."""
    return _escaped(" ".join("".join(sign if sign.isprintable() else " " for sign in text).split()))


def _escaped(line: str) -> str:
    return re.sub(r"[&<>`*\[\]|\\~\"#]", lambda found: f"&#{ord(found[0])};", line)
