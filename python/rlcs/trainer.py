"""Reinforcement learning with curriculum sampling (arXiv 2507.01006, section 5): the loop that joins the stages.

A wave: the curriculum draws prompts, enough for one wave to yield the wanted number of valid groups; the model answers
each G times; verifiers judge; every group, the surplus included, goes back to the curriculum; the balanced subset of
valid groups is trained on. Valid groups beyond it are carried at most one wave, with their own log-probabilities.

With ``overlap`` the next wave is answered, by the weights as they are now, while the trainer steps; a ratio is to the
log-probabilities of those who answered.

Counted apart: waves, rollouts, tokens (sampled and trained), optimizer steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import parallel
from .advantage import group_advantages
from .ahead import Ahead
from .alarms import Alarm, Alarms, Facts
from .carried import groups_of, state_of
from .config import TrainConfig
from .curriculum import Curriculum, is_valid
from .engines import Engine
from .engines.native import Native
from .evaluate import Progress, Score, Share, answer_share
from .feed import Feed
from .learner import Loss, Micro, target_logprobs
from .ledger import TIERS
from .loss import policy_loss
from .means import idle, means
from .progress import Bar
from .prompts import Making, Prompt
from .run import Run, load_model, write_model
from .types import Group, Sample, Task

MOST_REFILLS = 10  # waves of one batch where groups are refilled instead of expanded
FACTOR = {None: 1.0, "warn": 1.0, "down-weight": 0.25, "quarantine": 0.0}  # of a domain's weight, by its alarms
MOST_ERROR = 0.5  # of a score in [0, 1] by one task, whose error is not known
ORDER = 1  # a random stream's last word: the order of groups; the curriculum's draws have the seed alone


class Trainer:
    """``run()`` goes on to the end; ``wave()`` makes one iteration."""

    def __init__(self, config: TrainConfig, note: Callable[[str], None] = print) -> None:
        self.config = config
        self.run_ = run = Run(config, note)
        held_out = {task.domain for task in run.eval_tasks}
        _expect_proxies(config.proxies, {task.domain for task in run.tasks}, held_out)
        self.tasks = {task.id: task for task in run.tasks}
        expansion = "off" if config.refill else config.curriculum.expansion  # the one in place of the other
        how = dataclasses.replace(config.curriculum, expansion=expansion)
        self.curriculum = Curriculum(run.tasks, config.run.seed, how)
        self.alarms = Alarms(config.alarms)
        self.engine = engine_of(config, run)
        self.feed = Feed(Making(run.prompts.processor, config.model.path), config.workers, config.ahead)
        self.ahead: Ahead[Share] | None = None  # the next wave, being answered
        self.answered: tuple[list[Group], float] | None = None  # the next wave and the seconds it took, once it is
        self.carried: list[Group] = []
        self.proxies: dict[str, tuple[float, float]] = {}  # held-out score and error of each domain, as last evaluated
        self.lenience: dict[str, tuple[float, float]] = {}  # of each domain that has another one's proxy, and its error
        self.totals = {"waves": 0, "rollouts": 0, "sampled_tokens": 0, "trained_tokens": 0, "optimizer_steps": 0}
        plain = dataclasses.replace(config.model, lora_rank=0)
        self.reference = load_model(plain).eval() if config.loss.kl else None
        self._seconds: dict[str, float] = {}
        self._learned = True  # from the wave before
        if run.saved is not None:
            try:
                self._load(run.state)
            except ValueError as error:
                raise ValueError(f"checkpoint: {run.saved.state_file}: {error}") from None
        run.begin()

    # --- one wave ---

    def wave(self, bar: Bar) -> dict[str, Any]:
        """Draws, answers, judges, observes, selects, trains."""
        config, run = self.config, self.run_
        self._seconds = {}
        with run.training():
            groups, draws = self._collect(bar)
            with self._phase("select"):
                valid = [group for group in groups if is_valid(group.rewards)]
                chosen = self.curriculum.select([*self.carried, *groups], config.groups)
                taken = {id(group) for group in chosen}
                left = [group for group in valid if id(group) not in taken]
            alarms = self._watch(groups)
            curriculum = self.curriculum.metrics()
            if config.overlap and run.step + 1 < run.settings.most_steps:
                self._begin(bar)
            with self._phase("update"):
                facts = self._train(chosen)
        old = {id(group) for group in self.carried}
        tokens = {"update": facts.get("tokens", 0.0)}
        if "rollout" in self._seconds:
            tokens["rollout"] = sum(len(r.token_ids) for group in groups for r in group.rollouts)
        values: dict[str, Any] = {
            **facts,
            "prompts": len(groups),
            "valid": len(valid),
            "valid_share": len(valid) / len(groups),
            "trained_groups": len(chosen),
            "trained_carried": sum(id(group) in old for group in chosen),
            "draws": draws,
            "lag": float(np.mean([run.step - group.wave for group in chosen] or [0])),
            **means(groups),
            **{f"curriculum/{name}": value for name, value in curriculum.items()},
            **self.alarms.metrics(),
            **{f"engine/{name}": value for name, value in self.engine.metrics().items()},
            **{f"seconds/{name}": value for name, value in self._seconds.items()},
            **{f"tokens_per_s/{name}": count / self._seconds[name] for name, count in tokens.items() if count},
            **{f"total/{name}": value for name, value in self.totals.items()},
        }
        self.carried = left if config.surplus == "carry" else []
        run.step += 1
        run.log.rollouts(run.step, groups, chosen, self.carried)
        run.log.write("wave", run.step, run.seconds, values)
        if self._learned and not chosen:
            bar.note(f"wave {run.step}: {idle(values)}")
        self._learned = bool(chosen)
        for alarm in alarms:
            said = f"{alarm.domain}: {alarm.signal}: {alarm.detail} ({alarm.action})"
            bar.note(f"alarm: {said}")
            run.log.write("alarm", run.step, run.seconds, {"alarm": said})
        return values

    def _collect(self, bar: Bar) -> tuple[list[Group], int]:
        """Judged groups of one wave; with ``refill`` of as many waves as it takes, and their count."""
        config, groups = self.config, list[Group]()
        for draw in range(MOST_REFILLS if config.refill else 1):
            if self.ahead is None and self.answered is None:
                with self._phase("rollout"):
                    new = self._answers(self._drawn(), draw)(bar.inner("rollouts")).groups()
            else:
                with self._phase("wait"):
                    new, self._seconds["rollout"] = self._arrived()
                self.answered = None
            for group in new:
                self.curriculum.observe(group.task.id, group.rewards)
            groups += new
            self.totals["waves"] += 1
            self.totals["rollouts"] += sum(len(group.rollouts) for group in new)
            self.totals["sampled_tokens"] += sum(int(r.sampled.sum()) for group in new for r in group.rollouts)
            if sum(is_valid(group.rewards) for group in groups) >= config.groups:
                break
        return groups, draw + 1

    def _readable(self, ids: Sequence[str]) -> list[str]:
        """The tasks whose pictures can be decoded; before, only their headers were read. Each rank decodes its share,
        which the native engine will ask it about."""
        run, mine = self.run_, [ids[i] for i in parallel.share(len(ids))]
        bad = dict[str, ValueError]()
        for _, made, id in self.feed((self.tasks[id].messages, id) for id in mine if id not in run.prompts):
            if isinstance(made, ValueError):
                bad[id] = made
            else:
                run.prompts.keep(id, made)
        errors = parallel.collect([bad.get(id) for id in mine], len(ids))
        for id, error in zip(ids, errors, strict=True):
            if error is not None:
                run.bad(f"task {id!r}", error)
                self.curriculum.leave_out(id)
        found = [id for id, error in zip(ids, errors, strict=True) if error is None]
        if not found:
            raise ValueError("data: a task of a wave must be readable, got none that is")
        return found

    def _drawn(self) -> list[Task]:
        """What the next wave asks."""
        ids = self.curriculum.draw(self.config.groups)
        if not ids:
            if any(self.curriculum.factor(task.domain) for task in self.tasks.values()):
                tiers = ", ".join(TIERS[i] for i in np.unique(self.curriculum.ledger.tier()))
                due = f"above 0 for a tier that tasks are in ({tiers})"
                raise ValueError(f"curriculum: tier_weights must be {due}, got {self.config.curriculum.tier_weights}")
            rest = "see the alarms; --no-act-on-alarms draws from them again"
            raise ValueError(f"train: a domain must be left to draw from, got all in quarantine: {rest}")
        ids = self._readable(ids)
        parallel.expect_same("what the curriculum draws", ids)
        return [self.tasks[id] for id in ids]

    def _answers(self, tasks: Sequence[Task], draw: int = 0, ahead: int = 0) -> Callable[[Progress], Share]:
        """How these tasks are answered, by the weights as they are now, in the wave that is so many ahead."""
        config, run = self.config, self.run_
        group, seed = config.curriculum.group_size, (config.run.seed, run.step + ahead, draw)
        version = self.engine.renew(run.step)
        return lambda progress: answer_share(
            self.engine, tasks, run.prompts, group, seed, config.rollout, version, progress
        )

    def _begin(self, bar: Bar) -> None:
        """Has the next wave answered while this one is learned from."""
        with self._phase("renew"):
            self.ahead = Ahead(self._answers(self._drawn(), ahead=1), bar.inner("rollouts"))

    def _arrived(self) -> tuple[list[Group], float]:
        """The wave that is answered ahead, waited for, and the seconds that it took."""
        if self.ahead is not None:
            share, seconds = self.ahead.result()
            self.ahead, self.answered = None, (share.groups(), parallel.on_first(lambda: seconds))
        assert self.answered is not None
        return self.answered

    def _train(self, groups: Sequence[Group]) -> dict[str, float]:
        """``updates`` steps over disjoint parts of the groups, in random order; a group stays whole: its prompt is read
        once."""
        config, run = self.config, self.run_
        prompts = [run.prompts.outline(group.task.id, group.task.messages) for group in groups]
        samples = [
            sample for i, group in enumerate(groups) for sample in _samples(group, prompts[i], i, config.normalise)
        ]
        if not samples:
            return {}
        if config.recomputes:  # before the first step: all of the wave's ratios are to one policy
            samples = [_known(s) for s in run.learner.with_old(samples, prompts, config.rollout.temperature)]
        elif any(np.isnan(sample.logprobs).any() for sample in samples):
            raise ValueError("train: recompute must be on where the servers give no log-probabilities, got off")
        sources = list(dict.fromkeys(sample.source for sample in samples))
        order = np.random.default_rng([config.run.seed, run.step, ORDER]).permutation(sources)
        rows = []
        for part in np.array_split(order, min(config.updates, len(sources))):
            mine = [sample for sample in samples if sample.source in part]
            rows.append(run.learner.update(mine, prompts, self._loss(), run.rate(), config.rollout.temperature))
            run.count_skipped(bool(rows[-1]["skipped"]))
        self.totals["optimizer_steps"] += len(rows)
        self.totals["trained_tokens"] += int(sum(row["trained_tokens"] for row in rows))
        summed = ("micro_steps", "tokens", "trained_tokens", "skipped")
        return {
            **{name: sum(row[name] for row in rows) / (1 if name in summed else len(rows)) for name in rows[0]},
            "mismatch_first": rows[0]["mismatch"],
            "trained_rollouts": float(len(samples)),
        }

    def _loss(self) -> Loss:
        """The policy loss of a step.

        The ratio is taken to the log-probabilities of the rollouts. Where those are another engine's, the trainer's own
        stand in for them, and the difference is weighed by truncated importance sampling.
        """
        config = self.config

        def referred(micro: Micro) -> Tensor | None:
            if self.reference is None:
                return None
            with torch.no_grad():
                return target_logprobs(self.reference, micro.batch, micro.prompts, config.rollout.temperature)[0]

        def loss(micro: Micro) -> tuple[Tensor, dict[str, Tensor]]:
            device = micro.new.device
            rolled = torch.from_numpy(micro.batch.logprobs).to(device)
            own = None if micro.batch.old is None else torch.from_numpy(micro.batch.old).to(device)
            value, facts = policy_loss(
                micro.new,
                rolled if own is None else own,
                torch.from_numpy(micro.batch.advantages).to(device),
                micro.trained,
                torch.from_numpy(micro.batch.cu_seqlens).to(device),
                config.loss,
                behaviour=None if own is None else rolled,
                reference=referred(micro),
            )
            gap = torch.where(micro.trained, micro.new.detach() - rolled, micro.new.new_zeros(()))
            facts["mismatch"] = gap.abs().sum() / max(micro.tokens, 1)
            weight = micro.batch.weight if config.loss.mean == "sample" else micro.tokens / micro.all_tokens
            return value * weight, facts

        return loss

    def _watch(self, groups: Sequence[Group]) -> list[Alarm]:
        """Shows each domain's rollouts to the alarms, and acts on what they say."""
        config, facts = self.config, {}
        for domain in dict.fromkeys(group.task.domain for group in groups):
            here = [group for group in groups if group.task.domain == domain]
            rollouts = [rollout for group in here for rollout in group.rollouts]
            known = [(g.task.category, [r for r in g.rewards if r is not None]) for g in here]
            proxy, error = self.proxies.get(config.proxies.get(domain, domain), (None, 0.0))
            lenience, lenience_error = self.lenience.get(domain, (None, 0.0))
            facts[domain] = Facts(
                rewards=[(category, float(np.mean(rewards))) for category, rewards in known if rewards],
                errors=sum(r.verdict.failed for r in rollouts),
                rollouts=len(rollouts),
                answers=[r.text for r in rollouts],
                truths=[group.task.truth for group in here for _ in group.rollouts],
                proxy=proxy,
                proxy_error=error,
                lenience=lenience,
                lenience_error=lenience_error,
            )
        alarms = self.alarms.observe(facts)
        self._act()
        return alarms

    def _act(self) -> None:
        """Weighs domains as their alarms, or that these only warn, have it."""
        for domain in dict.fromkeys(task.domain for task in self.tasks.values()):
            action = self.alarms.action(domain) if self.config.act_on_alarms else None
            self.curriculum.scale(domain, FACTOR[action])

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    # --- the whole run ---

    def run(self) -> list[Score]:
        """Waves until the end; saves and evaluates on the way. Returns the last scores."""
        run = self.run_
        with Bar("RLCS", quiet=not parallel.first()) as bar, run.stoppable(), self._closing():
            bar(run.progress, 1.0)
            if run.owes_evaluation:
                self._evaluate(bar)
            while run.progress < 1:
                row = self.wave(bar)
                speed = row["total/sampled_tokens"] / max(run.seconds, 1e-9)
                bar(
                    run.progress,
                    1.0,
                    f"reward {row['reward']:.3f}, valid {row['valid_share']:.0%}, {speed:.0f} tokens/s",
                )
                if run.due(run.settings.eval_every):
                    self._evaluate(bar)
                if run.due(run.settings.save_every):
                    self._save()
                if run.stopped:
                    self._save()
                    run.obey()
            self._save()
            scores = self._evaluate(bar)
        run.log.close()
        return scores

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Whatever ends the run, nobody goes on answering."""
        try:
            yield
        finally:
            self.engine.close()
            self.feed.close()
            if self.ahead is not None:
                self.ahead.drop()

    def _evaluate(self, bar: Bar) -> list[Score]:
        scores = self.run_.evaluate(bar, self.config.proxies)
        # What no verdict stands behind says nothing: the score before stays.
        sampled = [s for s in scores if s.mode == "sampled" and not math.isnan(s.mean)]
        self.proxies |= {s.domain: (s.mean, MOST_ERROR if math.isnan(s.error) else s.error) for s in sampled}
        gaps = {domain: gap for score in scores for domain, gap in score.lenience.items()}
        self.lenience |= {domain: gap for domain, gap in gaps.items() if not any(map(math.isnan, gap))}
        return scores

    # --- state ---

    def _save(self) -> None:
        """A checkpoint, and the ledger as people read it."""
        state = self.state_dict()
        parallel.expect_same("the state of the curriculum", state)
        self.run_.save(state)
        parallel.on_first(lambda: self.curriculum.ledger.export(self.run_.settings.out / "ledger.jsonl"))

    def state_dict(self) -> dict[str, Any]:
        """What the next wave depends on beside model and optimizer, as JSON's types."""
        return {
            "curriculum": self.curriculum.state_dict(),
            "alarms": self.alarms.state_dict(),
            "carried": [state_of(group) for group in self.carried],
            "ahead": None if self.ahead is None and self.answered is None else _ahead_state(*self._arrived()),
            "proxies": self.proxies,
            "lenience": self.lenience,
            "totals": self.totals,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state["curriculum"])
        self.alarms.load_state_dict(state["alarms"])
        self._act()  # by the settings as they are now: where all is in quarantine, nothing else would end it
        self.carried = groups_of(state["carried"], self.tasks)
        ahead = state.get("ahead")
        if ahead and (groups := groups_of(ahead["groups"], self.tasks)):
            self.answered = groups, ahead["seconds"]
        self.proxies = {domain: (score, error) for domain, (score, error) in state["proxies"].items()}
        self.lenience = {domain: (mean, error) for domain, (mean, error) in state["lenience"].items()}
        self.totals = dict(state["totals"])


