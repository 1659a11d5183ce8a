from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from transformers import AutoTokenizer

from distill.errors import BundleError, DataError
from distill.export.onnx_model import OnnxModel
from distill.export.runtime import FULL, QUANTIZED, STREAM, Bundle
from distill.export.single_file import refuse_external_data
from distill.tasks import TASKS


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


def matrix(predictions: Any) -> np.ndarray:
    """(B, C) probabilities in the order of the labels."""
    return np.array([list(prediction.probabilities.values()) for prediction in predictions])


def test_fp32_answers_are_pytorchs(shared_bundle: Any) -> None:
    texts = shared_bundle.texts
    found = Bundle.load(shared_bundle.folder, file=FULL).predict(texts)
    np.testing.assert_allclose(matrix(found), shared_bundle.probabilities(texts), atol=1e-5)


def test_int8_answers_are_pytorchs_within_rounding(shared_bundle: Any, bundle: Bundle) -> None:
    texts = shared_bundle.texts
    wanted = shared_bundle.probabilities(texts)
    found = bundle.predict(texts)
    np.testing.assert_allclose(matrix(found), wanted, atol=0.05)
    assert np.mean(matrix(found).argmax(1) == wanted.argmax(1)) >= 0.9
    assert len({prediction.label for prediction in found}) == 3  # or agreement would mean nothing


def test_pairs_are_two_segments(shared_bundle: Any) -> None:
    """Joining the two strings, or forgetting the token types of the second, gives other answers."""
    pairs = list(zip(shared_bundle.texts[:20], shared_bundle.texts[20:40], strict=True))
    found = Bundle.load(shared_bundle.folder, file=FULL).predict(pairs)
    np.testing.assert_allclose(matrix(found), shared_bundle.probabilities(pairs), atol=1e-5)
    row = Bundle.load(shared_bundle.folder).encode(pairs[:1])[0]
    assert set(row["token_type_ids"]) == {0, 1}


def test_texts_and_pairs_may_be_mixed(shared_bundle: Any) -> None:
    """One answer a text, whatever stands beside it."""
    one = Bundle.load(shared_bundle.folder, file=FULL)
    mixed = [shared_bundle.texts[0], (shared_bundle.texts[1], shared_bundle.texts[2]), shared_bundle.texts[3]]
    np.testing.assert_allclose(
        matrix(one.predict(mixed)), matrix([one.predict([text])[0] for text in mixed]), atol=1e-6
    )
    assert one(shared_bundle.texts[1], shared_bundle.texts[2]).probability == pytest.approx(
        one.predict(mixed)[1].probability, abs=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 3, 80, 1000])
def test_batches_change_neither_order_nor_answers(batch_size: int, shared_bundle: Any) -> None:
    """Texts are sorted by length inside: an answer that went to the wrong text would show here."""
    one = Bundle.load(shared_bundle.folder, file=FULL)
    wanted = shared_bundle.probabilities(shared_bundle.texts)
    np.testing.assert_allclose(matrix(one.predict(shared_bundle.texts, batch_size=batch_size)), wanted, atol=1e-5)


def test_a_prediction_is_the_most_probable_label(bundle: Bundle, shared_bundle: Any) -> None:
    prediction = bundle(shared_bundle.texts[0])
    assert list(prediction.probabilities) == ["arrival", "exchange", "password"]
    assert sum(prediction.probabilities.values()) == pytest.approx(1.0, abs=1e-5)
    assert prediction.probability == max(prediction.probabilities.values())
    assert prediction.probabilities[prediction.label] == prediction.probability
    assert json.loads(json.dumps(prediction.to_json())) == prediction.to_json()


def test_streaming_keeps_order_and_holds_little(shared_bundle: Any) -> None:
    """A stream that listed its input first would have read all 2,000 texts before the first answer."""
    bundle, read = Bundle.load(shared_bundle.folder, file=FULL), 0

    def endless() -> Iterator[str]:
        nonlocal read
        for number in range(2000):
            read += 1
            yield shared_bundle.texts[number % len(shared_bundle.texts)]

    stream = bundle.stream(endless())
    first = next(stream)
    assert read == STREAM
    rest = list(stream)
    assert read == 2000
    again = bundle.predict(shared_bundle.texts)
    labels = [prediction.label for prediction in [first, *rest]]
    assert labels == [again[number % len(again)].label for number in range(2000)]


