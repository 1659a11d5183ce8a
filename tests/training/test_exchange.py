"""Processes of one machine average gradients through memory: what each then has, and when they go without."""

import json
import mmap
import socket
import subprocess
import sys

import pytest
import torch

from distill.training import exchange as module

SCRIPT = """
import json, os, sys, tempfile
from pathlib import Path
import torch
from accelerate.utils import DistributedDataParallelKwargs
from distill import processes
from distill.training import exchange as module
module.PIECE = 64
torch.set_num_threads(1)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(9, 8, sparse=True), torch.nn.Linear(8, 8)
        self.sometimes, self.never = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    def forward(self, ids, more):
        states = self.layer(self.table(ids))
        return self.sometimes(states) if more else states

def gradients(shared):
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    if shared:
        kwargs = module.wrapped_with(shared, kwargs)
    model, number = Model(), processes.number()
    whole = torch.nn.parallel.DistributedDataParallel(model, **kwargs.to_kwargs())
    kwargs.register_comm_hook(whole)
    for step in range(3):
        with whole.no_sync():
            whole(torch.arange(number + step), False).square().sum().backward()
        whole(torch.arange(2 * number, 2 * number + 3), number == step).square().sum().backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    return {name: None if value is None else value.to_dense().tolist() for name, value in found.items()}

if "elsewhere" in sys.argv and processes.number() == 2:
    agree = processes.agree
    processes.agree = lambda decide: agree(decide) + "/of/another/machine"
if "disk" in sys.argv:
    module.IN_MEMORY = "/not/there"
if "nowhere" in sys.argv:
    tempfile.tempdir = "/not/there"
with processes.together():
    with module.exchange() as shared:
        found = {"there": shared is not None}
        if shared:
            number = processes.number()
            torch.manual_seed(number)
            for name, size in {"none": 0, "one": 1, "two": 2, "many": 101}.items():
                given = torch.randn(size)
                shared.mean_(mean := given.clone())
                found[name] = [given.tolist(), mean.tolist()]
            rows, values = torch.randint(9, (4 * number,)), torch.randn(4 * number, 5)
            sparse = torch.sparse_coo_tensor(rows[None], values, (9, 5), check_invariants=True)
            found["sparse"] = [sparse.to_dense().tolist(), shared.reduced(sparse).wait().to_dense().tolist()]
            found["gradients"] = [gradients(None), gradients(shared)]
    Path(sys.argv[1], f"{processes.number()}.json").write_text(json.dumps(found))
"""


def run(folder, *more):
    (folder / "script.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "script.py", str(folder), *more]
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(3)]


def test_every_process_has_the_mean_bit_for_bit(tmp_path):
    found = run(tmp_path)
    assert all(one["there"] for one in found)
    for name in ("none", "one", "two", "many", "sparse"):
        given = torch.stack([torch.tensor(one[name][0]) for one in found])
        means = [torch.tensor(one[name][1]) for one in found]
        assert all(torch.equal(mean, means[0]) for mean in means)
        torch.testing.assert_close(means[0], given.mean(0))
    for one in found:
        plain, shared = one["gradients"]
        assert {name for name, value in shared.items() if value is None} == {"never.weight", "never.bias"}
        for name in plain:
            torch.testing.assert_close(shared[name], plain[name], rtol=1e-6, atol=1e-6)


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
        module.Exchange(mmap.mmap(-1, 3 * module.PIECE), [own]).mean_(torch.ones(4))
