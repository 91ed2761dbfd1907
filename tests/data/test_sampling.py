"""Weights, samplers and folds."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fer_models.data import BalancedSampler, ShardedSampler, class_weights, subject_folds


def test_class_weights():
    weights = class_weights([10, 40, 0])
    torch.testing.assert_close(weights, torch.tensor([2.5, 0.625, 0.0]))
    torch.testing.assert_close(class_weights([10, 40], power=0.0), torch.ones(2))
    counts = torch.tensor([5.0, 20.0])
    torch.testing.assert_close((class_weights([5, 20], 0.5) * counts).sum(), counts.sum())


def test_balanced_sampler():
    labels = [0] * 900 + [1] * 90 + [2] * 10 + [-100] * 50
    sampler = BalancedSampler(labels, num_samples=6000)
    drawn = Counter(labels[i] for i in sampler)
    assert set(drawn) == {0, 1, 2} and all(1800 < drawn[c] < 2200 for c in range(3))
    assert list(sampler) == list(sampler) and len(list(sampler)) == len(sampler)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    natural = Counter(labels[i] for i in BalancedSampler(labels, power=0.0, num_samples=5000))
    assert natural[0] > 4300
    with pytest.raises(ValueError, match="none of the 2 samples has a label"):
        BalancedSampler([-100, -100])


def test_balanced_sampler_ranks_share_one_sequence():
    labels = [0, 1, 1, 2] * 10
    whole = list(BalancedSampler(labels))
    parts = [list(BalancedSampler(labels, rank=rank, world=4)) for rank in range(4)]
    assert [part[0] for part in parts] == whole[:4] and {len(part) for part in parts} == {10}


@given(st.integers(0, 50), st.integers(1, 7))
def test_shards_hold_each_sample_once(length, world):
    shards = [list(ShardedSampler(length, rank, world)) for rank in range(world)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))


def test_shard_arguments():
    with pytest.raises(ValueError, match="ShardedSampler: rank = 2, expected 0 to world - 1 = 1"):
        ShardedSampler(5, 2, 2)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=120), st.integers(2, 6)
)
def test_folds_share_no_subject(samples, folds):
    subjects = [f"S{subject}" for subject, _ in samples]
    labels = [label for _, label in samples]
    if len(set(subjects)) < folds:
        with pytest.raises(ValueError, match="subject_folds: folds = "):
            subject_folds(subjects, labels, folds)
        return
    parts = subject_folds(subjects, labels, folds)
    assert sorted(i for part in parts for i in part) == list(range(len(samples)))
    assert all(parts)
    people = [{subjects[i] for i in part} for part in parts]
    assert sum(map(len, people)) == len(set(subjects))


def test_folds_are_even():
    subjects = [f"S{i // 8:03d}" for i in range(800)]
    labels = [i % 8 for i in range(800)]
    assert {len(part) for part in subject_folds(subjects, labels, 10)} == {80}
    with pytest.raises(ValueError, match="sample 1 has no subject"):
        subject_folds(["a", "", "b"], [0, 0, 0], 2)