def test_a_stream_answers_what_stands_before_a_text_that_it_refuses(shared_bundle: Any) -> None:
    bundle = Bundle.load(shared_bundle.folder, file=FULL)
    place = STREAM + 3
    texts = [*(shared_bundle.texts[number % 5] for number in range(place)), None, "behind it"]
    answered = []
    with pytest.raises(DataError, match=rf"^text {place}: None is no text\."):
        answered.extend(prediction.label for prediction in bundle.stream(texts))
    again = bundle.predict(shared_bundle.texts[:5])
    assert answered == [again[number % 5].label for number in range(place)]


def test_memory_of_a_stream_does_not_grow(tiny_bundle: Path) -> None:
    """Ten times the texts take the same memory: measured in a process of its own, by the kernel."""
    program = (
        "import resource, sys\n"
        "from distill.export.runtime import Bundle\n"
        "bundle = Bundle.load(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "texts = lambda n: (f'where is my card {number}' for number in range(n))\n"
        "assert sum(1 for _ in bundle.stream(texts(1000))) == 1000; small = peak()\n"
        "assert sum(1 for _ in bundle.stream(texts(10000))) == 10000; print(peak() - small)\n"
    )
    grown_kilobytes = int(run(program, str(tiny_bundle)))
    assert grown_kilobytes < 8000


def test_nothing_to_predict(bundle: Bundle) -> None:
    assert bundle.predict([]) == []
    assert list(bundle.stream([])) == []


def test_long_texts_lose_their_end(bundle: Bundle, shared_bundle: Any) -> None:
    text = " ".join(shared_bundle.texts[:30])
    row = bundle.encode([text])[0]["input_ids"]
    assert len(row) == bundle.max_length == 48
    assert row == shared_bundle.tokenizer(text, truncation=True, max_length=48)["input_ids"]
    pair = bundle.encode([(text, text)])[0]["input_ids"]
    assert pair == shared_bundle.tokenizer(text, text, truncation=True, max_length=48)["input_ids"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\r\n ",
        "\x00\x07\x1b[31m",
        "\u202e\ufeff\u200b",
        "e\u0301\u0327" * 50,
        "日本語 العربية עברית ไทย",
        "🙂👩‍👩‍👧🏽",
        "where is my card " * 20_000,
        "a" * 200_000,
    ],
    ids=["empty", "blank", "control", "invisible", "combining", "scripts", "emoji", "340 kB", "one word"],
)
def test_any_string_is_split_as_transformers_does(text: str, bundle: Bundle, shared_bundle: Any) -> None:
    assert (
        bundle.encode([text])[0]["input_ids"] == shared_bundle.tokenizer(text, truncation=True, max_length=48).input_ids
    )
    assert sum(bundle(text).probabilities.values()) == pytest.approx(1.0, abs=1e-5)


def test_half_a_surrogate_pair_is_replaced(bundle: Bundle) -> None:
    """Browsers send U+FFFD for it; UTF-8, and so the tokenizer, cannot hold it."""
    assert bundle("card \ud83d today") == bundle("card \ufffd today")
    assert bundle("card", "\ud83d") == bundle("card", "\ufffd")
    assert bundle.encode(["\ud83d\ude42"]) == bundle.encode(["🙂"])


@pytest.mark.parametrize("value", [None, 3, b"bytes", ("one",), ("a", 3), ["a", "b", "c"]])
def test_what_is_no_text_is_refused(value: Any, bundle: Bundle) -> None:
    with pytest.raises(DataError, match=r"text 1: .* is no text\. Give strings, or tuples of two strings"):
        bundle.predict(["fine", value])


def test_threads_change_no_label(shared_bundle: Any) -> None:
    answers = [matrix(Bundle.load(shared_bundle.folder, threads=n).predict(shared_bundle.texts)) for n in (1, 2, 0)]
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-4)
    np.testing.assert_allclose(answers[2], answers[0], atol=1e-4)
    options = Bundle.load(shared_bundle.folder, threads=2).model.session.get_session_options()
    assert options.intra_op_num_threads == 2


def test_a_bundle_is_small_enough_to_open_twice(tiny_bundle: Path) -> None:
    """Setting truncation on one must not reach the other."""
    first, second = Bundle.load(tiny_bundle), Bundle.load(tiny_bundle)
    first.tokenizer.enable_truncation(4)
    assert len(second.encode(["where is my new card today"])[0]["input_ids"]) > 4


