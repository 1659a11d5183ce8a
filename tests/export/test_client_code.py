"""The code of a bundle's README: the bundle's own names and labels in every language."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.export.clients import CLIENTS, Facts, usage
from distill.export.graph import write
from distill.export.modelcard import model_card
from distill.export.passes import apply_passes
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import Bundle
from distill.export.sessions import PRECISE, sums_of
from distill.export.single_file import metadata_of

DECLARATIONS = Path(__file__).resolve().parent.parent / "clients" / "cpp"
ODD = [
    "<script>alert(1)</script>",
    'a "quote" ``` \\ 1',
    "line\nbreak\x7f9",
    "日本 é 👩‍👩‍👧",
    "??=",
    "%s {} $x",
    "",
]
FACTS = Facts(ODD, 48, ("input_ids", "attention_mask", "token_type_ids"), pairs=False)
NO_TYPES = replace(FACTS, inputs=("input_ids", "attention_mask"))
EVERY = [FACTS, NO_TYPES, replace(FACTS, pairs=True), replace(NO_TYPES, pairs=True, precise=True)]
NAMES = {"input_ids", "attention_mask", "token_type_ids", "probabilities"}


def code_of(markdown: str, fence: str) -> str:
    block = re.search(rf"```{re.escape(fence)}\n(.*?)```", markdown, re.DOTALL)
    assert block is not None, fence
    return block[1]


@pytest.mark.parametrize("facts", EVERY)
@pytest.mark.parametrize("fence", ["kotlin", "swift", "cpp"])
def test_what_it_feeds_and_reads_is_what_the_graph_has(fence: str, facts: Facts) -> None:
    """A name too many is an error on somebody's phone, a name too few as well."""
    code = code_of(usage(facts), fence)
    assert set(re.findall(r'"(\w+)"', code)) & NAMES == {*facts.inputs, "probabilities"}
    assert re.search(r"\b48\b", code)


def test_the_readme_of_a_bundle_has_its_names(tiny_bundle: Path) -> None:
    card, model = (tiny_bundle / "README.md").read_text(encoding="utf-8"), Bundle.load(tiny_bundle).model
    for fence in ("kotlin", "swift", "cpp"):
        assert set(re.findall(r'"(\w+)"', code_of(card, fence))) & NAMES == {*model.inputs, "probabilities"}
    assert 'model_quantized.onnx"' in code_of(card, "kotlin")
    assert [line for line in card.splitlines() if line.startswith("### ")] == [
        *(f"### {client.title}" for client in CLIENTS),
        "### Any other ONNX Runtime",
    ]


