"""What the demo page is written of, and what it refuses; tests/clients drives it in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distill.errors import BundleError, MissingExtraError, OutputError
from distill.export.demo_page import SHIPPED, VENDOR, WEB, write_demo_page


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """Stands for a node_modules: the page's own files are at stake here, not npm's."""
    for name in VENDOR:
        (tmp_path / "node_modules" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "node_modules" / name).write_text(name)
    return tmp_path / "node_modules"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_page_bundle_and_vendor_alone(tiny_bundle: Path, modules: Path, tmp_path: Path) -> None:
    page = write_demo_page(tiny_bundle, tmp_path / "page", modules=modules)
    assert page == tmp_path / "page" / "index.html"
    assert files(tmp_path / "page") == {
        *("index.html", "page.css", "page.js"),
        *(f"vendor/{Path(name).name}" for name in VENDOR),
        *(f"bundle/{name}" for name in SHIPPED),
    }


def test_what_the_page_names_is_there(tiny_bundle: Path, modules: Path, tmp_path: Path) -> None:
    folder = write_demo_page(tiny_bundle, tmp_path / "page", modules=modules).parent
    html, script = (folder / "index.html").read_text(), (folder / "page.js").read_text()
    named = {*re.findall(r'(?:src|href)="([^":]+)"', html), *re.findall(r'from "\./([^"]+)"', script)}
    assert named
    assert named <= files(folder)


def test_it_asks_nobody_else() -> None:
    """No address of another machine in any file of ours, and a policy that would stop one."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in WEB.iterdir()}
    addresses = [url for text in texts.values() for url in re.findall(r"https?://[^\s\"'`]+", text)]
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name, not a place
    assert "default-src 'none'" in texts["index.html"]
    assert "innerHTML" not in texts["page.js"]


def test_a_newer_page_replaces_an_older_one(tiny_bundle: Path, modules: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    write_demo_page(tiny_bundle, folder, modules=modules)
    (folder / "left-over.txt").touch()
    write_demo_page(tiny_bundle, folder, modules=modules)
    assert "left-over.txt" not in files(folder)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_page_stays(kind: str, tiny_bundle: Path, modules: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    if kind == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    else:
        place.write_text("years of work")
    with pytest.raises(OutputError, match=r"mine: holds something that is no demo page\. Name a new folder"):
        write_demo_page(tiny_bundle, place, modules=modules)
    assert "years of work" in (place if kind == "file" else place / "thesis.txt").read_text()


def test_a_broken_bundle_makes_no_page(own_bundle: Path, modules: Path, tmp_path: Path) -> None:
    (own_bundle / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        write_demo_page(own_bundle, tmp_path / "page", modules=modules)
    assert not (tmp_path / "page").exists()


def test_a_package_that_is_missing_is_named(tiny_bundle: Path, modules: Path, tmp_path: Path) -> None:
    (modules / VENDOR[1]).unlink()
    wanted = r"ort\.wasm\.min\.mjs is missing\. Run: npm install @huggingface/tokenizers@\S+ onnxruntime-web@\S+"
    with pytest.raises(MissingExtraError, match=wanted):
        write_demo_page(tiny_bundle, tmp_path / "page", modules=modules)


def test_without_npm(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"this needs npm, which is not installed\. Install Node\.js 20"):
        write_demo_page(tiny_bundle, tmp_path / "page")


def test_npm_that_fails_leaves_nothing(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-filled cache would be taken for a whole one the next time."""
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no route to registry >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MissingExtraError, match=r"npm cannot install .* \(no route to registry\)"):
        write_demo_page(tiny_bundle, tmp_path / "page")
    assert list((tmp_path / "cache" / "distill").iterdir()) == []