def test_a_text_is_cut_where_its_tokenizer_cuts(own_bundle: Path) -> None:
    path = own_bundle / "tokenizer_config.json"
    text = "where is my new card and how do i get it " * 9
    right = Bundle.load(own_bundle)
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    words, left = AutoTokenizer.from_pretrained(own_bundle), Bundle.load(own_bundle)
    (encoded,) = left.encode([text])
    trained = TASKS["text-classification"].encode({"text": [text], "label": [None]}, words, left.max_length)
    assert encoded["input_ids"] == trained[0]["input_ids"].tolist()
    assert encoded != right.encode([text])[0]
    left(text)
    assert (left.cut, left.lost, right.lost) == (1, "beginning", "end")
    words.save_pretrained(own_bundle / "again")
    assert AutoTokenizer.from_pretrained(own_bundle / "again").truncation_side == "left"


def test_a_call_has_room_for_what_it_returns(shared_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model with a wide vocabulary returns gigabytes for a batch of long texts."""
    bundle = Bundle.load(shared_bundle.folder)
    windows = [bundle.head.windows(bundle.reader, ["card " * length])[0][0] for length in (30, 1, 2, 30, 1, 2, 30)]
    assert [sorted(places) for places in bundle._batches(windows, 4)] == [[1, 2, 4, 5], [0, 3, 6]]
    longest = max(len(one.ids) for one in windows)
    bundle.model.width = 1000
    monkeypatch.setattr("distill.export.runtime.ROOM", 2 * longest * 4 * 1000)
    assert [sorted(places) for places in bundle._batches(windows, 7)] == [[1, 4], [2, 5], [0, 3], [6]]
    assert [len(places) for places in bundle._batches(windows[:1], 7)] == [1]


# -- what is refused ------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: there is no such folder\. Name the folder of a bundle"):
        Bundle.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [QUANTIZED, "tokenizer.json", "config.json"])
def test_a_missing_file_is_named(name: str, own_bundle: Path) -> None:
    (own_bundle / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing\. Copy the whole bundle again"):
        Bundle.load(own_bundle)


@pytest.mark.parametrize("name", [QUANTIZED, "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]"], ids=["empty", "cut", "binary", "list"])
def test_a_broken_file_is_one_line(name: str, content: bytes, own_bundle: Path) -> None:
    (own_bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{Path(name).name}: .*Copy the whole bundle again") as caught:
        Bundle.load(own_bundle)
    assert "\n" not in str(caught.value)


def test_a_cut_off_graph(own_bundle: Path) -> None:
    """A copy that stopped half-way."""
    path = own_bundle / QUANTIZED
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(BundleError, match=r"model_quantized\.onnx: it is no ONNX file\. Copy the whole bundle again"):
        Bundle.load(own_bundle)


def test_a_graph_without_metadata(own_bundle: Path) -> None:
    model = onnx.load(own_bundle / QUANTIZED)
    del model.metadata_props[:]
    onnx.save(model, own_bundle / QUANTIZED)
    with pytest.raises(BundleError, match=r"its metadata has no usable 'distill\.task'\. Export it again"):
        Bundle.load(own_bundle)


@pytest.mark.parametrize("key, value", [("distill.labels", "{"), ("distill.max_length", "long"), ("distill.task", "x")])
def test_metadata_that_makes_no_sense(key: str, value: str, own_bundle: Path) -> None:
    model = onnx.load(own_bundle / QUANTIZED)
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    onnx.save(model, own_bundle / QUANTIZED)
    with pytest.raises(BundleError, match="its metadata has no usable"):
        Bundle.load(own_bundle)


def test_labels_of_another_export(own_bundle: Path) -> None:
    config = json.loads((own_bundle / "config.json").read_text())
    config["id2label"] = {"0": "exchange", "1": "arrival", "2": "password"}
    (own_bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"labels \['exchange', .*are not the graph's \['arrival'"):
        Bundle.load(own_bundle)


@pytest.mark.parametrize("file", ["../secret.onnx", "onnx/../../secret.onnx", "ABSOLUTE"])
def test_a_file_outside_the_folder(file: str, own_bundle: Path) -> None:
    secret = own_bundle.parent / "secret.onnx"
    secret.write_bytes((own_bundle / QUANTIZED).read_bytes())
    with pytest.raises(BundleError, match="lies outside the bundle"):
        Bundle.load(own_bundle, file=str(secret) if file == "ABSOLUTE" else file)


@pytest.mark.parametrize("name", [QUANTIZED, "tokenizer.json", "config.json"])
def test_a_link_out_of_the_folder(name: str, own_bundle: Path) -> None:
    outside = own_bundle.parent / "outside"
    (own_bundle / name).rename(outside)
    (own_bundle / name).symlink_to(outside)
    with pytest.raises(BundleError, match=f"{name} lies outside the bundle"):
        Bundle.load(own_bundle)


def test_a_folder_linked_out(own_bundle: Path) -> None:
    (own_bundle / "onnx").rename(own_bundle.parent / "elsewhere")
    (own_bundle / "onnx").symlink_to(own_bundle.parent / "elsewhere")
    with pytest.raises(BundleError, match="lies outside the bundle"):
        Bundle.load(own_bundle)


def with_external(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", "../../secret.bin")):  # any order is valid
        tensor.external_data.add(key=key, value=value)


def in_initializer(model: onnx.ModelProto) -> None:
    with_external(next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 64))


def in_constant(model: onnx.ModelProto) -> None:
    tensor = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], [1.0])
    with_external(tensor)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))


def in_branch(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], [1.0])
    with_external(inner)
    branch = onnx.helper.make_graph([], "branch", [], [], [inner])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch))


def in_function(model: onnx.ModelProto) -> None:
    tensor = onnx.helper.make_tensor("hidden", onnx.TensorProto.FLOAT, [1], [1.0])
    with_external(tensor)
    node = onnx.helper.make_node("Constant", [], ["o"], value=tensor)
    model.functions.append(onnx.helper.make_function("own", "F", [], ["o"], [node], []))


def in_sparse(model: onnx.ModelProto) -> None:
    values = onnx.helper.make_tensor("values", onnx.TensorProto.FLOAT, [1], [1.0])
    with_external(values)
    indices = onnx.helper.make_tensor("indices", onnx.TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4]))


@pytest.mark.parametrize("hide", [in_initializer, in_constant, in_branch, in_function, in_sparse])
def test_weights_kept_outside_are_refused_wherever_they_are_named(
    hide: Callable[[onnx.ModelProto], None], own_bundle: Path
) -> None:
    """The file could name any path of the machine that loads it."""
    model = onnx.load(own_bundle / QUANTIZED)
    hide(model)
    (own_bundle / QUANTIZED).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"model_quantized\.onnx: it keeps weights outside itself"):
        Bundle.load(own_bundle)


def test_a_tag_that_readers_read_differently_is_refused(own_bundle: Path) -> None:
    """ONNX Runtime drops what is above 32 bits, and finds the graph in a field that seems unknown."""
    model = onnx.load(own_bundle / QUANTIZED)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = bytes(len(graph) >> 7 * place & 127 | (128 if place < 4 else 0) for place in range(5))
    (own_bundle / QUANTIZED).write_bytes(model.SerializeToString() + b"\xba\x80\x80\x80\x10" + size + graph)
    assert onnxruntime.InferenceSession(own_bundle / QUANTIZED, providers=["CPUExecutionProvider"]).get_outputs()
    with pytest.raises(BundleError, match="it is no ONNX file"):
        refuse_external_data(own_bundle / QUANTIZED)


def test_words_about_places_are_no_external_data(own_bundle: Path) -> None:
    """A label called `location`, and tensors that say their data are here, as `onnx` writes after gathering them."""
    model = onnx.load(own_bundle / QUANTIZED)
    model.metadata_props.add(key="location", value="location")
    for tensor in model.graph.initializer:
        tensor.data_location = onnx.TensorProto.DEFAULT
    (own_bundle / QUANTIZED).write_bytes(model.SerializeToString())
    refuse_external_data(own_bundle / QUANTIZED)
    assert Bundle.load(own_bundle)("where is my card").label


def test_random_bytes_never_escape_the_walk(tmp_path: Path) -> None:
    """Whatever the file holds, the answer is yes or one line."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        path = tmp_path / "noise.onnx"
        path.write_bytes(b"\x3a" + rng.integers(0, 256, rng.integers(1, 200), np.uint8).tobytes())
        with pytest.raises(BundleError, match=r"no ONNX file|cannot load it|outside itself"):
            OnnxModel(path)


# -- what is imported ------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "datasets", "onnx", "onnx_ir", "sklearn", "pydantic", "typer", "rich", "jinja2")


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answering_loads_numpy_onnxruntime_and_tokenizers_alone(tiny_bundle: Path) -> None:
    program = (
        "import sys\nbefore = set(sys.modules)\nfrom distill import Bundle\n"
        "Bundle.load(sys.argv[1])('where is my card')\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('distill')))"
    )
    packages, ours = run(program, str(tiny_bundle)).splitlines()
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(packages.split())
    assert not set(packages.split()) & set(HEAVY)
    rest = [name for name in ours.split() if not name.startswith("distill.heads")]
    inside = ["dual_encoder", "onnx_model", "pieces", "runtime", "sessions", "single_file", "writer"]
    assert rest == ["distill", "distill.errors", "distill.export", *(f"distill.export.{name}" for name in inside)]