@pytest.mark.parametrize("facts", EVERY)
def test_the_cpp_compiles_and_its_labels_are_the_labels(facts: Facts, tmp_path: Path) -> None:
    """Against declarations of the calls, not ONNX Runtime's own header, which no package here brings."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path / "classifier.cpp"
    show = "std::fwrite(label.data(), 1, label.size(), stdout), std::fputc(30, stdout);"
    main = f"#include <cstdio>\nint main() {{ for (const auto& label : kLabels) {show} }}\n"
    program.write_text(code_of(usage(facts), "cpp") + main, encoding="utf-8")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", DECLARATIONS, program, "-o", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([tmp_path / "run"], capture_output=True, check=True).stdout.decode()
    assert printed.split("\x1e")[:-1] == ODD


@pytest.mark.parametrize("facts", EVERY)
def test_no_label_breaks_out(facts: Facts) -> None:
    markdown = usage(facts)
    assert "<script" not in markdown
    assert len([line for line in markdown.splitlines() if line.startswith("```")]) == 2 * len(CLIENTS)


def test_pairs_are_asked_as_pairs() -> None:
    """A pipeline that forgot the second text would still answer."""
    markdown = usage(replace(FACTS, pairs=True))
    assert 'bundle("a text", "a second text")' in code_of(markdown, "python")
    assert 'text_pair: "a second text"' in code_of(markdown, "javascript")
    assert "fun probabilities(text: String, second: String)" in code_of(markdown, "kotlin")
    assert "std::vector<int64_t> ids, std::vector<int64_t> types)" in code_of(markdown, "cpp")
    assert json.dumps("a second text") not in usage(FACTS)


@pytest.mark.parametrize("fence", ["javascript", "kotlin", "swift", "cpp"])
@pytest.mark.parametrize("facts", [*EVERY, replace(FACTS, pipeline="zero-shot-image-classification")])
def test_exact_sums_are_asked_for_where_weights_are_wide(fence: str, facts: Facts) -> None:
    """Without the option an x86 processor without VNNI gives other answers, and nobody is told."""
    for precise in (False, True):
        code = code_of(usage(replace(facts, precise=precise)), fence)
        assert code.count("x64quantprecision") == precise
    assert code.count(PRECISE) == (fence != "javascript")
    assert code.count("session_options }") == (fence == "javascript") * (1 + facts.pipeline.startswith("zero"))


@pytest.mark.parametrize(
    "family, target, sums",
    [
        ("bert", "arm64", "on request"),
        ("bert", "wasm", "on request"),
        ("bert", "x86-avx2", "exact"),
        ("bert", "portable", "exact"),
        ("albert", "arm64", "inexact"),
        ("albert", "x86-avx2", "exact"),
    ],
)
def test_what_sums_are_is_read_off_the_file(
    family: str, target: Any, sums: str, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    graph = tiny(family).graph
    source = write(graph, tmp_path / "fp32.onnx", {}, apply_passes(graph)).path
    assert sums_of(source, {"distill.target": target}) == "exact"  # nothing in it is int8
    made = quantize_dynamic_int8(source, tmp_path / "int8.onnx", target=target)
    assert sums_of(made.path, metadata_of(made.path)) == sums


def test_a_pair_is_asked_as_a_pair_whatever_the_answer_is() -> None:
    manifest = {"name": "n", "labels": ["a"], "max_length": 48, "metrics": {}, "onnx_bytes": {"int8": 1}, "pairs": True}
    for task, answer in (("regression", "value"), ("multi-label", "labels"), ("text-classification", "label")):
        card = model_card({**manifest, "task": task}, ["input_ids"], ["logits"])
        assert f'print(bundle("a text", "a second text").{answer})' in card
    assert 'print(bundle("a text").value)' in model_card(
        {**manifest, "task": "regression", "pairs": False}, ["input_ids"], ["logits"]
    )


def test_a_text_is_cut_where_the_bundle_cuts_it_or_it_is_said() -> None:
    manifest = {"name": "n", "task": "text-classification", "labels": ["a"], "max_length": 48, "metrics": {}}
    manifest |= {"onnx_bytes": {"int8": 1}}
    right, left = (model_card(manifest, ["input_ids"], ["logits"], side=side) for side in ("right", "left"))
    assert "ids = ids.prefix(47) + [ids[ids.count - 1]]" in right
    assert "truncation_side" not in right
    assert "ids = [ids[0]] + ids.suffix(47)" in left
    assert "lose their beginning (`truncation_side` of the tokenizer is left)" in left


def test_the_readme_says_what_other_programs_have_to_set() -> None:
    manifest = {"name": "n", "task": "text-classification", "labels": ["a"], "max_length": 48, "metrics": {}}
    manifest |= {"onnx_bytes": {"int8": 1}, "embeddings": "int4"}
    names = (["input_ids", "attention_mask"], ["logits", "probabilities"])
    wide, exact, shared = (model_card(manifest, *names, sums) for sums in ("on request", "exact", "inexact"))
    assert f'VNNI set the session option `{PRECISE}` to "1"' in wide
    assert PRECISE not in exact
    assert "VNNI" not in exact
    assert 'Export it with `target = "x86-avx2"`' in shared
    assert PRECISE not in shared
    for card in (wide, exact, shared):
        assert "from version 1.23 on" in card
        assert "\n\n## Check\n" in card
    assert "1.23 on" not in model_card({**manifest, "embeddings": ""}, *names)
