"""Data sets on the hub, over the hub's own protocol from a hub on this machine: fetched whole, or streamed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

LABELLED = [{"text": f"{name} film {number}", "label": name} for name in ("good", "bad") for number in range(20)]
TEXTS = [f"sentence {number}" for number in range(20_000)]


class Hub(ThreadingHTTPServer):
    """As much of the hub as reading a data set needs. `files` has the content by repository and path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.commit = "a" * 40
        self.files = {
            "me/small": {"train.jsonl": _lines(LABELLED), "README.md": _card("small", 200)},
            "me/large": {"data/train.jsonl": _lines([{"text": text} for text in TEXTS])},
        }
        self.fetched: list[str] = []


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._say([])

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repository = "/".join(path.removeprefix("/api").removeprefix("/datasets/").split("/")[:2])
        files = self.server.files.get(repository)
        if files is None:
            self._send(404, b"")
        elif "/tree/" in path:
            self._say(_listed(files, path.split("/tree/")[1].partition("/")[2]))
        elif "/resolve/" in path:
            name = path.split("/resolve/")[1].partition("/")[2]
            self._file(name, files.get(name))
        else:
            siblings = [{"rfilename": name} for name in files]
            self._say({"id": repository, "sha": self.server.commit, "siblings": siblings})

    def _file(self, name: str, content: bytes | None) -> None:
        commit = {"X-Repo-Commit": self.server.commit}
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
            return
        if self.command == "GET":
            self.server.fetched.append(name)
        begin, _, end = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        last = int(end) if end else len(content) - 1
        part = {"Content-Range": f"bytes {begin}-{last}/{len(content)}"} if "Range" in self.headers else {}
        tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        self._send(206 if part else 200, content[int(begin) : last + 1], {**commit, **tag, **part})

    def _say(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _card(name: str, size: int) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n"
        f"dataset_info:\n  config_name: default\n  download_size: {size}\n---\n{name}\n"
    ).encode()


def _listed(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    under = f"{folder}/" if folder else ""
    for name, content in files.items():
        inside, _, deeper = name.removeprefix(under).partition("/")
        if name.startswith(under) and deeper:
            found[inside] = {"type": "directory", "path": under + inside, "oid": "0"}
        elif name.startswith(under):
            found[inside] = {"type": "file", "path": name, "size": len(content), "oid": "0"}
    return list(found.values())


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from pathlib import Path
from distill.data import load_splits
found = load_splits(sys.argv[1], unlabelled=sys.argv[2:3], folder=Path(sys.argv[3]))
print(json.dumps([len(found.train) + len(found.validation), found.labels, found.unlabelled["text"][:]]))
"""


def read(hub: Hub, home: Path, train: str, unlabelled: str) -> list[Any]:
    """Rows, labels and unlabelled texts, as a process finds them that has this hub alone."""
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    address = f"http://127.0.0.1:{hub.server_port}"
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", **online}
    command = [sys.executable, "-c", SCRIPT, train, unlabelled, str(home / "text")]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_large_one_is_streamed_and_read_again_only_when_it_is_new(hub: Hub, tmp_path: Path) -> None:
    rows, labels, texts = read(hub, tmp_path, "me/small", "me/large")
    assert (rows, labels, texts) == (len(LABELLED), ["bad", "good"], TEXTS)
    kept = [str(path) for path in (tmp_path / "hf").rglob("*.arrow")]
    assert any("me___small" in path for path in kept)
    assert not any("me___large" in path for path in kept)
    assert hub.fetched.count("data/train.jsonl") > 0
    hub.fetched.clear()
    assert read(hub, tmp_path, "me/small", "me/large")[2] == TEXTS
    assert "data/train.jsonl" not in hub.fetched
    hub.commit, hub.files["me/large"] = "b" * 40, {"data/train.jsonl": _lines([{"text": text} for text in TEXTS[:9]])}
    assert read(hub, tmp_path, "me/small", "me/large")[2] == TEXTS[:9]


def test_a_small_one_is_kept_by_the_hub_s_own_cache(hub: Hub, tmp_path: Path) -> None:
    hub.files["me/few"] = {"train.jsonl": _lines([{"text": text} for text in TEXTS[:9]]), "README.md": _card("few", 99)}
    assert read(hub, tmp_path, "me/small", "me/few")[2] == TEXTS[:9]
    assert not (tmp_path / "text/text.arrow").exists()
    assert any("me___few" in str(path) for path in (tmp_path / "hf").rglob("*.arrow"))
