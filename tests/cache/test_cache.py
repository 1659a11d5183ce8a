"""The teacher cache: the same answers as the live teacher, whatever happens while they are written down."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from distill.cache import cached_teacher
from distill.cache.cached_teacher import CachedTeacher, build_cache, cache_key, encoded_hash
from distill.errors import CacheError, OutputError, TeacherError
from distill.progress import SILENT
from distill.teacher import LiveTeacher

TAPS = ("logits", "hidden.0", "hidden.2", "query.1", "scores.2")
LAYERS, WIDTH, HEADS = 2, 32, 4


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
        mask[index, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "example": torch.tensor([row["example"] for row in rows])}


class BertTeacher:
    """A live teacher of a tiny BERT: logits, hidden states, queries and attention scores."""

    def __init__(self, taps=TAPS, *, tokens=False):
        self.taps = frozenset(taps)
        torch.manual_seed(7)
        config = transformers.BertConfig(
            vocab_size=30522, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=64, num_labels=3,
        )  # fmt: skip
        kind = transformers.BertForTokenClassification if tokens else transformers.BertForSequenceClassification
        self.model = kind(config).eval()
        self.calls = 0
        self.wrong = {}

    def features(self, batch):
        self.calls += 1
        with torch.no_grad():
            output = self.model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
            features = {"logits": output.logits}
            for number, hidden in enumerate(output.hidden_states):
                features[f"hidden.{number}"] = hidden
            for number, layer in enumerate(self.model.bert.encoder.layer, 1):
                attention, source = layer.attention.self, output.hidden_states[number - 1]
                query, key = attention.query(source), attention.key(source)
                split = (len(query), -1, HEADS, WIDTH // HEADS)
                scores = torch.einsum("bqhd,bkhd->bhqk", query.view(split), key.view(split)) / (WIDTH // HEADS) ** 0.5
                features |= {f"query.{number}": query, f"scores.{number}": scores}
        for (tap, example), value in self.wrong.items():
            features[tap][batch["example"] == example] = value
        return {tap: features[tap].float() for tap in self.taps}


@pytest.fixture(scope="session")
def sentences(shared_data, minilm_folder):
    """60 real sentences of 3 to 50 tokens, numbered from 100 as in a later part of a transfer set."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    with (shared_data / "sst2/dev.csv").open() as file:
        texts = [row["text"] for row in csv.DictReader(file)][:60]
    encoded = [
        {"input_ids": ids, "length": len(ids), "example": 100 + n}
        for n, ids in enumerate(tokenizer(texts)["input_ids"])
    ]
    return texts, encoded


@pytest.fixture
def encoded(sentences):
    return sentences[1]


@pytest.fixture
def build(tmp_path, encoded):
    def build(teacher, folder="cache", **options):
        rows = options.pop("encoded", encoded)
        options = {"key": "one", "shard_examples": 16, "batch_size": 8} | options
        return build_cache(teacher, rows, collate, tmp_path / folder, **options)

    return build


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def draw(encoded, places):
    return collate([encoded[place] for place in places])


def assert_same(cached, live, batch, *, approximately=1e-3):
    assert cached.keys() == live.keys()
    mask = batch["attention_mask"].bool()
    for tap, value in live.items():
        assert cached[tap].dtype == value.dtype == torch.float32
        assert cached[tap].shape == value.shape
        assert cached[tap].device == value.device
        assert not cached[tap].requires_grad
        valid = torch.ones(value.shape, dtype=torch.bool)
        if value.ndim == 3:
            valid = mask[..., None].expand_as(value)
        if value.ndim == 4:
            valid = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(value)
        tolerance = 1e-5 if tap == "logits" else approximately  # fp16 keeps 11 bits
        torch.testing.assert_close(cached[tap][valid], value[valid], atol=tolerance, rtol=tolerance)
        assert (cached[tap][~valid] == 0).all()


# The trainer cannot tell


@pytest.mark.parametrize("tokens", [False, True], ids=["a label a sentence", "a label a token"])
def test_the_trainer_cannot_tell_a_cached_teacher_from_a_live_one(build, encoded, tokens):
    live = BertTeacher(tokens=tokens)
    cached = build(live)
    assert cached.taps == live.taps
    assert len(cached) == 60

    @given(places=st.lists(st.integers(0, 59), min_size=1, max_size=9), more=st.integers(0, 3))
    @settings(max_examples=40, deadline=None)
    def same(places, more):
        batch = draw(encoded, places)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, more))
        assert_same(cached.features(batch), live.features(batch), batch)

    same()


