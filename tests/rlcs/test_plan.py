"""The plan: what is shared out, moved, refused and named first. Its counts are tested in test_costs.py."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from glm4v.config import Config
from rlcs.costs import adapters, gathered_together, moved_bytes, parameters
from rlcs.plan import GPUS, Plan, plan, plan_command


def test_state_is_shared_out_and_the_rest_is_not():
    one, eight, many = (plan(Config(), Plan(gpus=n)) for n in (1, 8, 64))
    for name in ("weights", "gradients", "moments"):
        assert eight["memory_gib"][name] == pytest.approx(8 * many["memory_gib"][name])
    assert one["memory_gib"]["masters"] == pytest.approx(8 * eight["memory_gib"]["weights"])
    assert "masters" not in eight["memory_gib"] and "whole weights (rollout)" not in one["memory_gib"]
    assert one["memory_gib"]["activations"] == eight["memory_gib"]["activations"]
    assert "training needs" in one["problems"][0] and not eight["problems"]
    assert one["phases"]["update"]["compute_seconds"] == pytest.approx(8 * eight["phases"]["update"]["compute_seconds"])


def test_with_adapters_only_they_have_gradients_and_moments():
    whole, few = (plan(Config(), Plan(gpus=8, lora_rank=n)) for n in (0, 16))
    added, every = adapters(Config(), 16), sum(parameters(Config()).values())
    assert few["memory_gib"]["weights"] == pytest.approx((2 * every + 4 * added) / 8 / 2**30)
    assert few["memory_gib"]["moments"] == pytest.approx(whole["memory_gib"]["moments"] * added / every)
    for name in ("update", "decode"):
        assert few["phases"][name]["compute_seconds"] <= whole["phases"][name]["compute_seconds"]
    assert few["peak_gib"]["training"] < whole["peak_gib"]["training"]
    moved = {name: 2 * count for name, count in gathered_together(Config()).items()}
    assert moved_bytes(Config(), lora_rank=16) == (4 * (every + added) - moved["embedding"] - moved["root"], 4 * added)


def test_a_micro_step_moves_what_the_trainer_moves():
    config, run = Config(), Plan(gpus=8)
    moved = {name: 2 * count for name, count in gathered_together(config).items()}
    every = sum(parameters(config).values())
    assert moved_bytes(config) == (4 * every - moved["embedding"] - moved["root"], 4 * every)
    found = plan(config, run)
    seconds = found["micro_steps"] * sum(moved_bytes(config)) * 7 / 8 / (450e9 * 0.7)
    assert found["phases"]["update"]["traffic_seconds"] == pytest.approx(seconds)


def test_copies_gather_inside_a_node_and_sum_up_over_nodes():
    full, copies = (plan(Config(), Plan(gpus=64, replicate=n)) for n in (1, 8))
    assert copies["shards"] == 8 and full["shards"] == 64
    inside = copies["micro_steps"] * sum(moved_bytes(Config())) * 7 / 8 / (450e9 * 0.7)
    between = 2 * 7 / 8 * moved_bytes(Config())[1] / 8 / (50e9 * 0.7)
    assert copies["phases"]["update"]["traffic_seconds"] == pytest.approx(inside + between)
    assert copies["peak_gib"]["training"] > full["peak_gib"]["training"]


def test_a_node_takes_in_once_what_its_gpus_gather():
    narrow = replace(GPUS["h100"], network_gbps=10)
    found = plan(Config(), Plan(gpus=64), narrow)
    seconds = found["micro_steps"] * sum(moved_bytes(Config())) * 63 / 64 / (8 * 10e9 * 0.7)
    assert found["phases"]["update"]["traffic_seconds"] == pytest.approx(seconds)


def test_micro_steps_hold_each_answer_once_and_prompts_as_often_as_they_are_read():
    # 7 answers of 4096 fit behind a prompt of 2048; the eighths of 5 groups make one micro-step.
    found = plan(Config(), Plan(gpus=1, groups=5))
    assert found["micro_steps"] == 5 + 1
    assert found["tokens_per_s"]["read"] * found["seconds"] == pytest.approx(5 * (2 * 2048 + 8 * 4096))
    assert plan(Config(), Plan(gpus=8, groups=5))["micro_steps"] == 1


def test_rows_that_wait_take_the_places_of_those_that_end():
    run = Plan(gpus=8, groups=64, expansion=1)
    decode = plan(Config(), run)["phases"]["decode"]
    rows = 64 * 8 / 8
    assert decode["rows"] == min(rows, decode["rows"]) < rows
    assert decode["steps"] == pytest.approx(run.longest_answer + (rows / decode["rows"] - 1) * run.answer, abs=1)


def test_what_breaks_first_is_named_first():
    strain = plan(Config(), Plan(gpus=512))["breaks_first"]
    assert list(strain.values()) == sorted(strain.values(), reverse=True)
    assert next(iter(strain)).startswith("decoding: the longest answer")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "gpus must be 1 or more, got 0"),
        ({"lora_rank": -1}, "lora_rank must be 0 or more, got -1"),
        ({"gpus": 8, "replicate": 3}, "replicate must divide the 8 GPUs, got 3"),
        ({"expansion": 0.5}, "expansion must be 1 or more, got 0.5"),
        ({"expansion": math.inf}, "expansion must be at most 1000.0, got inf"),
        ({"image_tokens": 4096}, "image_tokens must be from 0 to prompt = 2048, got 4096"),
        ({"longest_answer": 1}, "longest_answer must be 4096"),
        ({"context": 4096}, "prompt [+] answer must be at most context = 4096, got 6144"),
    ],
)
def test_bad_settings_are_told(changes, said):
    with pytest.raises(ValueError, match=f"plan: {said}"):
        Plan(**changes)


def test_a_small_model_has_figures_too(capsys):
    plan_command("demo", Plan(1, 2048, prompt=256, image_tokens=64, answer=64, longest_answer=128))
    said = capsys.readouterr().out
    assert "0.0011 GiB" in said and "0.023 s, " in said and not re.search(r" 0(\.0+)? (GiB|s,|of)", said)
    plan_command(run=Plan())
    assert "4.79 GiB" in (said := capsys.readouterr().out) and "40.7 of 67.1 GiB" in said and "1292 s, " in said


def test_it_runs_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from rlcs.plan import plan_command, Plan;"
        "plan_command(run=Plan(gpus=64), json=True)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert json.loads(found.stdout)["run"]["gpus"] == 64, found.stderr
