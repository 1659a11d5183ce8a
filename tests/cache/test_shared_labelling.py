"""The processes of one launch share the labelling: the same bytes as from one, killed in the middle or not."""

import json

import pytest

BEFORE = """
import functools
import distill.cache.labelling
import distill.cache.cached_teacher as made
distill.cache.labelling.build_cache = functools.partial(made.build_cache, shard_examples=16)
write = made.write_shard
def write_and_die(path, content):
    write(path, content)
    died = path.parent.parent / ("died-" + os.environ["RANK"])
    if path.parts[-4] == "killed" and len(list(path.parent.glob("shard-*s"))) >= 7 and not died.exists():
        died.touch()
        os._exit(0)
made.write_shard = write_and_die

import pathlib
import distill.lessons
import distill.data.packing as packing
distill.lessons.LARGE = 1
pack = packing._write
def pack_and_tell(parts, folder):
    pathlib.Path(todo[0][0]).with_name("packed-by-" + os.environ["RANK"]).touch()
    return pack(parts, folder)
packing._write = pack_and_tell
"""
"""Shards of 16 rows, token ids on disk; in the run `killed` each process ends without a word after a few shards."""


@pytest.fixture
def recipe(quiet_teacher, intents_folder):
    train, validation = (str(intents_folder / f"{split}.csv") for split in ("train", "validation"))
    return {
        "teacher": {"checkpoint": str(quiet_teacher)},
        "student": {"layers": 1},
        "data": {"train": train, "validation": validation, "max_length": 32},
        "training": {"precision": "fp32"},
    }


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "work" / "cache").iterdir() if path.name != ".lock"}


def test_one_process_and_two_write_the_same_bytes(tmp_path, launch, recipe):
    """And only the first one packs what all of them read."""
    launch(BEFORE, "label", one=(1, recipe), two=(2, recipe), killed=([2, 2], recipe)).end()
    alone = files(tmp_path / "one")
    assert len(alone) > 10
    assert None not in json.loads(alone["index.json"])["shards"]
    assert files(tmp_path / "two") == alone
    assert len(list((tmp_path / "killed" / "work").glob("died-?"))) == 2
    assert files(tmp_path / "killed") == alone
    assert [path.name for path in tmp_path.glob("packed-by-*")] == ["packed-by-0"]
    assert len(list((tmp_path / "two" / "work" / "encoded").iterdir())) == 1
