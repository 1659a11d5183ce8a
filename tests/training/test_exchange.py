"""What processes of one machine tell each other through memory, and when they go without."""

import json
import mmap
import socket
import subprocess
import sys

import pytest

from distill.training import exchange as module

SCRIPT = """
import json, sys, tempfile
from pathlib import Path
import torch
from distill import processes
from distill.training import exchange as module
module.PAGE = 64
torch.set_num_threads(1)

if "elsewhere" in sys.argv and processes.number() == 2:
    agree = processes.agree
    processes.agree = lambda decide: agree(decide) + "/of/another/machine"
if "disk" in sys.argv:
    module.IN_MEMORY = False
if "nowhere" in sys.argv:
    tempfile.tempdir = "/not/there"
with processes.together():
    with module.exchange() as shared:
        found = {"there": shared is not None}
        if shared:
            number = processes.number()
            torch.manual_seed(number)
            for name, rows in {"none": 0, "some": number, "many": 40 - 3 * number}.items():
                given = torch.randn(rows, 5)
                found[name] = [given.tolist(), shared.gather(given).tolist()]
            found["seen"] = "memfd:distill" in Path("/proc/self/maps").read_text()
    found["left"] = "memfd:distill" in Path("/proc/self/maps").read_text()
    Path(sys.argv[1], f"{processes.number()}.json").write_text(json.dumps(found))
"""


def run(folder, *more):
    (folder / "script.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "script.py", str(folder), *more]
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(3)]


def test_every_process_has_what_all_give(tmp_path):
    found = run(tmp_path)
    assert all(one["there"] for one in found)
    for name in ("none", "some", "many"):
        given = [row for one in found for row in one[name][0]]
        assert [one[name][1] for one in found] == [given] * 3
    assert [(one["seen"], one["left"]) for one in found] == [(True, False)] * 3


def test_files_on_a_disk_do_where_none_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert [one["there"] for one in run(tmp_path, "disk")] == [True] * 3
    assert not list(tmp_path.glob("distill-*"))  # the folder in which they met


def test_without_a_folder_for_files_there_is_none(tmp_path):
    assert [one["there"] for one in run(tmp_path, "disk", "nowhere")] == [False] * 3


def test_one_that_cannot_be_reached_leaves_all_without(tmp_path):
    assert [one["there"] for one in run(tmp_path, "elsewhere")] == [False] * 3


def test_one_process_needs_none():
    with module.exchange() as shared:
        assert shared is None


@pytest.mark.parametrize("unread", [b"", b"."])
def test_a_process_that_ends_ends_the_wait(monkeypatch, unread):
    """Whether or not it had still something to read: the socket is closed by the one, reset by the other."""
    monkeypatch.setattr(module.processes, "count", lambda: 2)
    own, other = socket.socketpair()
    own.sendall(unread)
    other.close()
    with own, pytest.raises(ConnectionError, match="another process of this run has ended"):
        module.Exchange(mmap.mmap(-1, 4 * module.PAGE), [own]).meet()
