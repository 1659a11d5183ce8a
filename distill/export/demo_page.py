"""A folder with one static page that runs a bundle in the browser: no server code, nothing fetched from elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from distill.errors import BundleError, MissingExtraError, OutputError
from distill.export.bundle import MANIFEST
from distill.export.runtime import QUANTIZED, Bundle, inside
from distill.files import replace_folder
from distill.heads import Classifier
from distill.progress import SILENT, Progress

PACKAGES = {"@huggingface/tokenizers": "0.2.0", "onnxruntime-web": "1.30.0"}
"""What the page stands on, from npm; the versions that it was tested with."""

VENDOR = (
    "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "onnxruntime-web/dist/ort.wasm.min.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
)
"""The files of theirs that it loads, 14 MB; most are WebAssembly."""

SHIPPED = (MANIFEST, "tokenizer.json", "tokenizer_config.json", "golden.jsonl", QUANTIZED)
"""The files of the bundle that it loads."""

WEB = Path(__file__).with_name("web")
MARK = "page.js"
"""A folder without it was not made here and is not written over."""


def write_demo_page(
    bundle: str | Path, folder: str | Path, *, modules: str | Path | None = None, progress: Progress = SILENT
) -> Path:
    """Writes the page with its copy of the bundle. Any static server shows it: `python -m http.server -d FOLDER`.

    Args:
        bundle: Its folder.
        folder: Where the page goes; an older page there is replaced.
        modules: A `node_modules` with `PACKAGES`; installed with npm into a cache folder when None.
        progress: Told when npm is at work.

    Returns:
        Path of index.html.

    Raises:
        BundleError: The bundle is incomplete or unsafe.
        OutputError: `folder` holds something else.
        MissingExtraError: Neither `modules` nor npm is there, or npm fails.
    """
    bundle, folder = Path(bundle), Path(folder)
    loaded = Bundle.load(bundle)  # refuses what is broken before anything is written
    if type(loaded.head) is not Classifier:
        raise BundleError(
            f"it is made for {loaded.task}; the page shows one label a text",
            where=str(bundle),
            fix="Give a text-classification bundle.",
        )
    if loaded.side == "left":
        raise BundleError(
            "its tokenizer keeps the end of a long text (truncation_side), the page's keeps the beginning",
            where=str(bundle),
            fix="Give a bundle of a teacher that is cut on the right.",
        )
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError("holds something that is no demo page", where=str(folder), fix="Name a new folder.")
    found = Path(modules) if modules else _install(progress)
    for name in VENDOR:
        if not (found / name).is_file():
            wanted = " ".join(f"{package}@{version}" for package, version in PACKAGES.items())
            raise MissingExtraError(f"{name} is missing", where=str(found), fix=f"Run: npm install {wanted}")

    def fill(new: Path) -> None:
        for path in WEB.iterdir():
            shutil.copyfile(path, new / path.name)
        (new / "vendor").mkdir()
        for name in VENDOR:
            shutil.copyfile(found / name, new / "vendor" / Path(name).name)
        (new / "bundle" / "onnx").mkdir(parents=True)
        for name in SHIPPED:
            shutil.copyfile(inside(bundle, name), new / "bundle" / name)

    replace_folder(folder, fill)
    return folder / "index.html"


def _install(progress: Progress) -> Path:
    """The `node_modules` of a cache folder, filled by npm the first time; no script of a package is run."""
    wanted = json.dumps({"private": True, "dependencies": PACKAGES}, sort_keys=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"
    folder = cache / f"demo-page-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder / "node_modules"
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError("this needs npm, which is not installed", fix="Install Node.js 20 or newer.")

    def fill(new: Path) -> None:
        (new / "package.json").write_text(wanted, encoding="utf-8")
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=new, capture_output=True, text=True)
        if done.returncode:
            said = " ".join(done.stderr.split())[:300]
            raise MissingExtraError(f"npm cannot install {', '.join(PACKAGES)} ({said})", fix="Give a node_modules.")

    with progress.stage("Installing the page's two packages"):
        replace_folder(folder, fill)
    return folder / "node_modules"
