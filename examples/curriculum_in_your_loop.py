"""The curriculum in a loop of your own: ten lines, no torch, whatever samples and trains.

Here a simulated policy stands for yours: each prompt has a difficulty, answers are right with a probability, and to
train on a group moves the policy where it can learn, between always wrong and always right. The same loop runs with
the curriculum and without; what is counted is rollouts, since those are what a policy pays for.

    python examples/curriculum_in_your_loop.py [--waves N]
"""

from __future__ import annotations

import argparse

import numpy as np

from rlcs import Curriculum
from rlcs.curriculum import Settings

GROUP, BATCH = 8, 32  # answers to a prompt, groups of a training step


class Policy:
    """Yours: ``sample(id) -> rewards`` of some answers, ``train(ids)``."""

    def __init__(self, difficulties: dict[str, float], seed: int) -> None:
        self.difficulties, self.skill = difficulties, -2.0
        self.random = np.random.default_rng(seed)

    def rate(self, id: str) -> float:
        return 1 / (1 + np.exp(2 * (self.difficulties[id] - self.skill)))

    def sample(self, id: str) -> list[float]:
        return (self.random.random(GROUP) < self.rate(id)).astype(float).tolist()

    def train(self, ids: list[str]) -> None:
        self.skill += 0.08 * sum(self.rate(id) * (1 - self.rate(id)) for id in ids) / BATCH


def loop(tasks: list[dict[str, str]], policy: Policy, waves: int, settings: Settings) -> tuple[int, int]:
    """Your loop; returns rollouts and groups that could be learned from."""
    curriculum, rollouts, learned = Curriculum(tasks, seed=0, settings=settings), 0, 0
    for _ in range(waves):
        groups = []
        for id in curriculum.draw(BATCH):  # as many prompts as BATCH valid groups need
            rewards = policy.sample(id)
            curriculum.observe(id, rewards)  # every group, also those that are not trained on
            groups.append((id, rewards))
        chosen = curriculum.select(groups, BATCH)  # valid ones, hard and easy in balance
        policy.train([id for id, _ in chosen])
        rollouts, learned = rollouts + GROUP * len(groups), learned + len(chosen)
    return rollouts, learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waves", type=int, default=100)
    waves = parser.parse_args().waves
    difficulties = {f"{i}": float(d) for i, d in enumerate(np.random.default_rng(0).normal(0, 2, 2000))}
    tasks = [{"id": id, "domain": "math", "category": f"{round(d)}"} for id, d in difficulties.items()]
    print(f"{'':10} skill at {waves} waves   rollouts   groups learned from   rollouts for one")
    for name, settings in (
        ("uniform", Settings(group_size=GROUP, weighting=False, expansion="off")),
        ("curriculum", Settings(group_size=GROUP)),
    ):
        policy = Policy(difficulties, seed=1)
        rollouts, learned = loop(tasks, policy, waves, settings)
        print(f"{name:10} {policy.skill:17.2f}   {rollouts:8}   {learned:19}   {rollouts / learned:16.1f}")


if __name__ == "__main__":
    main()
