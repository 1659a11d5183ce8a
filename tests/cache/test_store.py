"""A cache that was uploaded serves another machine, bit for bit, and what is damaged on the way is made anew."""

import fsspec
import numpy as np
import pytest
import torch

from distill.cache.index import INDEX
from distill.cache.labelling import label_rows
from distill.errors import CacheError
from distill.tasks.encoded import pack

STORE = "memory://caches"
KEYS = ("weights_hash", "tokenizer_hash", "dtype", "texts_hash")
INPUTS = {**dict.fromkeys(KEYS, "-"), "max_length": 9}


class Counted:
    """A teacher that counts the rows it is asked about."""

    def __init__(self, taps):
        self.taps = frozenset(taps)
        self.rows = 0

    def features(self, batch):
        self.rows += len(batch["example"])
        logits = batch["example"][:, None].float() * torch.tensor([1.0, 0.5])
        found = {"logits": logits, "hidden.1": batch["attention_mask"][..., None] * logits[:, None]}
        return {tap: found[tap] for tap in self.taps}


@pytest.fixture
def rows():
    return pack({"input_ids": [[5, 6, 7]] * 2100}, {"labels": np.zeros(2100, np.int64)})


def collate(rows):
    names = ("example", "attention_mask")
    wide = [{**row, "attention_mask": np.ones(3, np.int64)} for row in rows]
    return {name: torch.from_numpy(np.stack([row[name] for row in wide])) for name in names}


def label(rows, folder, store=STORE, taps=("logits",)):
    teacher = Counted(taps)
    inputs = INPUTS | {"taps": sorted(taps)}
    label_rows(lambda taps: teacher, taps, rows, collate, folder, inputs=inputs, store=store)
    return teacher.rows - 1  # one row tells how large the answers are


@pytest.fixture(autouse=True)
def emptied():
    yield
    system = fsspec.filesystem("memory")
    if system.exists("/caches"):
        system.rm("/caches", recursive=True)


def test_another_machine_fetches_what_one_has_labelled(rows, tmp_path):
    assert label(rows, tmp_path / "one") == 2100
    assert label(rows, tmp_path / "other") == 0
    names = sorted(path.name for path in (tmp_path / "one").glob("shard-*"))
    assert len(names) == 3
    for name in [INDEX, *names]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_shard_that_is_damaged_there_is_made_anew_here(rows, tmp_path):
    label(rows, tmp_path / "one")
    system = fsspec.filesystem("memory")
    path = next(path for path in system.find("/caches") if path.endswith("shard-00001.safetensors"))
    system.pipe_file(path, b"no shard")
    assert label(rows, tmp_path / "other") == 1024
    assert not list((tmp_path / "other").glob("*.writing"))


def test_a_shard_that_has_expired_there_is_made_anew_here_and_sent_again(rows, tmp_path):
    label(rows, tmp_path / "one")
    system = fsspec.filesystem("memory")
    path = next(path for path in system.find("/caches") if path.endswith("shard-00001.safetensors"))
    whole = system.cat_file(path)
    system.rm(path)
    assert label(rows, tmp_path / "other") == 1024
    assert system.cat_file(path) == whole


def test_an_index_there_that_is_none_is_written_anew(rows, tmp_path):
    label(rows, tmp_path / "one")
    system = fsspec.filesystem("memory")
    path = next(path for path in system.find("/caches") if path.endswith(INDEX))
    whole = system.cat_file(path)
    system.pipe_file(path, b"[]")
    label(rows, tmp_path / "other")
    assert system.cat_file(path) == whole


def test_a_cache_here_with_more_taps_neither_goes_there_nor_gives_way_to_what_is_there(rows, tmp_path):
    both = {"logits", "hidden.1"}
    assert label(rows, tmp_path / "one", store="", taps=both) == 2100
    whole = (tmp_path / "one" / INDEX).read_bytes()
    assert label(rows, tmp_path / "one") == 0
    assert label(rows, tmp_path / "two") == 2100
    assert label(rows, tmp_path / "three") == 0
    assert label(rows, tmp_path / "one") == 0
    assert (tmp_path / "one" / INDEX).read_bytes() == whole
    assert label(rows, tmp_path / "one", taps=both) == 0
    assert label(rows, tmp_path / "four", taps=both) == 0


def test_a_store_that_cannot_be_reached_is_named(rows, tmp_path):
    with pytest.raises(CacheError, match=r"nosuch://bucket: cannot be used .*nosuch.* Look at `cache.store`"):
        label(rows, tmp_path / "one", "nosuch://bucket")