def test_padding_may_stand_on_the_left(build, encoded):
    live = BertTeacher()
    cached = build(live)
    batch = draw(encoded, [3, 40, 12])
    left = {name: value.flip(1) if value.ndim == 2 else value for name, value in batch.items()}
    features, flipped = cached.features(batch), cached.features(left)
    lengths = batch["attention_mask"].sum(1).tolist()
    longest = max(lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(flipped["hidden.2"][row, longest - length :], features["hidden.2"][row, :length])
        block = flipped["scores.2"][row, :, longest - length :, longest - length :]
        torch.testing.assert_close(block, features["scores.2"][row, :, :length, :length])


def test_padding_may_stand_in_the_middle(build, encoded):
    cached = build(BertTeacher())
    batch = draw(encoded, [3, 40, 12])
    length = batch["attention_mask"].shape[1]
    apart = torch.cat([torch.arange(2), torch.arange(3, length + 1)])  # a hole after the second token
    holed = {"example": batch["example"], "attention_mask": torch.zeros(3, length + 1, dtype=torch.long)}
    holed["attention_mask"][:, apart] = batch["attention_mask"]
    features, spread = cached.features(batch), cached.features(holed)
    assert torch.equal(spread["hidden.2"][:, apart], features["hidden.2"])
    assert torch.equal(spread["scores.2"][:, :, apart][..., apart], features["scores.2"])
    assert not spread["hidden.2"][:, 2].any()


def test_values_past_fp16_are_kept_in_fp32(build, encoded):
    live = BertTeacher()
    live.wrong = {("hidden.2", 120): 1e6}
    cached = build(live)
    value = cached.features(draw(encoded, [20, 21, 0]))["hidden.2"]
    assert value[0, 0, 0] == 1e6
    assert_same(cached.features(draw(encoded, [21, 0])), live.features(draw(encoded, [21, 0])), draw(encoded, [21, 0]))


def test_real_teacher_with_real_weights(build, encoded, minilm_folder):
    teacher = pytest.importorskip("distill.teacher", exc_type=ImportError)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder)
    live = teacher.LiveTeacher(model, ["logits", "hidden.0", "hidden.6", "scores.6"])
    cached = build(live, encoded=encoded[:24])
    batch = draw(encoded, [5, 9, 2])
    assert_same(cached.features(batch), live.features(batch), batch, approximately=5e-3)


# Interruption


def test_a_part_of_the_answers_is_the_same_bytes_whenever_it_was_made(build, tmp_path):
    whole = bytes_of(build(BertTeacher()).folder)
    assert len(whole) == 4
    live = BertTeacher()
    live.wrong = {("logits", 140): float("nan")}
    with pytest.raises(TeacherError, match="not finite"):
        build(live, "other")
    assert len(bytes_of(tmp_path / "other")) == 2
    live.wrong, live.calls = {}, 0
    assert bytes_of(build(live, "other").folder) == whole
    assert live.calls == 4  # two shards of 16 and 12 rows, 8 a batch


def test_finished_work_is_not_done_again(build):
    first = BertTeacher()
    build(first)
    live = BertTeacher()
    build(live)
    build(live, batch_size=3)
    assert live.calls == 0


def test_unfinished_work_is_not_finished_with_other_batches(build, encoded):
    """In bf16 a sum depends on the batch: half a cache from one batch size and half from another is no one's result."""
    live = BertTeacher()
    live.wrong = {("logits", 140): float("nan")}
    with pytest.raises(TeacherError, match="not finite"):
        build(live)
    live.wrong, live.calls = {}, 0
    build(live, batch_size=5)
    assert live.calls == 15  # all four shards of 16, 16, 16 and 12 rows


def test_batches_are_of_like_length(build, encoded):
    waste = []

    class Watched(BertTeacher):
        def features(self, batch):
            waste.append(1 - batch["attention_mask"].float().mean().item())
            return super().features(batch)

    build(Watched(), shard_examples=60, batch_size=4)
    assert sum(waste) / len(waste) < 0.1


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from distill.cache.cached_teacher import build_cache
from test_cache_worker import Slow, rows, collate
build_cache(Slow(float(sys.argv[3])), rows, collate, sys.argv[1], key="k", shard_examples=8, batch_size=4)
"""

WORKER = """
import torch
rows = [{"input_ids": list(range(1, 3 + n % 7)), "length": 2 + n % 7, "example": n} for n in range(64)]
def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "example": torch.tensor([r["example"] for r in rows])}
class Slow:
    taps = frozenset({"logits", "hidden.1"})
    def __init__(self, seconds):
        self.seconds = seconds
    def features(self, batch):
        import time
        time.sleep(self.seconds)
        hidden = torch.sin(batch["input_ids"].float()[..., None] * torch.arange(1, 9))
        return {"logits": hidden.sum(1), "hidden.1": hidden}
