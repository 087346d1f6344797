"""One step of GRPO on the same model, prompts and rewards: ours, a plain loop on transformers, TRL's GRPOTrainer.

All start from the same weights; each gives the same log-probabilities (asserted first), answers the same prompts G
times with temperature 1 and top-p 1 up to the same length, judges with the same verifiers and makes one AdamW step on
all answers. No forced answering, as the others have none. Medians over steps; the plain loop and ours take turns, TRL
runs in its own loop between two rounds of them. Dims: P prompts, G answers each, B = P * G, L tokens.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcs.config import EvalSettings, TrainConfig
from rlcs.curriculum import is_valid
from rlcs.evaluate import answer
from rlcs.prompts import Prompt
from rlcs.rewards import verify
from rlcs.rollout import RolloutSettings
from rlcs.trainer import Trainer
from rlcs.types import Group, Task

GROUP = 8
TOKENS = 64
MICRO = 3072  # tokens of a micro-step: what its layers keep then stays near (1536 and 32768 are slower)
AGREE = 1e-4  # log-probabilities of the same tokens by the same weights


def speed(config: TrainConfig, prompts: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step and tokens/s of each side.

    Args:
        config: model and tasks; settings of the comparison replace the rest.
        prompts: P of a step.
        rounds: steps of each side that are timed; as many more of ours and the plain loop follow TRL's.
    """
    shutil.rmtree(config.run.out, ignore_errors=True)
    settings = dataclasses.replace(
        config,
        rollout=RolloutSettings(max_new_tokens=TOKENS),
        eval=EvalSettings(),
        groups=prompts,
        updates=1,
        tokens=MICRO,
    )
    trainer = Trainer(settings, lambda line: None)
    tasks = [task for task in trainer.tasks.values() if not _has_video(task)]  # the stub of TRL's processor reads none
    plain = Plain(config, trainer)
    agreement = _assert_agree(trainer, plain, tasks[:8])
    steps = iter(range(1000))

    def here() -> list[Task]:
        start = next(steps) * prompts
        return [tasks[(start + i) % len(tasks)] for i in range(prompts)]

    sides: dict[str, Callable[[list[Task]], dict[str, float]]] = {
        "ours": lambda chosen: _ours(trainer, chosen),
        "ours, groups with spread": lambda chosen: _ours(trainer, chosen, every=False),
        "transformers": plain.step,
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for step in sides.values():
        step(here())  # warm
    for _ in range(rounds):
        chosen = here()
        for name, step in sides.items():
            rows[name].append(step(chosen))
    try:
        rows["trl"] = _trl(config, tasks, prompts, rounds)
    except ImportError as error:
        trl_missing = str(error)
    else:
        trl_missing = None
        for _ in range(rounds):
            chosen = here()
            for name, step in sides.items():
                rows[name].append(step(chosen))
    sums = {name: _medians(found) for name, found in rows.items()}
    ours, theirs = sums["ours"], sums["transformers"]
    return {
        "sides": sums,
        "agreement": agreement,
        "trl_missing": trl_missing,
        "rollout_over_generate": ours["rollout_tokens_per_s"] / theirs["rollout_tokens_per_s"],
        "training_over_padded": ours["trained_tokens_per_s"] / theirs["trained_tokens_per_s"],
        "step_over_plain": theirs["step_s"] / ours["step_s"],
        "step_over_trl": sums["trl"]["step_s"] / ours["step_s"] if "trl" in sums else None,
        "spread_step_over_trl": sums["trl"]["step_s"] / sums["ours, groups with spread"]["step_s"]
        if "trl" in sums
        else None,
    }


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {"steps": float(len(rows)), **{name: statistics.median(row[name] for row in rows) for name in rows[0]}}


def _row(tokens: int, rollout_s: float, judge_s: float, update_s: float) -> dict[str, float]:
    return {
        "step_s": rollout_s + judge_s + update_s,
        "rollout_s": rollout_s,
        "update_s": update_s,
        "rollout_tokens_per_s": tokens / rollout_s,
        "trained_tokens_per_s": tokens / update_s,
        "tokens": float(tokens),
    }


# --- ours ---


def _ours(trainer: Trainer, tasks: list[Task], every: bool = True) -> dict[str, float]:
    """The trainer's own rollouts and update; judging is part of the rollouts' time.

    As the trainer uses it, groups without spread are left out: their advantages are 0, so they have no gradient.
    """
    run = trainer.run_
    start = time.perf_counter()
    groups = answer(run.model, tasks, run.prompts, GROUP, (run.step,), trainer.config.rollout)
    middle = time.perf_counter()
    trainer._train([group for group in groups if every or is_valid(group.rewards)])
    run.step += 1
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return _row(tokens, middle - start, 0.0, time.perf_counter() - middle)


# --- transformers' generate and a padded loop ---


class Plain:
    """What one writes with transformers and PyTorch: left-padded ``generate``, right-padded answers, one AdamW step.

    It is given processed prompts, so that reading pictures costs it nothing.
    """

    def __init__(self, config: TrainConfig, trainer: Trainer) -> None:
        from transformers import Glm4vForConditionalGeneration

        self.model = Glm4vForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32)
        self.config, self.prompts, self.processor = config, trainer.run_.prompts, trainer.run_.prompts.processor
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.optimizer.lr, betas=config.optimizer.betas)
        stop = self.model.generation_config.eos_token_id
        self.stop = torch.tensor(stop if isinstance(stop, list) else [stop])

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """[B, S] padded left, with pictures in order."""
        size = max(map(len, prompts))
        ids = torch.full((len(prompts), size), int(self.stop[0]))
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, size - len(prompt) :] = prompt.input_ids
            mask[row, size - len(prompt) :] = 1
        kinds = (ids == self.model.config.image_token_id).long()
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": kinds,
            "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts if p.image_grid_thw is not None]),
        }

    def logprobs(self, inputs: dict[str, Tensor], answers: Tensor, mask: Tensor) -> Tensor:
        """[B, L] of answers [B, L] behind the prompts."""
        whole = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], answers], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], mask], 1),
            "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answers)], 1),
        }
        logits = self.model(**whole, use_cache=False, logits_to_keep=answers.shape[1] + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]

    def generate(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Answers [B, L], and which of their tokens count: up to the first stop token."""
        self.model.eval()
        with torch.no_grad():
            found = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=TOKENS,
                suppress_tokens=_pictures(self.model),
            )
        answers = found[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(answers, self.stop).long()
        return answers, ((ended.cumsum(1) - ended) == 0).long()

    def step(self, tasks: list[Task]) -> dict[str, float]:
        start = time.perf_counter()
        inputs = self.inputs([self.prompts(t.id, t.messages) for t in tasks for _ in range(GROUP)])
        answers, mask = self.generate(inputs)
        rolled = time.perf_counter()
        texts = [self.processor.decode(row[kept.bool()].tolist()) for row, kept in zip(answers, mask, strict=True)]
        rewards = torch.tensor([_reward(tasks[i // GROUP], text) for i, text in enumerate(texts)]).view(-1, GROUP)
        spread = rewards.std(1, correction=0, keepdim=True)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-4)).view(-1, 1)
        judged = time.perf_counter()
        self.model.train()
        new = self.logprobs(inputs, answers, mask)
        ratio = (new - new.detach()).exp()
        low, high = 1 - self.config.loss.clip_low, 1 + self.config.loss.clip_high
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        ((loss * mask).sum(1) / mask.sum(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        return _row(int(mask.sum()), rolled - start, judged - rolled, end - judged)


def _reward(task: Task, text: str) -> float:
    return verify(task.domain, text, task.truth, task.question).score


def _assert_agree(trainer: Trainer, plain: Plain, tasks: list[Task]) -> float:
    """The largest difference of our rollouts' log-probabilities from transformers' for the same tokens."""
    run = trainer.run_
    groups: list[Group] = answer(run.model, tasks, run.prompts, 2, (0,), trainer.config.rollout)
    worst = 0.0
    for group in groups:
        prompt = run.prompts(group.task.id, group.task.messages)
        for rollout in group.rollouts:
            ids = torch.from_numpy(rollout.token_ids)[None]
            with torch.no_grad():
                theirs = plain.logprobs(plain.inputs([prompt]), ids, torch.ones_like(ids))[0]
            worst = max(worst, float((theirs - torch.from_numpy(rollout.logprobs)).abs().max()))
    assert worst <= AGREE, f"log-probabilities of the same tokens differ by {worst}, more than {AGREE}"
    return worst


# --- TRL ---


def _trl(config: TrainConfig, tasks: list[Task], prompts: int, rounds: int) -> list[dict[str, float]]:
    """Steps of GRPOTrainer, the first left out; raises ImportError where TRL is not installed."""
    from datasets import Dataset, Image, List
    from transformers import AutoTokenizer, Glm4vForConditionalGeneration, TrainerCallback
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
    from trl import GRPOConfig, GRPOTrainer

    class NoVideos:
        merge_size, model_input_names = 2, ("pixel_values_videos", "video_grid_thw")

    class Images(Glm4vProcessor):
        """Without torchvision transformers has no video processor."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)

    path = config.model.path
    model = Glm4vForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    processor = Images(
        Glm4vImageProcessorPil.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
        NoVideos(),
        chat_template=(Path(path) / "chat_template.jinja").read_text(),
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": task.question}],
            "images": [str(part["image"]) for part in task.messages[0]["content"] if part["type"] == "image"],
            "index": i,
        }
        for i, task in enumerate(tasks[: prompts * (rounds + 1)])
    ]
    marks, tokens, generating = [time.perf_counter()], list[int](), list[float]()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    def reward(completions: Any, completion_ids: Any, index: Any, **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        texts = [said[0]["content"] for said in completions]
        return [_reward(tasks[i], text) for i, text in zip(index, texts, strict=True)]

    generate = model.generate

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = generate(*arguments, **named)
        generating.append(time.perf_counter() - start)
        return found

    model.generate = timed
    arguments = GRPOConfig(
        output_dir=str(config.run.out / "trl"),
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, max_steps=rounds + 1, learning_rate=config.optimizer.lr,
        adam_beta1=config.optimizer.betas[0], adam_beta2=config.optimizer.betas[1], lr_scheduler_type="constant",
        per_device_train_batch_size=prompts * GROUP, gradient_accumulation_steps=1, steps_per_generation=1,
        num_generations=GROUP, max_completion_length=TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
        epsilon=config.loss.clip_low, epsilon_high=config.loss.clip_high, loss_type="grpo", shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": _pictures(model)},
    )  # fmt: skip
    data = Dataset.from_list(rows).cast_column("images", List(Image()))
    trainer = GRPOTrainer(
        model, reward, args=arguments, train_dataset=data, processing_class=processor, callbacks=[Clock()]
    )
    trainer.train()
    found = []
    for i in range(1, rounds + 1):
        whole = marks[i + 1] - marks[i]
        found.append({**_row(tokens[i], generating[i], 0.0, whole - generating[i]), "step_s": whole})
    return found


def _pictures(model: Any) -> list[int]:
    """Ids that stand for pictures: said in an answer, they would ask for features that there are none of."""
    return [model.config.image_token_id, model.config.video_token_id]


def _has_video(task: Task) -> bool:
    return any(part["type"] == "video" for part in task.messages[0]["content"])
