"""The order of prompts: exact over epochs, stateless, shared between processes; buckets of lengths."""

import itertools
from collections import Counter

import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrft.config import ConfigError
from jaxrft.data import PromptOrder, bucket_length, halvings


def stream(order, rollouts):
    return [i for rollout in range(rollouts) for i in order.indices(rollout)]


@given(count=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 2**31 - 1), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_each_prompt_once_across_batches(count, batch, seed, shuffle):
    order = PromptOrder(count, batch, seed=seed, shuffle=shuffle)
    taken = stream(order, 3 * count // batch + 2)
    epochs = [taken[i : i + count] for i in range(0, len(taken) - count + 1, count)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if not shuffle:
        assert epochs[2] == list(range(count))


def test_it_is_a_pure_function_of_the_rollout():
    order = PromptOrder(7, 3, seed=5)
    forward = [order.indices(r) for r in range(12)]
    assert [PromptOrder(7, 3, seed=5).indices(r) for r in reversed(range(12))] == forward[::-1]
    assert stream(PromptOrder(7, 5, seed=5), 3) == [i for batch in forward for i in batch][:15], "whatever the batch"
    # Fixed numbers: the order may not change with the version of NumPy, or a run could not be continued.
    assert stream(PromptOrder(5, 5, seed=0), 2) == [0, 3, 1, 2, 4, 3, 4, 2, 1, 0]


def test_epochs_and_seeds_are_shuffled_evenly_and_apart():
    epochs = [tuple(PromptOrder(4, 4, seed=1).indices(r)) for r in range(4800)]
    counts = Counter(epochs)
    assert scipy.stats.chisquare([counts[p] for p in itertools.permutations(range(4))]).pvalue > 1e-4
    pairs = Counter(itertools.pairwise(epochs))
    assert scipy.stats.chisquare([pairs[p] for p in itertools.product(counts, repeat=2)]).pvalue > 1e-4
    assert PromptOrder(100, 100, seed=1).indices(0) != PromptOrder(100, 100, seed=2).indices(0)


@given(count=st.integers(1, 30), share=st.integers(1, 8), processes=st.integers(1, 5), rollout=st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_the_shares_of_the_processes_make_up_the_batch(count, share, processes, rollout):
    order = PromptOrder(count, share * processes, seed=3)
    shares = [order.for_process(p, processes).indices(rollout) for p in range(processes)]
    assert all(len(s) == share for s in shares)
    assert [i for s in shares for i in s] == order.indices(rollout)


def test_epochs_are_counted_in_fractions():
    order = PromptOrder(10, 4, seed=0)
    assert order.rollouts_per_epoch == 2.5
    assert [order.epoch(r) for r in (0, 1, 5)] == [0.0, 0.4, 2.0]
    assert order.for_process(1, 2).epoch(5) == 2.0


def test_unequal_shares_are_refused():
    with pytest.raises(ConfigError, match="got 4, takes a multiple of the 3 processes"):
        PromptOrder(10, 4, seed=0).for_process(0, 3)
    with pytest.raises(ConfigError, match="got 2 of 2"):
        PromptOrder(10, 4, seed=0).for_process(2, 2)
    with pytest.raises(ConfigError, match="got 0 prompts"):
        PromptOrder(0, 4, seed=0)


@given(length=st.integers(0, 100_000), minimum=st.sampled_from([1, 8, 16, 64]))
def test_a_bucket_is_the_smallest_that_holds_the_length(length, minimum):
    buckets = sorted({2**k for k in range(18)} | {3 * 2**k for k in range(17)})
    assert bucket_length(length, minimum) == next(b for b in buckets if b >= max(length, minimum))


def test_halvings():
    assert halvings(80, 16) == (16, 32, 48, 80)
    assert halvings(4608, 8) == (576, 1152, 2304, 4608)
    assert halvings(1000, 64) == (128, 256, 512, 1024)
    assert halvings(5, 8) == (8,)
