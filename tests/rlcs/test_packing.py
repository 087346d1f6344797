"""Packing and advantages: the invariants of the docstrings over random input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v import Config
from rlcs.advantage import group_advantages
from rlcs.costs import packing_cost
from rlcs.packing import batch_of, imbalance, pack
from rlcs.rewards import right
from rlcs.types import Rollout, Sample

lengths_ = st.lists(st.integers(1, 100), min_size=0, max_size=60)


@given(lengths_, st.integers(100, 400), st.integers(1, 4))
def test_every_sample_once_within_budget_and_equal_counts(lengths, budget, ranks):
    shares = pack(lengths, budget, ranks=ranks)
    assert len(shares) == ranks and len({len(rank) for rank in shares}) == 1
    assert sorted(i for rank in shares for micro in rank for i in micro) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in micro) <= budget for rank in shares for micro in rank)
    assert pack(lengths, budget, ranks=ranks) == shares
    if lengths:  # at most what longest-first needs, and one more per rank
        least = -(-sum(lengths) // (budget * ranks))
        assert len(shares[0]) <= 2 * least


def test_costs_are_balanced_by_text_and_vision():
    rng = np.random.default_rng(0)
    cost = packing_cost(Config())
    lengths, images = rng.integers(200, 3000, 64).tolist(), rng.choice([0, 0, 0, 36864], 64).tolist()
    costs = [cost(n, [p] if p else []) for n, p in zip(lengths, images, strict=True)]
    aware, blind = (pack(lengths, 32768, c, ranks=4) for c in (costs, None))
    assert imbalance(aware, costs) < 1.2 < imbalance(blind, costs)


def test_lengths_may_be_an_array():
    assert pack(np.array([3, 4, 2]), 5) == pack([3, 4, 2], 5) and pack(np.array([], dtype=int), 5) == [[]]


def test_a_sample_beyond_the_budget_is_named():
    with pytest.raises(ValueError, match=r"sample 1 must have at most 10 tokens \(the budget\), got 11"):
        pack([3, 11], 10)


def sample(prompt, answer, sampled, advantage=1.0):
    answer = np.array(answer)
    rollout = Rollout(answer, np.arange(len(answer), dtype=np.float32), np.array(sampled), "", "stop", right())
    return Sample.of_rollout(np.array(prompt), rollout, advantage)


def test_targets_follow_their_tokens_and_inserted_ones_are_masked():
    batch = batch_of([sample([1, 2], [3, 4, 5], [True, False, True]), sample([6], [7], [True], -1.0)], total=8)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 5, 7] and batch.weight == 0.25
    assert batch.targets[batch.trained].tolist() == [3, 5, 7]
    assert np.flatnonzero(batch.trained).tolist() == [1, 3, 5]
    assert batch.logprobs[batch.trained].tolist() == [0.0, 2.0, 0.0]
    assert batch.advantages.tolist() == [1.0, -1.0]


def test_rollouts_say_what_does_not_fit():
    with pytest.raises(ValueError, match="sampled must be as long as token_ids"):
        sample([1], [2, 3], [True])
    with pytest.raises(ValueError, match="the first token must not be trained on"):
        sample([], [2, 3], [True, True])


def test_advantages():
    assert group_advantages([1, 0, 0, 1]).tolist() == [1, -1, -1, 1]
    assert group_advantages([1, 0, 0, 1], normalise=False).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([0.3, 0.3 + 1e-9, 0.3]).tolist() == [0, 0, 0]
    with_error = group_advantages([1, None, 0])
    assert np.isnan(with_error[1]) and with_error[[0, 2]].tolist() == [1, -1]
    assert np.isnan(group_advantages([None, None])).all()
    with pytest.raises(ValueError, match=r"^group_advantages: rewards must be finite or None, got \[1, nan\]"):
        group_advantages([1, float("nan")])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16))
def test_advantages_have_mean_zero_and_unit_spread(rewards):
    a = group_advantages(rewards).astype(np.float64)
    assert abs(a.mean()) < 1e-5
    assert a.std() == pytest.approx(1, abs=1e-4) or not a.any()
