"""Processes of one machine that each step a part: the same weights as with DDP, whoever has a gradient."""

import json
import subprocess
import sys

import pytest
import torch

from distill.training.zero import LINE, owners, pieces

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from distill import processes
from distill.training import exchange as module, zero
from distill.training.optimizer import RowAdamW, total_norm
module.PAGE = zero.PAGE = 512
torch.set_num_threads(1)

class Model(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.layer = torch.nn.Embedding(30, 8), torch.nn.Linear(8, 8)
        self.large = torch.nn.Parameter(torch.randn(2, 150).T)  # its values do not stand one behind the other
        self.sometimes, self.never = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    def forward(self, ids, more):
        states = self.layer(self.table(ids)) * self.large[:8, 0] + self.large[-8:, 1]
        return self.sometimes(states) if more else states

def loss(model, step, number, part):
    ids = torch.arange(5 * number + part, 5 * number + part + (3 if number or step else 0))  # one has no row at first
    return model(ids, number == step).square().sum()

def trained(shared, half):
    number = processes.number()
    model = Model(number if shared else 0)
    if shared:
        divided = zero.Zero(shared, model, model.table)
        divided.on_train_begin()
    else:
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    bare = model if shared else model.module
    settings = {"lr": 0.1, "weight_decay": 0.1, "fused": True}
    optimizer = RowAdamW(bare.parameters(), table=bare.table, **settings)
    if not shared:
        optimizer.close()
        optimizer = torch.optim.AdamW(bare.parameters(), **settings)
    norms = []
    for step in range(5):
        if shared:
            loss(model, step, number, 0).backward()
            loss(model, step, number, 1).backward()
            divided.collect()
        else:
            with model.no_sync():
                loss(model, step, number, 0).backward()
            loss(model, step, number, 1).backward()
            for one in bare.parameters():
                one.grad = None if one.grad is None else one.grad * processes.count()
        norms.append(float(total_norm(bare.parameters(), 1.0, divided if shared else None)))
        optimizer.step()
        if shared:
            divided.on_optimizer_step()
            if half and step == 2:  # as a run that is killed and goes on
                with divided.whole(optimizer):
                    state = [optimizer.state_dict() if processes.is_main() else None]
                    torch.distributed.broadcast_object_list(state)
                optimizer.load_state_dict(state[0])
                divided.forget(optimizer)
        optimizer.zero_grad()
    if shared:
        optimizer.close()
        divided.close()
    kept = [name for name, value in bare.named_parameters() if value in optimizer.state]
    found = {"norms": norms, "kept": kept, "weights": {name: one.tolist() for name, one in bare.named_parameters()}}
    torch.nn.init.constant_(bare.large, number)
    torch.distributed.barrier()
    return {**found, "own": bare.large.unique().tolist()}

with processes.together():
    with module.exchange(zero.room(Model(0))) as shared:
        found = [trained(None, False), trained(shared, False), trained(shared, True)]
    Path(sys.argv[1], f"{processes.number()}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("count", [2, 3])
def test_weights_are_those_of_ddp(tmp_path, count):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "script.py"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(count)]
    plain = found[0][0]
    for number, of_one in enumerate(found):
        shared, resumed = of_one[1:]
        assert shared["own"] == [number]  # what a process does after `close` is its own
        assert shared["weights"] == found[0][1]["weights"]  # the same in every process, bit for bit
        assert resumed["weights"] == shared["weights"]
        torch.testing.assert_close(shared["norms"], plain["norms"], rtol=1e-5, atol=1e-6)
        for name, value in plain["weights"].items():
            torch.testing.assert_close(torch.tensor(shared["weights"][name]), torch.tensor(value), rtol=1e-4, atol=1e-5)
    kept = [set(of_one[1]["kept"]) - {"table.weight"} for of_one in found]
    assert sum(map(len, kept)) == len(set.union(*kept)) == 5  # all but the table and what never has a gradient
    assert all(kept)


def test_the_largest_go_to_who_has_least():
    assert owners([3, 10, 4, 4, 0], 2) == [1, 0, 1, 1, 0]
    assert owners([5, 5], 3) == [0, 1]
    assert owners([], 2) == []


def test_pieces_hold_every_value_once_in_whole_lines():
    given = [
        (3, torch.zeros(5, 7)),
        (4, torch.zeros(0)),
        (8, torch.zeros(40, dtype=torch.float64)),
        (9, torch.zeros(3)),
    ]
    turns = pieces(given, 2 * LINE)
    for number, parameter in given:
        ours = [piece for turn in turns for piece in turn if piece.number == number]
        assert [place for piece in ours for place in range(piece.start, piece.stop)] == list(range(parameter.numel()))
    sizes = {number: parameter.element_size() for number, parameter in given}
    for turn in turns:
        ends = [piece.place + (piece.stop - piece.start) * sizes[piece.number] for piece in turn]
        assert max(ends) <= 2 * LINE
        assert all(piece.place % LINE == 0 for piece in turn)
        assert all(end <= piece.place for end, piece in zip(ends, turn[1:], strict=False))
