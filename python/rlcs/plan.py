"""`rlcs plan`: memory of a GPU, traffic and tokens a second of a run that is too large to try, by arithmetic. No torch.

A roofline: each phase takes the longest of its compute, its memory reads and its traffic, at assumed shares of the data
sheets' peaks. `costs` counts what is computed and held, which tests compare with the model; the shares are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from glm4v.config import Config, TextConfig, VisionConfig

from .bounds import expect_within
from .costs import (
    MERGED,
    activation_bytes,
    gathered_bytes,
    kv_bytes,
    moved_bytes,
    parameters,
    state_bytes,
    text_flops,
    vision_flops,
)

GIB = 2**30
VALUE = 2  # bytes of bf16, which the model computes in


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links: peaks of the data sheet, dense and in one direction, and the shares that we assume."""

    source: str
    memory_gb: float  # 1e9 bytes
    tflops: float  # bf16
    memory_gbps: float  # GB/s
    link_gbps: float  # GB/s of a GPU to the others of its node
    network_gbps: float  # GB/s of a GPU to other nodes
    memory_share: float = 0.9  # the rest is the CUDA context, libraries' workspace and fragments
    compute_share: float = 0.4
    bandwidth_share: float = 0.7

    @property
    def flops_s(self) -> float:
        return self.tflops * 1e12 * self.compute_share

    @property
    def read_s(self) -> float:
        return self.memory_gbps * 1e9 * self.bandwidth_share

    @property
    def room(self) -> float:
        return self.memory_gb * 1e9 * self.memory_share


GPUS = {
    "h100": Hardware("NVIDIA H100 data sheet (SXM); DGX H100: 400 Gbit/s a GPU", 80, 989, 3350, 450, 50),
    "h200": Hardware("NVIDIA H200 data sheet (SXM); DGX H200: 400 Gbit/s a GPU", 141, 989, 4800, 450, 50),
    "a100": Hardware("NVIDIA A100 80GB data sheet (SXM); DGX A100: 200 Gbit/s a GPU", 80, 312, 2039, 300, 25),
}

