"""Batches of like length: every row once, little padding, and an order that a resume finds again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from distill.data.sampling import LengthBucketSampler, ProcessBatches, TokenBudgetSampler

LENGTHS = np.random.default_rng(0).gamma(3, 8, 1003).astype(int) + 2


@given(
    lengths=st.lists(st.integers(1, 200), max_size=300),
    size=st.integers(1, 40),
    seed=st.integers(0, 9),
    drop=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_row_once_in_full_batches(lengths, size, seed, drop):
    sampler = LengthBucketSampler(lengths, size, seed=seed, drop_last=drop, window=3)
    batches = list(sampler)
    rows = [row for batch in batches for row in batch]
    assert len(sampler) == len(batches)
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(set(rows)) == len(rows) == (len(lengths) // size * size if drop else len(lengths))


def test_order_is_a_pure_function_of_seed_and_epoch():
    sampler = LengthBucketSampler(LENGTHS, 16, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    np.random.seed(99)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(LengthBucketSampler(LENGTHS, 16, seed=3)) == list(sampler) == first
    assert list(LengthBucketSampler(LENGTHS, 16, seed=4)) != first


def test_little_is_wasted_on_padding_of_real_sentences(shared_data):
    import csv

    with (shared_data / "sst2/train.csv").open() as file:
        lengths = np.array([len(row["text"].split()) for row in csv.DictReader(file)])
    batches = list(LengthBucketSampler(lengths, 32, seed=0))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert 1 - lengths.sum() / padded < 0.05  # batches drawn at random waste half
    # Short and long batches must come mixed: sorted ones would train on short texts first, then on long ones.
    means = np.array([lengths[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def _loader(seed=0, size=16):
    sampler = LengthBucketSampler(LENGTHS, size, seed=seed)
    return DataLoader(torch.arange(len(LENGTHS)), batch_sampler=sampler)


def test_accelerate_sets_the_epoch_and_resumes_in_the_middle():
    whole = prepare_data_loader(_loader())
    epochs = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        epochs.append([batch.tolist() for batch in whole])
    assert epochs[1] != epochs[2]
    resumed = prepare_data_loader(_loader())
    resumed.set_epoch(2)
    rest = skip_first_batches(resumed, 20)
    rest.set_epoch(2)
    assert [batch.tolist() for batch in rest] == epochs[2][20:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(processes):
    sampler = LengthBucketSampler(LENGTHS, 16, seed=1)
    shards = [list(BatchSamplerShard(sampler, processes, index)) for index in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    seen = [row for shard in shards for batch in shard for row in batch]
    assert set(seen) == set(range(len(LENGTHS)))
    assert len(seen) - len(LENGTHS) < processes * 16  # the last round is filled up from the start


def test_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size and window must be at least 1; got 0 and 50"):
        LengthBucketSampler([1, 2], 0, seed=0)


@given(lengths=st.lists(st.integers(1, 200), max_size=300), tokens=st.integers(1, 900), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_budgeted_batches_hold_every_row_once_and_no_more_than_the_budget(lengths, tokens, seed):
    sampler = TokenBudgetSampler(lengths, tokens, seed=seed)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)  # in every epoch, or the schedule would end too early or too late
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            longest = max(lengths[row] for row in batch)
            assert len(batch) * longest <= tokens or len(batch) == 1


def test_budgeted_batches_are_full_and_their_order_is_that_of_seed_and_epoch():
    sampler = TokenBudgetSampler(LENGTHS, 512, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    np.random.seed(99)
    assert list(sampler) == first
    padded = [len(batch) * LENGTHS[batch].max() for batch in first]
    assert np.median(padded) > 480
    assert LENGTHS.sum() / sum(padded) > 0.97
    sampler.set_epoch(1)
    assert {frozenset(batch) for batch in sampler} != {frozenset(batch) for batch in first}
    assert list(TokenBudgetSampler(LENGTHS, 512, seed=4)) != first


def test_budgeted_batches_are_skipped_and_shared_as_others_are():
    sampler = TokenBudgetSampler(LENGTHS, 512, seed=3)
    loader = DataLoader(list(range(len(LENGTHS))), batch_sampler=sampler, collate_fn=list)
    assert list(skip_first_batches(loader, 5)) == list(sampler)[5:]
    shares = [list(ProcessBatches(sampler, number, 2)) for number in range(2)]
    for one, other, whole in zip(*shares, sampler, strict=True):
        assert sorted(one + other) == sorted(whole)
    with pytest.raises(ValueError, match="tokens must be at least 1; got 0"):
        TokenBudgetSampler([3], 0, seed=0)
