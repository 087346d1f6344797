"""Settings of a run, from files: every name and kind is checked. And where the package's names are found."""

import subprocess
import sys

import pytest

import rlcs
from rlcs.config import RunSettings, SftConfig, TrainConfig, build, plain, read


def test_settings_from_files(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("groups: 7\nrun: {steps: 3, out: there}\ncurriculum: {group_size: 16}\n")
    config = read(TrainConfig, file)
    assert config.groups == 7 and config.run.steps == 3 and config.curriculum.group_size == 16
    assert config.optimizer.lr == TrainConfig().optimizer.lr
    assert build(TrainConfig, plain(config), "again") == config
    for text, said in (
        ("groops: 7", "groops must be one of tasks, model"),
        ("run: {step: 3}", "run.step must be one of out, steps"),
        ("groups: many", "groups: Input should be a valid integer"),
        ("groups: 0", "train: groups must be 1 or more, got 0"),
        ("eval: {limit: 0}", "eval: limit must be 1 or more, got 0"),
        ("eval: {samples: -1}", "eval: samples must be 1 or more without greedy, else 0 or more, got -1"),
        ("eval: {samples: 0, greedy: false}", "eval: samples must be 1 or more without greedy, else 0 or more, got 0"),
        ("run: 3", "run must be a mapping"),
        ("- 1", "the file must be a mapping"),
        ("a: [", "is not YAML: while parsing a flow node, expected the node content, but found '<stream end>'"),
        ("run:\n\tsteps: 3", r"is not YAML: .*, found character '\\t' that cannot start any token \(line 2\)$"),
        ("run: {steps: 2026-13-01}", r"config\.yaml: month must be in 1\.\.12"),
        ("a: " + 9999 * "[", r"config\.yaml: maximum recursion depth exceeded"),
        ("[]", r"the file must be a mapping, got \[\]"),
        (
            "run: {steps: 3}\ngroups: 7\nrun: {out: there}",
            "config.yaml: a name must stand once in a section, got 'run' twice",
        ),
        ("run: {steps: 3, seed: 1, steps: 4}", "a name must stand once in a section, got 'steps' twice"),
        ("run: {threads: 0}", "run: threads must be 1 or more, got 0"),
        ("model: {lora_alpha: 0}", r"model: lora_alpha must be above 0, got 0\.0"),
        ("alarms: {window: 1}", r"config\.yaml: alarms: window must be 2 or more, got 1$"),
        ("run: {seconds: -1}", r"config\.yaml: run: seconds must be above 0, got -1\.0$"),
        (
            "proxies: {a: b}\neval: {samples: 0}",
            "run.eval_every and eval.samples must be 1 or more with proxies, got 0 and 0",
        ),
        ("judge: {concurrency: 0}", "judge: concurrency must be 1 or more, got 0"),
        ("judge: {requests_per_minute: -1}", r"judge: requests_per_minute must be 0 or more, got -1\.0"),
        ("judge: {requests_per_minute: .nan}", "judge: requests_per_minute must be 0 or more, got nan"),
        ("judge: {timeout_s: 0}", r"config\.yaml: judge: timeout_s must be above 0, got 0\.0$"),
        (b"run: {out: f\xfcr}", r"config\.yaml: must be UTF-8, got byte 0xfc"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=said):
            read(TrainConfig, file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {lora_rank: 70000}", "model: lora_rank must be at most 65536, got 70000"),
        ("model: {lora_alpha: .inf}", "model: lora_alpha must be at most 1e+06, got inf"),
        ("model: {lora_alpha: .nan}", "model: lora_alpha must be above 0, got nan"),
        ("run: {threads: 30000}", "run: threads must be at most 1024, got 30000"),
        ("run: {seed: 99999999999999999999}", f"run: seed must be at most {2**63 - 1}, got 99999999999999999999"),
        ("run: {seconds: .inf}", "run: seconds must be at most 1e+09, got inf"),
        ("eval: {samples: 99999999}", "eval: samples must be at most 65536, got 99999999"),
        ("parallel: {timeout_s: 1.0e+30}", "parallel: timeout_s must be at most 1e+07, got 1e+30"),
        ("judge: {timeout_s: .inf}", "judge: timeout_s must be at most 1e+07, got inf"),
        ("engine: {timeout_s: 1.0e+30}", "engine: timeout_s must be at most 1e+07, got 1e+30"),
        ("loss: {kl: 1.0e+30}", "loss: kl must be at most 1000.0, got 1e+30"),
        ("loss: {clip_low: 1}", "loss: clip_low must be above 0 and below 1, got 1.0"),
        ("loss: {clip_high: .nan}", "loss: clip_high must be above 0, got nan"),
        ("loss: {truncate_importance: 0.5}", "loss: truncate_importance must be 1 or more, got 0.5"),
        ("rollout: {cache_tokens: 4611686018427387904}", "rollouts: cache_tokens must be at most 1099511627776, got 4"),
        ("rollout: {thinking_budget: 99999999999999999999}", "rollouts: thinking_budget must be at most 109951162"),
        ("rollout: {random_budgets: [1, 99999999999999999999]}", "0 <= least <= most <= 1099511627776, or None, got"),
        ("run: {steps: yes}", "config.yaml: run.steps must be int | None, got True"),
        ("optimizer: {lr: yes}", "config.yaml: optimizer.lr must be float, got True"),
        ("eval: {limit: no}", "config.yaml: eval.limit must be int | None, got False"),
        ("judge: {urls: [localhost:80/v1], models: [m]}", "judge: urls must begin with http:// or https:// and a host"),
        ("judge: {urls: ['http://[::1/v1'], models: [m]}", "and a host, got 'http://[::1/v1'"),
        ("judge: {urls: ['http://'], models: [m]}", "and a host, got 'http://'"),
        ("judge: {urls: ['http://a:b/v1'], models: [m]}", "and a host, got 'http://a:b/v1'"),
        ("workers: 99999", "train: workers must be at most 1024, got 99999"),
        ("ahead: 99999", "train: ahead must be at most 65536, got 99999"),
    ],
)
def test_numbers_that_no_run_can_mean(text, said, tmp_path):
    """Each would start more than a machine can, or overflow where nothing says which setting it was."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        read(TrainConfig, file)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "share"),
    [({}, 0.4), ({"steps": 80}, 0.5), ({"seconds": 50}, 0.2), ({"seconds": 50, "steps": 80}, 0.5),
     ({"seconds": 10, "steps": 80}, 1)],
)  # fmt: skip
def test_a_run_ends_with_its_steps_or_its_seconds_whichever_come_first(settings, share):
    assert RunSettings(**settings).share(40, 10.0) == share


def test_a_step_s_samples_are_held_together():
    with pytest.raises(ValueError, match="sft: batch must be at most 1048576, got 99999999"):
        SftConfig(batch=99999999)


def test_thresholds_without_end_switch_off():
    off = {"alarms": {"duplicates": float("inf")}, "loss": {"clip_high": float("inf")}}
    assert build(TrainConfig, {**off, "engine": {"patience_s": float("inf")}}, "here").alarms.duplicates == float("inf")


def test_names_load_on_first_use():
    code = (
        "import sys, rlcs; assert set(rlcs.__all__) <= set(dir(rlcs)); assert 'torch' not in sys.modules;"
        "from rlcs import Alarms, Curriculum, rewards; assert 'torch' not in sys.modules;"
        "from rlcs import SftConfig, TrainConfig, Trainer, sft, train; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'rlcs' has no attribute 'trainers'"):
        rlcs.trainers  # noqa: B018


def test_functions_of_the_package_are_those_of_its_modules(tmp_path):
    from rlcs import config, supervised, trainer

    assert rlcs.sft is supervised.sft and rlcs.train is trainer.train and rlcs.TrainConfig is config.TrainConfig
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        rlcs.sft(rlcs.SftConfig(data=tmp_path / "none.jsonl"))