MODELS = {
    "9b": Config(),  # the release
    "demo": Config(  # `tiny`
        vision_config=VisionConfig(
            depth=1, hidden_size=64, num_heads=2, image_size=112, out_hidden_size=96, intermediate_size=192
        ),
        text_config=TextConfig(
            vocab_size=416, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, max_position_embeddings=2048, mrope_section=(2, 3, 3),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run, its sharding and its GPUs. Lengths are assumptions: the paper gives 32768 for the micro-step alone."""

    gpus: int = 8  # of all nodes together
    context: int = 32768  # tokens of a micro-step, at most
    gpu: Literal["h100", "h200", "a100"] = "h100"  # whose data sheet is read
    gpus_per_node: int = 8  # beyond which traffic goes over the network
    algorithm: Literal["rlcs", "sft"] = "rlcs"  # waves of answers and updates, or updates alone
    replicate: int = 1  # copies of the sharded weights, `parallel.replicate`: nodes, say
    activation_checkpointing: bool = True  # each block is computed again in its backward
    lora_rank: int = 0  # of adapters; 0 trains the weights themselves
    prompt: int = 2048  # tokens, pictures included
    image_tokens: int = 1024  # of the prompt: one picture
    answer: int = 4096  # tokens, on average
    longest_answer: int = 16384  # tokens; a wave waits for it
    group: int = 8  # answers to a prompt
    groups: int = 512  # that a wave trains on; of sft: samples of a step
    expansion: float = 1.5  # groups rolled out for each that is trained on
    updates: int = 1  # optimizer steps of a wave

    def __post_init__(self) -> None:
        for name in ("gpus", "context", "gpus_per_node", "prompt", "answer", "group", "groups", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be 1 or more, got {getattr(self, name)}")
        if self.lora_rank < 0:
            raise ValueError(f"plan: lora_rank must be 0 or more, got {self.lora_rank}")
        if self.replicate < 1 or self.gpus % self.replicate:
            raise ValueError(f"plan: replicate must divide the {self.gpus} GPUs, got {self.replicate}")
        expect_within("plan", self, expansion=(1, 1e3))
        if not 0 <= self.image_tokens <= self.prompt:
            raise ValueError(f"plan: image_tokens must be from 0 to prompt = {self.prompt}, got {self.image_tokens}")
        if self.longest_answer < self.answer:
            raise ValueError(f"plan: longest_answer must be {self.answer} (answer) or more, got {self.longest_answer}")
        if self.prompt + self.answer > self.context:
            most = f"at most context = {self.context}"
            raise ValueError(f"plan: prompt + answer must be {most}, got {self.prompt + self.answer}")


def plan(config: Config, run: Plan, hardware: Hardware | None = None) -> dict[str, Any]:
    """Bytes of a GPU, seconds of a wave by phase and by what bounds it, tokens a second, and what does not fit; the
    model computes in bf16."""
    gpu = hardware or GPUS[run.gpu]
    shards, several = run.gpus // run.replicate, run.gpus > 1
    state = state_bytes(config, shards=shards if several else None, lora_rank=run.lora_rank)
    micro = _micro_steps(run)
    memory = {name: size for name, size in state.items() if size}
    in_block, outside = gathered_bytes(config, shards, lora_rank=run.lora_rank) if several else (0.0, 0.0)
    activations = activation_bytes(config, run.context, micro["rows"], micro["patches"], run.activation_checkpointing)
    if several:
        memory |= {"whole, in a block's backward pass": in_block, "whole, outside of blocks": outside}
    memory["activations"] = activations
    step = state.pop("gradients in fp32")
    training = sum(state.values()) + max(in_block + activations, outside, step)
    phases = {"update": _update(config, run, gpu, shards, micro)}
    problems, peaks = [], {"training": training}
    if training > gpu.room:
        more = "" if run.activation_checkpointing else ", or take --activation-checkpointing"
        problems.append(
            f"training needs {training / GIB:.1f} GiB of a GPU, {gpu.room / GIB:.1f} are usable: shard over more than "
            f"{shards} GPUs or lower --context from {run.context}{more}"
        )
    if run.algorithm == "rlcs":
        # Gradients are gone by then; ranks put the whole weights together for the rollouts.
        whole = VALUE * sum(parameters(config).values()) if several else 0
        held = whole + sum(state.values()) - state["gradients"]
        cache, phases["prefill"], phases["decode"] = _rollout(config, run, gpu, gpu.room - held)
        if several:
            phases["weights for rollouts"] = _longest(traffic=_traffic(run, gpu, shards, whole))
            memory["whole weights (rollout)"] = whole
        memory["KV cache (rollout)"] = cache
        peaks["rollout"] = held + cache
        if not cache:
            problems.append(
                f"no answer's cache fits beside {held / GIB:.1f} GiB of weights and moments, {gpu.room / GIB:.1f} are "
                "usable: shard over more GPUs or lower --longest-answer"
            )
    longest = run.prompt + (run.longest_answer if run.algorithm == "rlcs" else run.answer)
    if longest > run.context:
        problems.append(f"a sample of {longest} tokens does not fit a micro-step: raise --context from {run.context}")
    wave = sum(phase["seconds"] for phase in phases.values())
    answers = run.groups * (run.group if run.algorithm == "rlcs" else 1) * run.answer
    return {
        "run": asdict(run), "hardware": asdict(gpu), "parameters": parameters(config), "shards": shards,
        "memory_gib": {name: size / GIB for name, size in memory.items()},
        "peak_gib": {name: size / GIB for name, size in peaks.items()}, "usable_gib": gpu.room / GIB,
        "micro_steps": micro["steps"], "phases": phases, "seconds": wave,
        "tokens_per_s": {"trained": answers / wave, "read": run.gpus * micro["tokens"] / wave},
        "breaks_first": _strain(phases, micro["steps"], {name: size / gpu.room for name, size in peaks.items()}),
        "problems": problems,
    }  # fmt: skip


def _micro_steps(run: Plan) -> dict[str, float]:
    """Of a GPU in a wave: answers of a prompt share it as far as the budget allows (`batches`), here with all answers
    of the mean length. The largest micro-step is as long as the budget, and made as all of them together are."""
    group = run.group if run.algorithm == "rlcs" else 1
    together = min(group, (run.context - run.prompt) // run.answer)  # answers behind one reading of their prompt
    whole, rest = divmod(group, together)
    bins = whole / (run.context // (run.prompt + together * run.answer))
    if rest:
        bins += 1 / (run.context // (run.prompt + rest * run.answer))
    units = whole + bool(rest)
    read = units * run.prompt + group * run.answer  # tokens, of a group
    return {
        "steps": run.updates * math.ceil(run.groups * bins / (run.gpus * run.updates)),
        "units": units,
        "tokens": run.groups * read / run.gpus,
        "rows": run.context * group * run.answer / read,
        "patches": run.context * units * run.image_tokens * MERGED / read,
    }


def _update(config: Config, run: Plan, gpu: Hardware, shards: int, micro: dict[str, float]) -> dict[str, Any]:
    group = run.group if run.algorithm == "rlcs" else 1
    prompts, answers = run.groups * micro["units"], run.groups * group
    seen = run.image_tokens * MERGED
    pairs = prompts * run.prompt**2 / 2 + answers * run.answer * (run.prompt + run.answer / 2)
    read = prompts * run.prompt + answers * run.answer
    flops = text_flops(config, read, pairs, answers * run.answer, run.lora_rank)
    flops += vision_flops(config, prompts * seen, prompts * seen**2, run.lora_rank)
    work = flops.update(run.activation_checkpointing)
    gathered, summed = moved_bytes(config, lora_rank=run.lora_rank)
    traffic = micro["steps"] * _traffic(run, gpu, shards, gathered + summed)
    # Each GPU sums its rows up with those of the other copies, in the last micro-step of an update.
    if run.replicate > 1:
        network = gpu.network_gbps if run.gpus > run.gpus_per_node else gpu.link_gbps
        rows = 2 * (run.replicate - 1) / run.replicate * summed / shards
        traffic += run.updates * rows / (network * 1e9 * gpu.bandwidth_share)
    return {"pflops": work / 1e15, **_longest(compute=work / run.gpus / gpu.flops_s, traffic=traffic)}


def _rollout(config: Config, run: Plan, gpu: Hardware, room: float) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Bytes of the cache, prefill and decoding. Rows that end make room for others (`rollout`); each has pages for its
    longest answer from the start, and shares those of its prompt, of which four times as many are held (`pages`)."""
    groups, each = run.groups * run.expansion, parameters(config)
    rows = groups * run.group / run.gpus
    row = kv_bytes(config) * (run.longest_answer + 4 * run.prompt / run.group)
    together = min(math.ceil(rows), max(0, int(room // row)))
    seen = run.image_tokens * MERGED
    read = text_flops(config, run.prompt, run.prompt**2 / 2, 1) + vision_flops(config, seen, seen**2)
    prefill = groups * read.forward
    late = run.prompt + run.answer / 2  # keys that an answer's token sees
    said = text_flops(config, run.answer, run.answer * late, run.answer)
    decode = groups * run.group * said.forward
    # All rows go on until the last that began ends: at best as long as one of the longest.
    steps = run.longest_answer + max(0.0, rows / max(together, 1) - 1) * run.answer
    weights = steps * VALUE * each["text"]  # the head is read in place of the embedding, which is as large
    keys = rows * run.answer * late * kv_bytes(config)
    compute = decode / run.gpus / gpu.flops_s
    return (
        float(together * row),
        {"pflops": prefill / 1e15, **_longest(compute=prefill / run.gpus / gpu.flops_s)},
        {
            "pflops": decode / 1e15, **_longest(compute=compute, reads=(weights + keys) / gpu.read_s),
            "rows": together, "steps": math.ceil(steps), "share_of_weights": weights / (weights + keys),
            "tail": min(1.0, run.longest_answer / steps),
        },
    )  # fmt: skip


def _traffic(run: Plan, gpu: Hardware, shards: int, size: float) -> float:
    """Seconds in which a GPU receives, of ``size`` bytes, all that it doesn't hold. What comes from other nodes comes
    into a node once, by the network of all its GPUs, as NCCL's rings do it."""
    link = gpu.link_gbps
    if shards > run.gpus_per_node:
        link = min(link, gpu.network_gbps * run.gpus_per_node)
    return size * (shards - 1) / shards / (link * 1e9 * gpu.bandwidth_share)


def _longest(**seconds: float) -> dict[str, Any]:
    bound = max(seconds, key=lambda name: seconds[name])
    return {"seconds": seconds[bound], "bound": bound, **{f"{name}_seconds": s for name, s in seconds.items()}}


def _strain(phases: dict[str, Any], micro_steps: float, peaks: dict[str, float]) -> dict[str, float]:
    """How near each limit is, 1 is there; the worst first. A cache fills what it finds, so memory counts in training
    alone."""
    update = phases["update"]
    strain = {
        "memory in training": peaks["training"],
        "traffic of the update, over its compute": update["traffic_seconds"] / update["compute_seconds"],
        "imbalance: one micro-step, over those of a wave": 1 / micro_steps,
    }
    if "decode" in phases:
        decode = phases["decode"]
        strain["decoding: the longest answer, over all steps"] = decode["tail"]
        strain["decoding: reads, without compute"] = 1 - decode["compute_seconds"] / decode["seconds"]
    return dict(sorted(strain.items(), key=lambda item: -item[1]))


def plan_command(model: str = "9b", run: Plan = Plan(), json: bool = False) -> None:
    """Prints what a run costs, by arithmetic. No GPU is needed; one wave was measured on an H200: docs/scale.md.

    Args:
        model: "9b" (the release), "demo", or the folder of a checkpoint.
        run: the run and its GPUs.
        json: the same as JSON.
    """
    found = plan(MODELS[model] if model in MODELS else Config.from_pretrained(model), run)
    if json:
        from json import dumps

        print(dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    title = f"{run.algorithm} of {model} on {run.gpus} {run.gpu}: arithmetic, not measured"
    table = Table("what", "figure", title=title, caption=found["hardware"]["source"])
    for name, gib in found["memory_gib"].items():
        table.add_row(name, f"{_digits(gib, 2)} GiB")
    for name, gib in found["peak_gib"].items():
        table.add_row(f"peak in {name}", f"{_digits(gib, 1)} of {found['usable_gib']:.1f} GiB that are usable")
    table.add_row("micro-steps of a GPU", f"{found['micro_steps']:.0f}")
    for name, phase in found["phases"].items():
        table.add_row(name, f"{_digits(phase['seconds'], 1)} s, bound by {phase['bound']}")
    wave, speed = found["seconds"], found["tokens_per_s"]["trained"]
    table.add_row("wave", f"{_digits(wave, 0)} s, {speed:.0f} trained tokens/s")
    for name, strain in found["breaks_first"].items():
        table.add_row(f"strain: {name}", f"{strain:.0%}")
    Console().print(table)
    for problem in found["problems"]:
        print(f"does not fit: {problem}")


def _digits(value: float, decimals: int) -> str:
    """With so many decimals, or two digits where these would be zeros: a small model has figures, too."""
    return f"{value:.{decimals}f}" if value == 0 or value >= 10**-decimals else f"{value:.2g}"
