"""What `rlcs sft` and `rlcs train` share: a folder, a model, a clock, checkpoints, evaluation.

A run is taken up where its newest checkpoint was written: with the same settings the next steps are the same to the
last bit (on the CPU; a run bounded by ``seconds`` follows the clock and isn't).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from glm4v import Glm4v, Processor
from glm4v.files import carry
from glm4v.layers import Linear
from glm4v.weights import Rows

from . import checkpoint, evaluate, fsdp, lora, parallel
from .admission import check_tasks, eval_tasks, trained_on
from .config import EvalSettings, ModelSettings, Part, RunSettings, SftConfig, TrainConfig, plain
from .data import read_tasks
from .files import expect_folder, held, write_text
from .learner import Learner
from .logs import Log, Silence
from .optimizer import Optimizer
from .progress import Bar
from .prompts import Prompts
from .record import by_flag
from .rollout import NotFinite, RolloutSettings
from .shards import BadRows

TIED = ("model.dtype", "model.freeze", "model.lora_rank", "model.lora_alpha")
"""What a checkpoint's optimizer state hangs on."""


class Run:
    """Model, optimizer, folder and clock of one training run.

    Args:
        config: of the run.
        note: what is told to a person, line by line.
        check: looks at the data of `rlcs sft` before the model is read.
    """

    def __init__(
        self,
        config: SftConfig | TrainConfig,
        note: Callable[[str], None],
        check: Callable[[Processor], None] | None = None,
    ) -> None:
        run: RunSettings = config.run
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        if run.wandb is not None and find_spec("wandb") is None:
            raise ValueError("run: wandb must be installed to log to it: pip install wandb")
        config.judge.use(parallel.started_as()[1])
        parallel.join(config.model.device, config.parallel)
        note = parallel.by_first(note)
        self.config, self.settings, self.note = config, run, note
        self.bad = BadRows(config.bad_rows, config.max_bad_rows, note)
        self.asked = 0  # to end, by which signal: see stoppable
        self._agreed = 0
        self.checkpoints = run.out / "checkpoints"
        self._held: IO[str] | None = None  # the folder
        parallel.on_first(lambda: expect_folder(run.out))
        # Before what another one writes is taken for half a checkpoint. Where nothing is, nothing is made.
        parallel.on_first(lambda: self._hold() if run.out.is_dir() else None)
        saved = parallel.on_first(lambda: checkpoint.latest(self.checkpoints)) if run.resume else None
        self.saved = saved  # what the run goes on from
        if saved is None and checkpoint.every(self.checkpoints):
            raise ValueError(f"run: {run.out} must be empty without --run.resume, got checkpoints in it")
        self.state = {} if saved is None else _taken_up(saved, config, note)  # what the trainer kept
        processor = Processor.from_pretrained(config.model.path)
        self.eval_tasks = check_tasks(eval_tasks(config.eval), config.rollout, processor)
        self.tasks = []  # of RL
        if isinstance(config, TrainConfig):
            tasks = read_tasks(config.tasks, self.bad)
            self.tasks = check_tasks(tasks, config.rollout, processor, self.bad, config.tokens)
            for file in trained_on(config.tasks, config.eval.tasks):
                note(f"eval: tasks must be held out to say what is learned, {file} is trained on")
        if check is not None:
            check(processor)
        # What is wrong with files has been said by now: a large model takes minutes to read.
        self.model = load_model(config.model, run.seed, None if saved is None else saved.folder)
        processor.dtype = fsdp.dtype_of(self.model)
        self.prompts, self.model.processor = Prompts(processor), processor
        self.eval_prompts = self.prompts.apart()  # held-out tasks may have the ids of others
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.learner = Learner(self.model, self.optimizer, config.tokens)
        self.lost = 0  # steps in a row that moved nothing
        self.step = 0  # optimizer steps of SFT, waves of RL
        self.seconds = 0.0  # of training, evaluation and saving left out
        if saved is not None:
            tensors = saved.tensors(self.optimizer.like)
            try:
                self.optimizer.load_state_dict(tensors)
            except ValueError as error:
                raise ValueError(f"checkpoint: {saved.folder}: {error}") from None
            self.step, self.seconds = saved.step, self.state["seconds"]
        elif not config.model.lora_rank:  # whose trained weights are adapters
            self.optimizer.begin(Rows(self.model, config.model.path))
        self.log: Log | Silence = Silence()  # see begin

    def begin(self) -> None:
        """From here on the run writes: what is wrong with its settings, files and checkpoint has been said."""
        parallel.on_first(self._hold)
        if parallel.first():
            self.log = Log(self.settings.out, self.step, self.settings.wandb, plain(self.config))
            write_config(self.settings.out, self.config)

    def _hold(self) -> None:
        """Keeps other processes out of the folder as long as this one is at work."""
        if self._held is None:
            self.settings.out.mkdir(parents=True, exist_ok=True)
            self._held = held(self.settings.out)

    @property
    def progress(self) -> float:
        """Share of the run that is behind us."""
        return self.settings.share(self.step, self.seconds)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Time in here counts. Behind it all ranks have the same clock, and know whether to stop."""
        start = time.perf_counter()
        yield
        self._agree(self.seconds + time.perf_counter() - start)

    def _agree(self, seconds: float) -> None:
        self.seconds, self._agreed = parallel.agree(seconds, self.asked)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """In here Ctrl-C and SIGTERM let the step end and be saved: see `obey`. A second one is obeyed at once."""

        def ask(number: int, frame: Any) -> None:
            parallel.expect_neighbours()
            if self.asked:
                raise KeyboardInterrupt
            self.asked = number
            self.note("stops after this step and saves it; once more to stop at once")

        if threading.current_thread() is not threading.main_thread():  # which alone receives signals
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stopped(self) -> int:
        """The signal by which the run is to end, 0 if it isn't; several processes agree on it behind each step and each
        evaluation."""
        return self.asked if parallel.size() == 1 else self._agreed

    def obey(self) -> None:
        """Ends the run, which is ``stopped`` and whose step is saved: KeyboardInterrupt, or exit code 0 for SIGTERM, by
        which a scheduler asks for just that."""
        self.log.close()
        said = f"step {self.step} is saved in {self.checkpoints}; the same command goes on from it"
        if self.stopped == signal.SIGTERM:
            self.note(said)
            raise SystemExit(0)
        raise KeyboardInterrupt(said)

    def count_skipped(self, skipped: bool) -> None:
        """Notes a step of the optimizer that moved nothing, since its gradient was not finite.

        Raises:
            NotFinite: ``max_skipped`` of them came in a row.
        """
        self.lost = self.lost + 1 if skipped else 0
        if not skipped:
            return
        self.note(f"step {self.step}: the gradient is not finite, so nothing moves ({self.lost} in a row)")
        if self.lost == self.config.max_skipped:
            raise NotFinite(f"gradients must be finite, got {self.lost} steps without; are the weights whole?")

    def due(self, every: int) -> bool:
        """Whether it is time, in the middle of the run, for what happens each so many steps."""
        return bool(every) and self.step % every == 0 and self.progress < 1 and not self.stopped

    @property
    def owes_evaluation(self) -> bool:
        """Whether this step's evaluation is due and not made: the run was stopped between its checkpoint and it."""
        return parallel.on_first(lambda: self.due(self.settings.eval_every) and not self.log.evaluated(self.step))

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.optimizer.rate(self.progress)

    def save(self, state: dict[str, Any]) -> None:
        """A checkpoint of this step; ``state`` is what the trainer needs beside the model."""
        self.log.flush()  # what leads up to a checkpoint is on the disk before it
        checkpoint.save(
            self.checkpoints,
            self.step,
            lambda folder: write_model(self.model, self.config.model.path, folder),
            self.optimizer.state_dict(),
            {**state, "seconds": self.seconds, "config": plain(self.config)},
            self.settings.keep,
        )

    def evaluate(self, bar: Bar, proxies: Mapping[str, str] | None = None) -> list[evaluate.Score]:
        """Scores on the held-out tasks, logged; none where there are no tasks."""
        if not self.eval_tasks:
            return []
        how: EvalSettings = self.config.eval
        with fsdp.whole(self.model) as model:
            scores = evaluate.evaluate(
                model,
                self.eval_tasks,
                self.eval_prompts,
                eval_settings(self.config.rollout),
                how.samples,
                how.greedy,
                progress=bar.inner("evaluation"),
                proxies=proxies,
            )
        self._agree(self.seconds)
        self.log.write("eval", self.step, self.seconds, evaluate.flat(scores))
        return scores


