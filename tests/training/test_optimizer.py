"""Updating an embedding by rows gives what dense AdamW gives, and survives being saved anywhere."""

import copy
import io

import pytest
import torch
from torch import nn

from distill.training.optimizer import WINDOW, RowAdamW, row_embedding, total_norm

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


def model(rows=60, width=8, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(rows, width, padding_idx=0), nn.Linear(width, 3)).to(dtype)


def optimiser(net, sparse=True):
    settings = {**SETTINGS, "fused": True}
    if sparse:
        return RowAdamW(net.parameters(), table=net[0], **settings)
    return torch.optim.AdamW(net.parameters(), **settings)


def batches(count, seed=1):
    """Rare rows come once in a hundred steps, and some never."""
    random = torch.Generator().manual_seed(seed)
    for step in range(count):
        ids = torch.randint(0, 12, (4, 5), generator=random)
        if step % 100 == 7:
            ids[0] = torch.arange(40, 45)
        yield ids


def train(net, optimizer, ids, schedule):
    for batch in ids:
        net(batch).square().sum().backward()
        norm = total_norm(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return norm


def scheduled(optimizer, total):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - step / total))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-3)])
@pytest.mark.parametrize("steps", [1, 30, WINDOW + 150])
def test_rows_end_where_dense_adamw_leaves_them(steps, dtype, tolerance):
    """In fp64 there is no doubt about the formula; in fp32 both round, and hundreds of steps carry it on."""
    dense, sparse = model(dtype=dtype), model(dtype=dtype)
    start = sparse[0].weight.detach().clone()
    for net in (dense, sparse):
        optimizer = optimiser(net, net is sparse)
        train(net, optimizer, batches(steps), scheduled(optimizer, 600))
    optimizer.settle()
    for mine, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * 0.1)
    assert (dense[0].weight - start).abs().max() > 1e-4


def test_a_row_that_waits_is_behind_until_settled():
    net = model()
    optimizer = optimiser(net)
    train(net, optimizer, batches(60), scheduled(optimizer, 600))
    before = net[0].weight.detach().clone()
    optimizer.settle()
    assert not torch.equal(before[40:45], net[0].weight[40:45])
    settled = net[0].weight.detach().clone()
    optimizer.settle()
    assert torch.equal(settled, net[0].weight)


def test_saved_between_steps_and_loaded_it_goes_on_bit_for_bit():
    whole = model()
    optimizer = optimiser(whole)
    schedule = scheduled(optimizer, 600)
    ids = list(batches(120))
    train(whole, optimizer, ids[:70], schedule)
    weights, file = copy.deepcopy(whole.state_dict()), io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), file)
    train(whole, optimizer, ids[70:], schedule)
    resumed = model()
    resumed.load_state_dict(weights)
    again = optimiser(resumed)
    schedule = scheduled(again, 600)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    train(resumed, again, ids[70:], schedule)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_norm_of_sparse_gradients_is_that_of_dense_ones():
    dense, sparse = model(), model()
    sparse[0].sparse = True
    ids = next(batches(1))
    for net in (dense, sparse):
        net(ids).square().sum().backward()
    assert torch.isclose(total_norm(sparse.parameters()), nn.utils.clip_grad_norm_(dense.parameters(), 0.01))
    total_norm(sparse.parameters(), 0.01)
    torch.testing.assert_close(sparse[0].weight.grad.to_dense(), dense[0].weight.grad)


class Student(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        if tied:
            self.head.weight = self.words.weight

    def get_input_embeddings(self):
        return self.words


def test_only_an_embedding_of_its_own_goes_by_rows():
    assert row_embedding(Student(False)) is not None
    assert row_embedding(Student(True)) is None
    frozen = Student(False)
    frozen.words.weight.requires_grad_(False)
    assert row_embedding(frozen) is None