"""


def test_a_build_that_is_killed_at_any_point_ends_with_the_same_bytes(tmp_path):
    """A real kill, twice, each in the middle; the bytes are those of an undisturbed run."""
    (tmp_path / "test_cache_worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def start(folder, seconds):
        command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path), str(seconds)]
        return subprocess.Popen(command, env=environment)

    assert start(tmp_path / "calm", 0).wait(60) == 0
    folder = tmp_path / "killed"
    made = 0
    for _ in range(2):
        process = start(folder, 0.03)
        deadline = time.monotonic() + 60
        while len(bytes_of(folder)) <= made + 1 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        made = len(bytes_of(folder))
        assert 0 < made < 8
        with pytest.raises(CacheError, match=r"killed: \d of 8 shards are not made yet\. Label again"):
            CachedTeacher(folder)
    assert start(folder, 0).wait(60) == 0
    assert bytes_of(folder) == bytes_of(tmp_path / "calm")
    assert not list(folder.glob("*.writing"))


def test_a_shard_is_written_while_the_next_is_made(build, monkeypatch):
    going_on, write = threading.Event(), cached_teacher.write_shard

    def slow(path, content):
        if path.stem.endswith("00000"):
            assert going_on.wait(30)
        write(path, content)

    class Watched(BertTeacher):
        def features(self, batch):
            if int(batch["example"].min()) >= 116:
                going_on.set()
            return super().features(batch)

    monkeypatch.setattr(cached_teacher, "write_shard", slow)
    cache = build(Watched(), "overlapped", shard_examples=16)
    assert bytes_of(cache.folder) == bytes_of(build(BertTeacher(), "calm", shard_examples=16).folder)


def test_a_shard_that_cannot_be_written_ends_the_build(build, monkeypatch):
    write, tried = cached_teacher.write_shard, []

    def failing(path, content):
        tried.append(path.stem)
        if len(tried) == 2:
            raise PermissionError(13, "Permission denied")
        write(path, content)

    monkeypatch.setattr(cached_teacher, "write_shard", failing)
    with pytest.raises(CacheError, match="Permission denied"):
        build(BertTeacher(), "refused", shard_examples=16)
    assert tried == ["shard-00000", "shard-00001"]
    monkeypatch.undo()
    again = BertTeacher()
    cache = build(again, "refused", shard_examples=16)
    assert bytes_of(cache.folder) == bytes_of(build(BertTeacher(), "calm", shard_examples=16).folder)
    assert again.calls < len(cache) / 4  # the first shard is still there


def test_weights_are_cast_to_bf16_once(build, encoded):
    def casts(rows):
        teacher = LiveTeacher(BertTeacher().model, ["logits"], bf16=True)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen:
            build(teacher, f"of-{rows}", encoded=encoded[:rows], batch_size=4)
        return sum(
            event.count
            for event in seen.key_averages(group_by_input_shape=True)
            if event.key == "aten::_to_copy" and event.input_shapes[0] == [64, WIDTH]
        )

    assert casts(4) == casts(12) == LAYERS


def test_two_builders_share_the_work(build, tmp_path):
    live, said = BertTeacher(), []
    calm = bytes_of(build(live, "calm").folder)
    alone, live.calls = live.calls, 0
    threads = [threading.Thread(target=lambda: said.append(build(live, "both"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 3
    assert live.calls == alone
    assert bytes_of(tmp_path / "both") == calm


# Damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "a lost end": lambda path: os.truncate(path, path.stat().st_size - 7),
    "nothing left": lambda path: os.truncate(path, 0),
    "a lost file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_shard_is_noticed_and_made_anew_alone(build, damage):
    live = BertTeacher()
    folder = build(live).folder
    whole = bytes_of(folder)
    untouched = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    damage(folder / "shard-00002.safetensors")
    with pytest.raises(CacheError, match=r"shard-00002\.safetensors: missing, or not the bytes that were written"):
        CachedTeacher(folder)
    live.calls = 0
    build(live)
    assert live.calls == 2
    assert bytes_of(folder) == whole
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == untouched


def test_a_damaged_cache_of_more_than_is_read_is_made_anew_as_a_whole(build, monkeypatch):
    folder = build(BertTeacher()).folder
    (folder / "shard-00002.safetensors").write_bytes(b"no shard")
    said = []
    monkeypatch.setattr(SILENT, "say", said.append, raising=False)
    fewer = BertTeacher(["logits"])
    cached = build(fewer)
    count = len(cached._shards)
    assert said == [f"teacher cache: 1 of {count} shards are damaged and hold more than is read now: all are made anew"]
    assert fewer.calls == 2 * count


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_an_index_that_cannot_be_used_is_made_anew(build, content):
    folder = build(BertTeacher()).folder
    whole = bytes_of(folder)
    (folder / "index.json").write_text(content)
    with pytest.raises(CacheError, match=r"cache: there is no teacher cache\. Label first"):
        CachedTeacher(folder)
    assert bytes_of(build(BertTeacher()).folder) == whole


def test_a_shard_that_lies_about_its_size_is_refused(build):
    """Checksums are not looked at here, as when another process has just compared them."""
    folder = build(BertTeacher()).folder
    path = folder / "shard-00001.safetensors"
    header = json.dumps({"__metadata__": {"distill.kinds": '{"logits": "row"}'},
                         "lengths": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
                         "logits": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 1 << 40]}})  # fmt: skip
    header = header.encode()
    for content in (b"", b"\xff" * 64, len(header).to_bytes(8, "little") + header + bytes(16)):
        path.write_bytes(content)
        with pytest.raises(CacheError, match=r"shard-00001\.safetensors: not a readable shard"):
            CachedTeacher(folder, verify=False)


def test_a_full_disk_is_one_line_and_loses_nothing(build, tmp_path):
    """/dev/full is a disk that is always full."""
    live = BertTeacher()
    whole = bytes_of(build(live, "whole").folder)
    folder = tmp_path / "cache"
    live.wrong = {("logits", 140): float("nan")}
    with pytest.raises(TeacherError, match="not finite"):
        build(live)  # two shards are done
    live.wrong = {}
    (folder / "shard-00002.safetensors.writing").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"cache: the disk is full \(\d+ MB free\)\. Free some space"):
        build(live)
    assert len(bytes_of(folder)) == 2
    assert not list(folder.glob("*.writing"))
    assert bytes_of(build(live).folder) == whole


def test_a_folder_that_cannot_be_written(build, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"file/cache: cannot be written \(Not a directory\)\. Set `output`"):
        build(BertTeacher(), "file/cache")


# What it was made from


def key_of(**changes):
    values = {"weights_hash": "w", "tokenizer_hash": "t", "max_length": 64, "taps": TAPS, "dtype": "fp32"}
    return cache_key(**(values | {"texts_hash": "x"} | changes))


@pytest.mark.parametrize(
    "changes",
    [{"weights_hash": "v"}, {"tokenizer_hash": "u"}, {"max_length": 32}, {"dtype": "bf16"}, {"texts_hash": "y"}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_key_is_another_cache(build, changes):
    live = BertTeacher()
    build(live, key=key_of())
    calls = live.calls
    build(live, key=key_of())
    assert live.calls == calls
    build(live, key=key_of(**changes))
    assert live.calls == 2 * calls
    assert key_of(**changes).digest != key_of().digest


def test_fewer_taps_are_served_by_the_cache_that_is_there(build, encoded):
    build(BertTeacher(), key=key_of())
    live = BertTeacher(["logits", "hidden.2"])
    cached = build(live, key=key_of(taps=live.taps))
    assert live.calls == 0
    batch = draw(encoded, [1, 2])
    assert_same(cached.features(batch), live.features(batch), batch)
    live.calls = 0
    flip(cached.folder / "shard-00001.safetensors")  # cannot be mended with fewer taps: all is made anew
    assert build(live, key=key_of(taps=live.taps)).nbytes < cached.nbytes
    assert live.calls == 8


def test_more_taps_make_it_anew(build, encoded):
    build(BertTeacher(["logits"]), key=key_of(taps=["logits"]))
    live = BertTeacher()
    assert build(live, key=key_of()).taps == live.taps


def test_taps_that_are_not_there(build):
    folder = build(BertTeacher(["logits", "hidden.2"])).folder
    assert CachedTeacher(folder, ["hidden.2"]).taps == {"hidden.2"}
    with pytest.raises(CacheError, match=r"it has no hidden\.1, scores\.2; it has hidden\.2, logits\. Label again"):
        CachedTeacher(folder, ["hidden.1", "logits", "scores.2"])


def test_the_hash_of_rows_sees_every_token(encoded):
    first = encoded_hash(encoded)
    assert encoded_hash([dict(row) for row in encoded]) == first
    changed = [dict(row) for row in encoded]
    changed[5] = changed[5] | {"input_ids": [*changed[5]["input_ids"][:-1], 7]}
    assert encoded_hash(changed) != first
    assert encoded_hash(encoded[1:]) != first
    assert encoded_hash([{"input_ids": [1, 2]}, {"input_ids": [3]}]) != encoded_hash(
        [{"input_ids": [1]}, {"input_ids": [2, 3]}]
    )


# Bad answers and bad questions


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_answers_that_are_not_finite_name_the_text(build, sentences, tap, value):
    live = BertTeacher()
    live.wrong = {(tap, 123): value}
    texts = sentences[0]
    with pytest.raises(
        TeacherError, match=rf"teacher: its {tap} are not finite .* row 24 of the transfer set, '"
    ) as caught:
        build(live, text_of=lambda row: texts[row])
    assert texts[23][:40] in str(caught.value)
    with pytest.raises(TeacherError, match=r"row 24 of the transfer set, token ids \[101, "):
        build(live)


def test_padding_may_be_anything(build, encoded):
    """Some models give NaN where there is only padding: that is nobody's answer."""

    class Odd(BertTeacher):
        def features(self, batch):
            features = super().features(batch)
            features["hidden.2"][batch["attention_mask"] == 0] = float("nan")
            return features

    batch = draw(encoded, [1, 30])
    assert torch.isfinite(build(Odd()).features(batch)["hidden.2"]).all()