def load_model(settings: ModelSettings, seed: int = 0, checkpoint: Path | None = None) -> Glm4v:
    """The model with its trained parts, as the settings have it or as a run has left it in ``checkpoint``; sharded
    where the run has several processes.

    Weights are its own, not those mapped from the file. With adapters, whose start ``seed`` draws, a run goes on from
    the unmerged weights.
    """
    if settings.lora_rank:
        lora.check_installed()
    device = parallel.device(settings.device)
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    folder = settings.path if settings.lora_rank else checkpoint or settings.path
    if parallel.size() > 1:
        model = fsdp.load(folder, dtype, device, lambda model: _choose(model, settings))
    else:
        model = Glm4v.from_pretrained(folder, dtype, device)
        if device.type == "cpu":  # elsewhere they are copies, whose places count (`glm4v.layers.products`)
            for weight in model.parameters():
                weight.data = weight.data.clone()
        _choose(model, settings)
    if settings.lora_rank and checkpoint is not None:
        lora.load(model, checkpoint / lora.FOLDER)
    elif settings.lora_rank:
        lora.begin(model, seed)
    model.train()
    model.recompute_activations(settings.activation_checkpointing)
    return model


def _choose(model: Glm4v, settings: ModelSettings) -> None:
    """Freezes what isn't trained; adds adapters to the rest."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(name) not in settings.freeze)
    if settings.lora_rank:
        linear = [name for name, layer in model.named_modules() if isinstance(layer, Linear) and name != "lm_head"]
        layers = [name for name in linear if part_of(name) not in settings.freeze]
        if not layers:
            raise ValueError("model: freeze must leave a part to train, got all of them")
        lora.add(model, layers, settings.lora_rank, settings.lora_alpha)


def part_of(name: str) -> Part:
    """Which part of the model a parameter or a layer belongs to."""
    if name.startswith(("model.visual.merger.", "model.visual.downsample.")):
        return "merger"
    return "vision" if name.startswith("model.visual.") else "language"


def write_model(model: Glm4v, source: Path, folder: Path) -> None:
    """The model in Hugging Face layout, with the tokenizer, template and picture settings that it came with.

    Adapters are merged into it, and stand beside it in a folder of their own.
    """
    if fsdp.sharded(model):
        fsdp.write(model, folder)
    else:
        with lora.merged(model):
            model.save_pretrained(folder)
    if lora.adapted(model):
        lora.save(model, source, folder / lora.FOLDER)
    parallel.on_first(lambda: carry(source, folder))


def eval_settings(rollout: RolloutSettings) -> RolloutSettings:
    """Answers of an evaluation are as long as those of training, with one thinking budget for all."""
    return dataclasses.replace(rollout, random_budgets=None)


def write_config(folder: Path, config: SftConfig | TrainConfig) -> None:
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))


def _taken_up(saved: checkpoint.Saved, config: SftConfig | TrainConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """A checkpoint's state; says which settings have changed since, and refuses those that its weights hang on, or the
    reference of its loss."""
    from .state import Kept, KeptBySft, KeptByTrain, expect

    state = saved.state()
    expect(Kept, state, saved.state_file)
    before, now = by_flag(state["config"]), by_flag(json.loads(json.dumps(plain(config))))
    kinds = ["train" if "tasks" in settings else "sft" for settings in (before, now)]
    if kinds[0] != kinds[1]:
        out = f"a folder of `rlcs {kinds[1]}`, got one of `rlcs {kinds[0]}`: {config.run.out}"
        raise ValueError(f"run: out must be {out}")
    expect(KeptByTrain if kinds[0] == "train" else KeptBySft, state, saved.state_file)
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    reference = ("model.path",) if isinstance(config, TrainConfig) and config.loss.kl else ()
    for name in TIED + reference:
        if name in changed:
            raise ValueError(f"{name} must be as in {saved.folder} ({before[name]}) to go on from it, got {now[name]}")
    said = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in now if name in changed)
    said = f", with changed settings: {said}" if said else ""
    if "model.path" in changed:
        said += f"; the {'adapters' if config.model.lora_rank else 'weights'} stay the checkpoint's"
    note(f"going on from {saved.folder}{said}")
    return state
