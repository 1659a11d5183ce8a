"""Pushing: only a sound bundle, only what ships, over the hub's own protocol to a hub on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.errors import OutputError, VerificationError
from distill.export.push import push_bundle


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload of small files needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.paths: list[str] = []
        self.made: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.there = ["notes.md", "onnx/model.onnx", "onnx/model_text.onnx"]
        self.deleted: list[str] = []
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if "/tree/" in self.path:
            self._say([{"type": "file", "path": path, "size": 1, "oid": "0"} for path in self.server.there])
            return
        self._say({"sha": "0" * 40, "siblings": [], "id": "me/it"})

    def do_POST(self) -> None:
        hub = self.server
        hub.paths.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.refuses:
            self._say({"error": "You are not allowed to do this"}, 403)
        elif self.path == "/api/repos/create":
            hub.made = json.loads(body)
            self._say({"url": f"{hub.address}/me/it", "name": "me/it"})
        elif "/preupload/" in self.path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            self._say({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    value = operation["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    hub.deleted.append(operation["value"]["path"])
            self._say({"commitUrl": f"{hub.address}/me/it/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._say({})

    def _say(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
        monkeypatch.setattr(f"{module}.ENDPOINT", server.address, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    yield server
    server.shutdown()
    server.server_close()


def test_what_ships_is_uploaded_and_nothing_else(own_bundle: Path, hub: Hub) -> None:
    shipment = push_bundle(own_bundle, "me/it", private=True)
    listed = json.loads((own_bundle / "MANIFEST.json").read_text())["files"]
    assert sorted(hub.files) == sorted([*listed, "MANIFEST.json"])
    for name, content in hub.files.items():
        assert content == (own_bundle / name).read_bytes(), name
    assert hub.deleted == ["onnx/model_text.onnx"]  # of an earlier bundle; what else its owner put there stays
    assert hub.made["name"] == "it"
    assert hub.made["organization"] == "me"
    assert hub.made.get("visibility") == "private" or hub.made.get("private") is True
    assert hub.files["README.md"].decode().startswith("---\n")
    assert shipment.url.startswith(hub.address)


def test_a_dry_run_lists_everything_and_reaches_no_network(own_bundle: Path, hub: Hub) -> None:
    done = CliRunner().invoke(app, ["push", str(own_bundle), "me/it", "--dry-run"])
    assert done.exit_code == 0
    assert "onnx/model_quantized.onnx" in done.stdout
    assert "Nothing was uploaded" in done.stdout
    assert hub.paths == []


def test_a_bundle_that_does_not_verify_stays_here(own_bundle: Path, hub: Hub) -> None:
    with (own_bundle / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(VerificationError, match=r"config\.json has changed"):
        push_bundle(own_bundle, "me/it")
    assert hub.paths == []


def test_a_name_that_is_none(own_bundle: Path, hub: Hub) -> None:
    with pytest.raises(OutputError, match=r"Name it OWNER/NAME"):
        push_bundle(own_bundle, "me/it/../other")
    assert hub.paths == []


def test_what_the_hub_says_is_passed_on(own_bundle: Path, hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(OutputError, match=r"the hub did not take it \(.*hf auth login"):
        push_bundle(own_bundle, "me/it")