def test_examples_that_are_not_in_the_cache(build, encoded):
    cached = build(BertTeacher())
    batch = draw(encoded, [0, 1])
    with pytest.raises(CacheError, match=r"it holds examples 100 to 159; asked for 160"):
        cached.features(batch | {"example": torch.tensor([100, 160])})
    with pytest.raises(CacheError, match=r"example 102 has \d+ tokens, the cache knows \d+\. Label and train with"):
        cached.features(batch | {"example": torch.tensor([100, 102])})


def test_nothing_to_label(build, encoded):
    with pytest.raises(CacheError, match="there is nothing to label"):
        build(BertTeacher(), encoded=[])
    with pytest.raises(CacheError, match="59 rows are numbered 100 to 159"):
        build(BertTeacher(), encoded=encoded[:7] + encoded[8:])


def test_progress_counts_every_sentence(build, encoded):
    done = []

    class Stage:
        def advance(self, steps=1):
            done.append(steps)

        def note(self, text):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    class Progress:
        def stage(self, name, total=None, unit="steps"):
            done.append(-total)
            return Stage()

        def say(self, text):
            pass

        def table(self, title, columns, rows):
            pass

    folder = build(BertTeacher(), progress=Progress()).folder
    assert sum(done) == 0
    (folder / "shard-00001.safetensors").unlink()
    done.clear()
    build(BertTeacher(), progress=Progress())
    assert sum(done) == 0


