"""Settings of a run, as a file (YAML) or as flags. What the paper fixes is the default; the rest is our choice.

Every group of settings is a frozen dataclass that checks itself; names that don't exist are errors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from .alarms import Limits
from .bounds import LONGEST_S, MANY, PROCESSES, STEPS, WHOLE, expect_above_zero, expect_within
from .curriculum import Settings as CurriculumSettings
from .loss import LossSettings
from .optimizer import OptimizerSettings
from .parallel import ParallelSettings
from .rewards import Endpoint, Judge, use_judge
from .rollout import RolloutSettings

Part = Literal["vision", "merger", "language"]
MOST_SAMPLES = 1 << 20  # of a step, which are held together
LONGEST_RUN_S = 1e9  # thirty years: by a clock without end, the learning rate would stay where it begins
OF_BOTH = {
    "tokens": (1, WHOLE), "max_bad_rows": (0, WHOLE), "workers": (0, PROCESSES), "ahead": (1, MANY),
    "max_skipped": (1, WHOLE),
}  # fmt: skip
"""Bounds of what `rlcs sft` and `rlcs train` both have."""


def _expect_urls(where: str, urls: Iterable[str]) -> None:
    for url in urls:
        try:
            parts = urlsplit(url)
            ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of half an IPv6 address, or a port that is none
            ok = False
        if not ok:
            raise ValueError(f"{where}: urls must begin with http:// or https:// and a host, got {url!r}")


def _key_in(where: str, variable: str | None) -> str:
    """What the environment variable holds; empty where none is named."""
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise ValueError(f"{where}: key_variable must name a variable that is set, got {variable}")
    return key


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and what of it is trained."""

    path: Path = Path("model")  # a checkpoint in Hugging Face layout
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights; None keeps the file's
    device: str = "cpu"  # where the model trains and answers, such as cuda
    freeze: tuple[Part, ...] = ()  # parts that stay as they are
    lora_rank: int = 0  # of adapters on the linear layers of what isn't frozen; 0 trains the weights themselves
    lora_alpha: float = 16.0  # over lora_rank: what the adapters' output is multiplied by
    activation_checkpointing: bool = False  # less memory: each block is computed again in its backward

    def __post_init__(self) -> None:
        expect_within("model", self, lora_rank=(0, MANY))
        expect_above_zero("model", self, lora_alpha=1e6)  # at 0 nothing would be trained


@dataclass(frozen=True)
class RunSettings:
    """Where a run keeps its files, how long it goes on, and how often it saves and looks at itself."""

    out: Path = Path("runs/rlcs")  # the folder of metrics, rollouts and checkpoints
    steps: int | None = None  # optimizer steps of `rlcs sft`, waves of `rlcs train`; None: 100, or what `seconds` allow
    seconds: float | None = None  # stop after so long, if not by `steps`; the learning rate follows the nearer end
    seed: int = 0  # of every draw: data, answers, new adapters
    save_every: int = 50  # steps or waves; 0 saves at the end only
    keep: int = 2  # checkpoints
    eval_every: int = 0  # 0 evaluates at the end only
    threads: int | None = None  # of torch; small models are fastest with 1
    wandb: str | None = None  # a project to log to as well
    resume: bool = True  # take up the run that is in the folder, if there is one

    def __post_init__(self) -> None:
        whole = {"steps": (1, WHOLE), "seed": (0, WHOLE), "save_every": (0, WHOLE), "keep": (1, WHOLE)}
        expect_within("run", self, **whole, eval_every=(0, WHOLE), threads=(1, PROCESSES))
        expect_above_zero("run", self, seconds=LONGEST_RUN_S)

    @property
    def most_steps(self) -> float:
        """Infinite where the clock alone ends the run."""
        return self.steps or (STEPS if self.seconds is None else math.inf)

    def share(self, steps: int, seconds: float) -> float:
        """Of the run, behind so many steps and seconds: whichever is nearer to its end."""
        return min(1.0, max(steps / self.most_steps, seconds / (self.seconds or math.inf)))


