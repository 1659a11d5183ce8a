"""The demo page in a real browser: a person types, reads the label, and nothing leaves the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import MissingExtraError
from distill.export.bundle import golden_vectors
from distill.export.demo_page import write_demo_page
from distill.export.runtime import Bundle

pytestmark = pytest.mark.slow
TOLERANCE = 0.02  # of a probability: WebAssembly is another build than Python's
READY = "document.getElementById('about').textContent.includes('ready in')"


@pytest.fixture
def show(browser: Any, serve: Callable[[Path], str], tmp_path: Path) -> Callable[..., Any]:
    """By bundle: the browser with its page, loaded."""

    def start(bundle: Path, *, width: int = 1000, ready: str = READY) -> Any:
        try:
            page = write_demo_page(bundle, tmp_path / "page")
        except MissingExtraError as error:
            pytest.skip(str(error))
        browser.address = serve(page.parent)
        browser.open(f"{browser.address}/index.html", width=width)
        browser.wait(ready)
        return browser

    return start


def rows(page: Any) -> dict[str, float]:
    """Label to percent, as the page shows them."""
    script = "[...document.querySelectorAll('#answer li')].map(r => [...r.children].map(c => c.textContent))"
    return {label: float(share.rstrip("%")) / 100 for label, share, _ in page.ask(script)}


def verdict(page: Any) -> str:
    page.click("#check")
    told = "document.getElementById('checked').textContent"
    return str(page.wait(f"/^(Yes|No|It failed)/.test({told}) && {told}"))


def test_a_person_types_and_reads_the_label(show: Callable[..., Any], shared_bundle: Any) -> None:
    page, text = show(shared_bundle.folder), shared_bundle.texts[0]
    page.click("#text")
    page.type(text)
    page.click("#ask")
    page.wait("document.querySelectorAll('#answer li').length")
    mine = Bundle.load(shared_bundle.folder)(text)
    found = rows(page)
    assert next(iter(found)) == mine.label
    assert found == pytest.approx(mine.probabilities, abs=TOLERANCE)
    assert page.ask("document.getElementById('status').textContent").startswith(f"{mine.label}: ")
    assert page.ask("document.title") == "tiny"
    assert page.problems() == []


def test_nothing_is_fetched_from_elsewhere(show: Callable[..., Any], tiny_bundle: Path) -> None:
    page = show(tiny_bundle)
    asked = page.requested()
    assert any(url.endswith("model_quantized.onnx") for url in asked)
    assert [url for url in asked if not url.startswith((page.address, "data:"))] == []


def test_the_keyboard_is_enough(show: Callable[..., Any], shared_bundle: Any) -> None:
    page = show(shared_bundle.folder)
    page.press("Tab", 9)
    assert page.ask("document.activeElement.id") == "text"
    page.type(shared_bundle.texts[1])
    page.press("Tab", 9)
    assert page.ask("document.activeElement.id") == "ask"
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('#answer li').length")
    assert next(iter(rows(page))) == Bundle.load(shared_bundle.folder)(shared_bundle.texts[1]).label


def test_labels_with_html_are_text(show: Callable[..., Any], make_bundle: Callable[..., Any], tmp_path: Path) -> None:
    labels = ["<img src=x onerror=alert(1)>", "<b>bold</b>", 'quo"te\nline']
    bundle = make_bundle(tmp_path / "odd", name="<script>alert(1)</script>", labels=labels)
    page = show(bundle.folder)
    page.click("#ask")
    page.wait("document.querySelectorAll('#answer li').length")
    assert set(rows(page)) == set(labels)
    assert page.ask("document.querySelectorAll('main img, main b, main script').length") == 0
    assert page.ask("document.getElementById('name').textContent") == "<script>alert(1)</script>"
    assert page.problems() == []


def test_a_phone_shows_it_whole(show: Callable[..., Any], tiny_bundle: Path) -> None:
    page = show(tiny_bundle, width=320)
    page.click("#measure")
    page.wait("document.querySelectorAll('#chart rect').length")
    assert page.ask("document.documentElement.scrollWidth") <= 320
    heights = page.ask("[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect().height)")
    assert min(heights) >= 44  # CSS pixels that a finger hits
    assert page.ask("document.getElementById('text').labels[0].textContent") == "Text"
    said = page.ask("document.getElementById('measured').textContent")
    assert [part.split(" tokens")[0] for part in said.split(", ")] == ["8", "16", "32"]


def with_golden(folder: Path, texts: list[Any], *, pairs: bool) -> Path:
    """The bundle with golden vectors of these texts, made by the runtime."""
    lines = [json.dumps(line, ensure_ascii=False) for line in golden_vectors(Bundle.load(folder), texts)]
    (folder / "golden.jsonl").write_text("\n".join(lines), encoding="utf-8")
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "pairs": pairs}), encoding="utf-8")
    return folder


def test_golden_texts_of_every_length_are_answered_alike(
    show: Callable[..., Any], own_bundle: Path, shared_bundle: Any
) -> None:
    """The longest ones too, which transformers.js cuts otherwise than tokenizers does."""
    texts = ["", *shared_bundle.texts[:30], *(" ".join(shared_bundle.texts[:n]) for n in (7, 8, 9, 40))]
    page = show(with_golden(own_bundle, texts, pairs=False))
    assert verdict(page).startswith(f"Yes: of {len(texts)} texts {len(texts)} have the same tokens and {len(texts)} ")


def test_pairs_are_asked_and_cut_as_pairs(show: Callable[..., Any], own_bundle: Path, shared_bundle: Any) -> None:
    texts = shared_bundle.texts
    long = [" ".join(texts[:n]) for n in (3, 4, 5, 6, 7, 30)]
    pairs = [(texts[0], texts[1]), ("", texts[2]), *((one, other) for one in long for other in long)]
    page = show(with_golden(own_bundle, pairs, pairs=True))
    assert verdict(page).startswith(f"Yes: of {len(pairs)} texts {len(pairs)} have the same tokens")
    page.click("#text")
    page.type(texts[0])
    page.click("#pair")
    page.type(texts[1])
    page.click("#ask")
    page.wait("document.querySelectorAll('#answer li').length")
    assert rows(page) == pytest.approx(Bundle.load(own_bundle)(texts[0], texts[1]).probabilities, abs=TOLERANCE)


@pytest.mark.parametrize("change", ["ids", "probabilities"])
def test_other_answers_are_told(change: str, show: Callable[..., Any], own_bundle: Path) -> None:
    path = own_bundle / "golden.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0][change] = list(reversed(lines[0][change]))
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    page = show(own_bundle)
    assert verdict(page).startswith(f"No: of {len(lines)} texts")
    assert page.ask("document.getElementById('checked').classList.contains('wrong')")


def test_a_model_that_cannot_be_loaded_is_told(
    browser: Any, show: Callable[..., Any], own_bundle: Path, tmp_path: Path
) -> None:
    page = show(own_bundle)
    (tmp_path / "page" / "bundle" / "onnx" / "model_quantized.onnx").unlink()
    page.open(f"{page.address}/index.html?again")
    page.call("Network.setCacheDisabled", cacheDisabled=True)
    page.call("Page.reload")
    told = page.wait("document.querySelector('#about.wrong') && document.getElementById('about').textContent")
    assert told == "The model cannot be loaded: bundle/onnx/model_quantized.onnx cannot be read (404)"
    assert page.ask("document.getElementById('ask').disabled")


def test_the_command_writes_the_page_beside_the_bundle(own_bundle: Path) -> None:
    done = CliRunner().invoke(app, ["demo-page", str(own_bundle)])
    if isinstance(done.exception, MissingExtraError):
        pytest.skip(str(done.exception))
    page = own_bundle.with_name(f"{own_bundle.name}-page") / "index.html"
    assert f"Wrote {page}" in done.stdout
    assert "vendor/" in (page.parent / "page.js").read_text()
    again = CliRunner().invoke(app, ["demo-page", str(own_bundle), str(own_bundle)])
    assert "holds something that is no demo page" in str(again.exception)