def test_files_are_plain_safetensors(build, encoded):
    import safetensors.numpy

    folder = build(BertTeacher()).folder
    index = json.loads((folder / "index.json").read_text())
    path = folder / "shard-00000.safetensors"
    assert index["shards"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = safetensors.numpy.load_file(path)
    tokens = sum(len(row["input_ids"]) for row in encoded[:16])
    assert {name: (value.dtype, value.shape) for name, value in tensors.items()} == {
        "lengths": (np.int64, (16,)),
        "logits": (np.float32, (16, 3)),
        "hidden.0": (np.float16, (tokens, WIDTH)),
        "hidden.2": (np.float16, (tokens, WIDTH)),
        "query.1": (np.float16, (tokens, WIDTH)),
        "scores.2": (np.float16, (HEADS * sum(len(row["input_ids"]) ** 2 for row in encoded[:16]),)),
    }


def test_long_texts_make_smaller_shards(build, encoded):
    folder = build(BertTeacher(["logits"]), shard_tokens=200).folder
    starts = json.loads((folder / "index.json").read_text())["starts"]
    lengths = [len(row["input_ids"]) for row in encoded]
    spans = list(itertools.pairwise(starts))
    assert starts[-1] == 60
    assert all(sum(lengths[a:b]) <= 200 and b - a <= 16 for a, b in spans)
    assert max(b - a for a, b in spans) < 16