@dataclass(frozen=True)
class EvalSettings:
    """Held-out tasks, and how they are answered."""

    tasks: Path | None = None  # JSON lines; None evaluates nothing
    limit: int | None = None  # at most so many tasks of each domain
    samples: int = 1  # answers to each task at temperature 1; 0 leaves them out
    greedy: bool = True  # also one answer at temperature 0

    def __post_init__(self) -> None:
        expect_within("eval", self, limit=(1, WHOLE))
        if self.samples < 0 or not (self.samples or self.greedy):
            raise ValueError(f"eval: samples must be 1 or more without greedy, else 0 or more, got {self.samples}")
        expect_within("eval", self, samples=(0, MANY))


@dataclass(frozen=True)
class JudgeSettings:
    """Language models that judge what rules leave open, behind OpenAI-compatible endpoints; the majority decides."""

    urls: tuple[str, ...] = ()  # up to and with /v1; none: no judge
    models: tuple[str, ...] = ()  # one for each url
    key_variable: str | None = None  # the environment variable that holds the key
    timeout_s: float = 60.0  # of one request
    concurrency: int = 16  # requests at once, to each url: of all processes together, each of which makes at least one
    requests_per_minute: float = 0.0  # likewise; 0: no limit

    def __post_init__(self) -> None:
        expect_within("judge", self, concurrency=(1, MANY), requests_per_minute=(0, WHOLE))
        expect_above_zero("judge", self, timeout_s=LONGEST_S)
        _expect_urls("judge", self.urls)
        if len(self.urls) != len(self.models):
            raise ValueError(f"judge: models must be one for each url ({len(self.urls)}), got {len(self.models)}")

    def use(self, processes: int = 1) -> None:
        """Hands what rules leave open to these judges, if there are any. Each of several processes has an equal share
        of the limits."""
        if not self.urls:
            return
        key = _key_in("judge", self.key_variable)
        shares = max(1, self.concurrency // processes), self.requests_per_minute / processes
        limits = (self.timeout_s, Endpoint.tries, *shares)
        pairs = zip(self.urls, self.models, strict=True)
        use_judge(Judge([Endpoint(url, model, key, *limits) for url, model in pairs]))


@dataclass(frozen=True)
class EngineSettings:
    """Who answers in RL: the model in this process, or servers with OpenAI's API that read weights from a folder."""

    kind: Literal["native", "http"] = "native"  # the model in this process, or servers
    urls: tuple[str, ...] = ()  # of servers, up to and with /v1
    server: Literal["vllm", "sglang", "transformers", "openai"] = "vllm"  # what they are; openai: something else
    model: str = ""  # what the servers call it; `transformers serve` is told folders instead
    key_variable: str | None = None  # the environment variable that holds the key
    timeout_s: float = 600.0  # of one request: longer than the longest answer takes, which would be lost each time
    patience_s: float = 300.0  # how long an answer is tried again where servers fail
    concurrency: int = 64  # requests at once, to each url
    refresh_every: int = 1  # waves with the same weights
    staleness: int = 1  # waves that weights there may be behind, at most, when they answer
    weights: Path | None = None  # the folder that servers read weights from; None: weights/ beside the checkpoints
    update_path: str | None = None  # how they are told, if not in the server's own way: a POST to this path ...
    update_body: str = '{"path": "{path}", "version": "{version}"}'  # ... of this JSON
    update_command: str | None = None  # or a command; {path}, {version} and {url} are filled in
    extra: str = "{}"  # JSON that goes into every request

    def __post_init__(self) -> None:
        expect_within("engine", self, concurrency=(1, MANY), refresh_every=(1, WHOLE), staleness=(0, WHOLE))
        expect_above_zero("engine", self, timeout_s=LONGEST_S, patience_s=math.inf)
        if self.refresh_every > self.staleness + 1:
            most = f"at most {self.staleness + 1} with a staleness of {self.staleness}"
            raise ValueError(f"engine: refresh_every must be {most}, got {self.refresh_every}")
        for name in ("update_body", "extra"):
            try:
                ok = isinstance(json.loads(getattr(self, name)), dict)
            except ValueError:
                ok = False
            if not ok:
                raise ValueError(f"engine: {name} must be a JSON object, got {getattr(self, name)!r}")
        if self.update_path is not None and not self.update_path.startswith("/"):
            raise ValueError(f"engine: update_path must begin with /, got {self.update_path!r}")
        if self.update_command is not None:
            try:
                ok = bool(shlex.split(self.update_command))
            except ValueError:  # of a quotation without end
                ok = False
            if not ok:
                raise ValueError(f"engine: update_command must be a command, got {self.update_command!r}")
        if self.kind == "native":
            if self.urls:
                raise ValueError(f"engine: kind must be http where there are urls, got native with {self.urls[0]}")
            return
        _expect_urls("engine", self.urls)
        if not self.urls:
            raise ValueError("engine: urls must begin with http:// or https:// and a host, got none")
        if self.server == "openai" and not self.told:
            raise ValueError("engine: update_path or update_command must say how the servers take in weights, got none")
        if self.server != "transformers" and not self.model:
            raise ValueError("engine: model must be the name that the servers know it by, got none")

    @property
    def told(self) -> bool:
        """Weights go in as the settings say, not in the server's own way."""
        return self.update_path is not None or self.update_command is not None

    @property
    def key(self) -> str:
        """The servers' key, read from the environment; empty where they want none."""
        return _key_in("engine", self.key_variable)

    @property
    def more(self) -> dict[str, Any]:
        """``extra`` as an object."""
        return json.loads(self.extra)


@dataclass(frozen=True)
class SftConfig:
    """`rlcs sft`: supervised training on answers (or on all tokens of documents)."""

    data: Path = Path("sft.jsonl")  # a file, a folder or a pattern; JSON lines or Parquet
    model: ModelSettings = field(default_factory=ModelSettings)
    run: RunSettings = field(default_factory=RunSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5))
    eval: EvalSettings = field(default_factory=EvalSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)  # of the evaluation
    judge: JudgeSettings = field(default_factory=JudgeSettings)  # of the evaluation
    batch: int = 32  # samples of an optimizer step; the paper's for SFT
    tokens: int = 32768  # of a micro-step, at most; the paper's context
    all_tokens: bool = False  # pre-training: learn every token of a document, pictures aside
    thinking: bool = True  # learn what stands before </think>
    turns: Literal["all", "last"] = "all"  # which of an assistant's turns are learned
    bad_rows: Literal["fatal", "skip"] = "fatal"  # bad rows end the run, or are told and left out
    max_bad_rows: int = 1000  # that are left out, before it is an error after all
    buffer: int | None = None  # rows that are held and shuffled together; None: all, which are checked before the run
    workers: int = 0  # processes that decode pictures ahead; 0: none, and decoded prompts are kept
    ahead: int = 2  # samples that each worker may be ahead
    max_skipped: int = 10  # steps in a row whose gradient is not finite, before the run ends

    def __post_init__(self) -> None:
        expect_within("sft", self, batch=(1, MOST_SAMPLES), buffer=(1, WHOLE), **OF_BOTH)
        self.rollout.expect_for_evaluation("sft")


