"""Alarms: the hackable verifier is found and grows from a warning to a quarantine; a healthy domain stays silent."""

import json

import numpy as np
import pytest

from rlcs.alarms import Alarms, Facts, Limits, rise_within_categories


def rewards(level, rng=None, groups=4):
    """Of groups of one category, spread around a level."""
    spread = np.zeros(groups) if rng is None else rng.normal(0, 0.2, groups)
    return [("one", float(x)) for x in level + spread - spread.mean()]


def healthy(step, rng):
    level = 0.3 + 0.02 * step
    truths = [str(i % 10) for i in range(32)]
    answers = [t if rng.random() < level else str(rng.integers(10)) for t in truths]
    return Facts(rewards(level, rng), 0, 32, answers, truths, proxy=level - 0.05)


def test_a_healthy_domain_raises_no_alarm():
    alarms, rng = Alarms(), np.random.default_rng(0)
    assert not any(alarms.observe({"ocr": healthy(step, rng)}) for step in range(30))


def test_reward_without_competence_is_found_and_answered_more_strongly_while_it_stands():
    alarms, rng = Alarms(), np.random.default_rng(0)
    found = []
    for step in range(40):
        hacked = Facts(rewards(0.2 + 0.02 * step), 0, 32, [f"{i}, a number between 0 and 10" for i in range(32)],
                       [str(i % 10) for i in range(32)], proxy=0.2)  # fmt: skip
        found += alarms.observe({"chart": hacked, "ocr": healthy(step, rng)})
    assert {(alarm.domain, alarm.signal) for alarm in found} == {("chart", "hacking")}
    assert list(dict.fromkeys(alarm.action for alarm in found)) == ["warn", "down-weight", "quarantine"]


def test_easier_prompts_and_noise_are_not_hacking():
    """A curriculum draws easier categories as it goes; few groups a step make means that jump."""
    rng = np.random.default_rng(0)
    truths = [str(i) for i in range(32)]
    easier, noisy = Alarms(), Alarms()
    for step in range(200):
        share = min(1.0, step / 20)
        mix = [("hard", 0.1)] * round(8 * (1 - share)) + [("easy", 0.8)] * round(8 * share)
        assert easier.observe({"a": Facts(mix, 0, 32, truths, truths, 0.4, 0.03)}) == []
        jumps = [("one", float(x)) for x in rng.choice([0.0, 0.3, 1.0], 4)]
        noise = Facts(jumps, 0, 32, truths, truths, 0.4 + float(rng.normal(0, 0.03)), 0.03)
        assert noisy.observe({"a": noise}) == []


def test_the_rise_is_taken_within_categories():
    then, late = [("a", 0.0), ("a", 0.2), ("b", 1.0), ("c", 0.5)], [("a", 0.5), ("b", 0.8), ("b", 1.0), ("d", 0.0)]
    rise, variance = rise_within_categories(then, late)
    assert rise == pytest.approx((2 / 3 * 0.4 + 2 / 3 * -0.1) / (4 / 3))
    assert variance == pytest.approx((0.02 + 0.02 + 0.25) / (2 + 1) / (4 / 3))  # 6 groups in 4 cells
    assert rise_within_categories(then, []) == (0.0, 0.0)


def test_many_categories_of_few_groups_are_not_hacking():
    """Most have one group in a half of the window, and nothing to tell noise by."""
    rng, alarms, truths = np.random.default_rng(0), Alarms(), [str(i) for i in range(32)]
    levels = rng.random(200)
    for _ in range(200):
        groups = [(f"{c}", float(rng.binomial(8, levels[c]) / 8)) for c in rng.integers(200, size=2)]
        assert alarms.observe({"a": Facts(groups, 0, 16, truths, truths, 0.4, 0.01)}) == []


def test_limits_that_no_signal_can_have():
    for changes, said in (
        ({"window": 1}, "alarms: window must be 2 or more, got 1"),
        ({"length_ratio": 0.5}, r"alarms: length_ratio must be 1 or more, got 0\.5"),
        ({"patience": -1}, "alarms: patience must be 0 or more, got -1"),
        ({"sigmas": float("nan")}, "alarms: sigmas must be 0 or more, got nan"),
    ):
        with pytest.raises(ValueError, match=said):
            Limits(**changes)
    two = Alarms(Limits(window=2))
    assert [two.observe({"a": Facts(rewards(0.5), 0, 1, ["a"], ["a"])}) for _ in range(3)] == [[], [], []]


def test_a_held_out_score_that_falls_quickly_is_seen_at_once():
    alarms, truths = Alarms(), [str(i) for i in range(32)]
    said = []
    for score in (0.4, 0.45, 0.35, 0.3, None, 0.2, 0.44):
        said.append(alarms.observe({"a": Facts(rewards(0.5), 0, 32, truths, truths, score, 0.03)}))
    assert [[alarm.signal for alarm in found] for found in said] == [[], [], [], [], [], ["forgetting"], []]
    assert said[5][0].detail == "held out 0.45 -> 0.20" and alarms.action("a") is None


def test_a_verifier_that_grants_more_than_the_strict_one_is_found_beyond_noise():
    truths = [str(i) for i in range(32)]

    def signals(*lenience):
        return [
            a.signal for a in Alarms().observe({"a": Facts(rewards(0.5), 0, 32, truths, truths, 0.4, 0.03, *lenience)})
        ]

    assert signals(0.2, 0.03) == ["lenience"]
    assert signals(0.08, 0.01) == signals(0.2, 0.1) == signals(-0.5, 0.01) == signals(None) == []


def test_errors_duplicates_length_and_language_are_signals():
    alarms = Alarms()
    truths = [str(i) for i in range(32)]
    assert [a.signal for a in alarms.observe({"math": Facts(rewards(0.5), 4, 32, truths, truths)})] == ["errors"]
    assert [a.signal for a in alarms.observe({"math": Facts(rewards(0.5), 0, 32, ["7"] * 32, truths)})] == [
        "duplicates"
    ]
    one_truth = Facts(rewards(0.5), 0, 32, ["yes"] * 32, ["yes"] * 32)  # the truths are alike too
    assert alarms.observe({"vqa": one_truth}) == []
    drift = Alarms()
    signals = set()
    for step in range(20):
        words = ["答案" * 40 if step > 10 else "word"] * 3 + [f"other {i}" for i in range(9)]
        signals |= {
            a.signal for a in drift.observe({"general": Facts(rewards(0.5), 0, 12, words, [str(i) for i in range(12)])})
        }
    assert signals == {"length", "language"}


def test_state_is_carried_over():
    one, rng = Alarms(), np.random.default_rng(0)
    for step in range(10):
        one.observe({"ocr": healthy(step, rng)})
    two = Alarms()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict() and two.metrics() == one.metrics()


def test_the_strongest_alarm_of_a_domain_counts_and_none_remains_when_they_end():
    alarms, clean = Alarms(), Facts(rewards(0.5), 0, 32, [str(i) for i in range(32)], [str(i) for i in range(32)])
    broken = Facts([], 32, 32, clean.answers, clean.truths)
    same = Facts([], 32, 32, ["x"] * 32, clean.truths)
    assert alarms.action("a/b") is None
    for _ in range(7):
        alarms.observe({"a/b": broken, "a": clean})
    alarms.observe({"a/b": same})  # a new, weaker alarm lifts nothing
    assert alarms.action("a/b") == "quarantine" and alarms.action("a") is None
    alarms.observe({"a/b": clean})
    assert alarms.action("a/b") is None