def engine_of(config: TrainConfig, run: Run) -> Engine:
    """Who answers, as the settings have it."""
    if config.engine.kind == "native":
        return Native(run.model, apart=config.overlap > 0)
    from glm4v.generate import Settings

    from .engines.http import Http

    stops = Settings.read(run.model.generation_config).stop_ids
    return Http(
        config.engine,
        config.engine.weights or config.run.out / "weights",
        lambda folder: write_model(run.model, config.model.path, folder),
        run.prompts.processor,
        sorted(stops),
        run.note,
    )


def train(config: TrainConfig, note: Callable[[str], None] = print) -> list[Score]:
    """`rlcs train`: goes on to the end and returns the last scores."""
    return Trainer(config, note).run()


def _expect_proxies(proxies: Mapping[str, str], trained: set[str], held_out: set[str]) -> None:
    for domain, proxy in proxies.items():
        for name, known in ((domain, trained), (proxy, held_out)):
            if name not in known:
                raise ValueError(
                    f"train: proxies must join a domain of the tasks to one that is held out, got {name!r}"
                )


def _known(sample: Sample) -> Sample:
    """With the trainer's log-probabilities where those who answered gave none: there the weight between them is 1."""
    assert sample.old is not None
    return dataclasses.replace(sample, logprobs=np.where(np.isnan(sample.logprobs), sample.old, sample.logprobs))


def _samples(group: Group, prompt: Prompt, source: int, normalise: bool) -> list[Sample]:
    """One sample for each judged rollout that has something to learn from."""
    ids = prompt.input_ids.numpy()
    pairs = zip(group.rollouts, group_advantages(group.rewards, normalise), strict=True)
    return [
        Sample.of_rollout(ids, rollout, float(advantage), source)
        for rollout, advantage in pairs
        if not np.isnan(advantage) and rollout.sampled.any()
    ]


def _ahead_state(groups: Sequence[Group], seconds: float) -> dict[str, Any]:
    return {"groups": [state_of(group) for group in groups], "seconds": seconds}