@dataclass(frozen=True)
class TrainConfig:
    """`rlcs train`: reinforcement learning with curriculum sampling."""

    tasks: Path = Path("tasks.jsonl")  # a file, a folder or a pattern; JSON lines or Parquet
    model: ModelSettings = field(default_factory=ModelSettings)
    run: RunSettings = field(default_factory=RunSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(decay="constant"))
    eval: EvalSettings = field(default_factory=EvalSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    alarms: Limits = field(default_factory=Limits)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    groups: int = 32  # valid groups that a wave should yield to train on
    updates: int = 1  # optimizer steps of a wave, over disjoint parts of its groups
    tokens: int = 32768  # of a micro-step, at most; the paper's context
    normalise: bool = True  # advantages by the group's standard deviation
    surplus: Literal["carry", "record"] = "carry"  # valid groups beyond those wanted: train on them in the next wave?
    refill: bool = False  # DAPO's way: more waves until enough groups are valid; switches expansion off
    # The ratio's log-probabilities by the trainer, weighed against the rollouts': None does it for another engine's.
    recompute: bool | None = None
    overlap: Literal[0, 1] = 0  # waves that are answered ahead, while the trainer steps
    act_on_alarms: bool = True  # down-weight and quarantine domains; otherwise only warn
    proxies: dict[str, str] = field(default_factory=dict)  # domain -> the held-out one whose score the alarms trust
    bad_rows: Literal["fatal", "skip"] = "fatal"  # bad rows end the run, or are told and left out
    max_bad_rows: int = 1000  # that are left out, before it is an error after all
    workers: int = 0  # processes that decode a wave's pictures; 0: none
    ahead: int = 2  # tasks that each worker may be ahead
    max_skipped: int = 10  # steps in a row whose gradient is not finite, before the run ends

    def __post_init__(self) -> None:
        expect_within("train", self, groups=(1, WHOLE), updates=(1, WHOLE), **OF_BOTH)
        if not self.rollout.temperature > 0:
            raise ValueError("train: rollout.temperature must be above 0: a group's answers would be one, got 0")
        if self.proxies and not (self.run.eval_every and self.eval.samples):  # alarms would never hear of them
            found = f"{self.run.eval_every} and {self.eval.samples}"
            raise ValueError(f"train: run.eval_every and eval.samples must be 1 or more with proxies, got {found}")
        if self.overlap and self.refill:
            raise ValueError("train: overlap must be 0 where waves are refilled, got 1")
        if self.engine.kind == "http" and self.engine.server == "transformers" and self.recompute is False:
            raise ValueError("train: recompute must be on: `transformers serve` gives no log-probabilities")

    @property
    def recomputes(self) -> bool:
        return self.engine.kind == "http" if self.recompute is None else self.recompute


PRESETS: dict[str, dict[str, Any]] = {
    "pretrain": {"all_tokens": True, "tokens": 8192, "batch": 1536, "run": {"steps": 120_000}},
    "long-context": {"all_tokens": True, "tokens": 32768, "batch": 1536, "run": {"steps": 10_000}},
    "sft": {"tokens": 32768, "batch": 32},
}
"""The paper's stages (section 4): tokens of a packed sequence, samples of a step, steps."""

T = TypeVar("T")


def read(kind: type[T], path: Path | None, under: Mapping[str, Any] | None = None) -> T:
    """A configuration from a YAML file (or the defaults), over the settings in ``under``: all names and types checked.

    Raises:
        ValueError: the text names the file and the setting.
    """
    if path is None:
        return build(kind, dict(under or {}), "the preset")
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML takes the last of two values that have one name, and a section that stands twice loses its first."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
                raise ValueError(f"a name must stand once in a section, got {twice!r} twice")
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path}: must be UTF-8, got byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise ValueError(f"config: {path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ValueError(f"config: {path}: is not YAML: {said}{line}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of no value of its kind, a date of month 13, say
        raise ValueError(f"config: {path}: {str(error).splitlines()[0]}") from None
    found = {} if found is None else found
    return build(kind, _over(under or {}, found), str(path))


def build(kind: type[T], found: Any, where: str) -> T:
    """A configuration from plain dicts and lists."""
    import pydantic

    _known(kind, found, where)
    try:
        return pydantic.TypeAdapter(kind).validate_python(found)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        at, said = ".".join(map(str, first["loc"])), first["msg"]
        own = said.removeprefix("Value error, ")  # of a dataclass, which says where and what it got
        said = own if own != said else f"{at + ': ' if at else ''}{said}, got {first['input']!r}"
        raise ValueError(f"config: {where}: {said}") from None


def _over(under: Mapping[str, Any], found: Any) -> Any:
    """``found`` with what only ``under`` has."""
    if not isinstance(found, dict):
        return found
    both = {name: _over(value, found[name]) if isinstance(value, dict) else found[name]
            for name, value in under.items() if name in found}  # fmt: skip
    return {**under, **found, **both}


def _known(kind: Any, found: Any, where: str, at: str = "") -> None:
    """Refuses names that a dataclass doesn't have."""
    if not isinstance(found, dict):
        raise ValueError(f"config: {where}: {at.rstrip('.') or 'the file'} must be a mapping, got {found!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in found.items():
        if name not in fields:
            raise ValueError(f"config: {where}: {at}{name} must be one of {', '.join(fields)}")
        if isinstance(value, bool) and "bool" not in str(fields[name].type):  # pydantic takes it for 1 or 0
            raise ValueError(f"config: {where}: {at}{name} must be {fields[name].type}, got {value}")
        if value == "" and "Path" in str(fields[name].type):  # it would be the folder one is in
            raise ValueError(f"config: {where}: {at}{name} must be a path, got ''")
        default = getattr(kind(), name)
        if dataclasses.is_dataclass(default):
            _known(type(default), value, where, f"{at}{name}.")


def plain(config: Any) -> Any:
    """A configuration as JSON's and YAML's types."""
    if dataclasses.is_dataclass(config):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [plain(x) for x in config]
    return str(config) if isinstance(config, Path) else config
