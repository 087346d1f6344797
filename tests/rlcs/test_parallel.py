"""One run on several processes (gloo, on the CPU): the same step on 1, 2 and 4 ranks, files, what ranks tell others."""

import dataclasses
import errno
import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from fake_server import fake
from ranked_runs import STEP, cold_config, cut_to, expect_close, expect_equal, rl_config, rows_of, run_job, tensors_of
from small_runs import with_damaged_pictures
from worlds import in_worlds

from glm4v import Glm4v, Processor
from rlcs import checkpoint, fsdp, lora, parallel
from rlcs.config import EngineSettings, EvalSettings, ModelSettings, ParallelSettings
from rlcs.learner import Learner, sft_loss
from rlcs.loss import LossSettings, policy_loss
from rlcs.optimizer import Optimizer
from rlcs.prompts import Prompts, make
from rlcs.run import load_model, write_model
from rlcs.types import Sample

pytestmark = pytest.mark.long

# --- the same step ---


@functools.cache
def samples_of(demo):
    """Three groups of answers: about a picture, a video and none; a sample more that has no group."""
    processor = Processor.from_pretrained(demo / "model")
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (4, 28, 56, 3), dtype=np.uint8)
    parts = [
        [{"type": "image", "image": clip[0]}, {"type": "text", "text": "Which?"}],
        "What is six times seven? Say it slowly.",
        [{"type": "text", "text": "Watch."}, {"type": "video", "video": clip, "fps": 24}],
        "Why?",
    ]
    prompts = [make([{"role": "user", "content": content}], processor) for content in parts]
    samples = []
    for source, count in ((0, 3), (1, 4), (2, 2), (3, 1)):
        for g in range(count):
            answer = rng.integers(0, 256, 4 + 3 * g)
            ids = np.concatenate([prompts[source].input_ids.numpy(), answer])
            trained = np.arange(len(ids)) >= len(ids) - len(answer)
            logprobs = np.where(trained, -5.5, 0).astype(np.float32)
            samples.append(Sample(ids, trained, logprobs, (-1.0) ** g * (1 + source), source))
    return samples, prompts


def policy(micro):
    value, facts = policy_loss(
        micro.new,
        torch.from_numpy(micro.batch.logprobs),
        torch.from_numpy(micro.batch.advantages),
        micro.trained,
        torch.from_numpy(micro.batch.cu_seqlens),
        LossSettings(),
    )
    return value * micro.batch.weight, facts


def one_step(demo, loss, chosen, tokens, dtype=None, replicate=1, **settings):
    """Facts of an update, the first moments (a tenth of the clipped gradients) and the weights behind it."""
    parallel.join("cpu", ParallelSettings(replicate, 60.0))
    model = load_model(ModelSettings(path=demo / "model", dtype=dtype, **settings))
    with torch.no_grad():
        for layer in lora.adapted(model).values():  # which do nothing at the beginning
            b = layer.lora_B["default"].weight
            parallel.fill(b, torch.arange(b.numel()).reshape(b.shape).sin() / 10)
    optimizer = Optimizer(model, STEP)
    samples, prompts = samples_of(demo)
    samples = [sample for sample in samples if sample.source in chosen]
    learner = Learner(model, optimizer, tokens)
    old = learner.with_old(samples, prompts, 1.0)
    facts = learner.update(samples, prompts, loss, STEP.lr)
    state = {name: parallel.plain(x).clone() for name, x in optimizer.state_dict().items() if ".step" not in name}
    weights = {name: parallel.plain(x.detach()).float() for name, x in model.named_parameters()}
    return facts, state, weights, [sample.old for sample in old]


def step_job(name, *arguments, folder):
    found = one_step(*arguments[:-1], **arguments[-1])
    if parallel.first():
        torch.save(found, folder / name)


CASES = {
    "sft": (sft_loss, (0, 1, 2, 3), 60, {}),
    "policy": (policy, (0, 1, 2, 3), 60, {}),
    "recomputed": (policy, (0, 1, 2, 3), 120, {"activation_checkpointing": True}),
    "text": (policy, (1, 3), 60, {}),
    "few": (sft_loss, (2,), 1 << 20, {}),
    "frozen": (sft_loss, (0, 1, 2, 3), 60, {"freeze": ("vision",)}),
    "tower": (policy, (0, 1, 2, 3), 60, {"freeze": ("language", "merger")}),
    "low": (policy, (0, 1, 2, 3), 60, {"dtype": "bfloat16"}),
    "adapters": (policy, (0, 1, 2, 3), 60, {"lora_rank": 3}),  # of which a rank of four has no row
    "low adapters": (policy, (0, 1, 2, 3), 60, {"lora_rank": 3, "freeze": ("vision",), "dtype": "bfloat16"}),
}
WORLDS = {"2": (2, {}), "4": (4, {}), "2x2": (4, {"replicate": 2})}
TRIED = [
    *((case, "2") for case in CASES),
    *(("sft", "4"), ("policy", "4"), ("policy", "2x2"), ("adapters", "4"), ("adapters", "2x2")),
]


@pytest.fixture(scope="module")
def steps(demo, tmp_path_factory):
    """Results of every case on every world, by name."""
    folder = tmp_path_factory.mktemp("steps")
    jobs = []
    for case, world in TRIED:
        (size, how), (loss, chosen, tokens, settings) = WORLDS[world], CASES[case]
        jobs.append((size, step_job, (f"{case}-{world}", demo, loss, chosen, tokens, {**settings, **how})))
    in_worlds(jobs, folder)
    return {path.name: torch.load(path, weights_only=False) for path in folder.iterdir()}


@pytest.mark.parametrize(("case", "world"), TRIED)
def test_the_step_does_not_depend_on_the_number_of_ranks(case, world, demo, steps):
    loss, chosen, tokens, settings = CASES[case]
    facts, state, weights, old = steps[f"{case}-{world}"]
    expected_facts, expected_state, expected_weights, expected_old = one_step(demo, loss, chosen, tokens, **settings)
    low = "low" in case  # bf16 rounds what one rank adds up otherwise than several do
    for name, expected in expected_facts.items():
        if name != "micro_steps":
            assert facts[name] == pytest.approx(expected, rel=2e-2 if low else 1e-5, abs=1e-5), name
    assert state.keys() == expected_state.keys()
    scale = max(float(x.abs().max()) for name, x in expected_state.items() if name.startswith("exp_avg."))
    for name, expected in expected_state.items():
        if name.startswith("exp_avg."):
            assert torch.allclose(state[name], expected, rtol=0, atol=(5e-2 if low else 1e-5) * scale), name
    for name, expected in expected_weights.items():
        assert torch.allclose(weights[name], expected, rtol=2**-8 if low else 0, atol=2.1e-4 if low else 1e-5), name
    for found, expected in zip(old, expected_old, strict=True):
        assert np.allclose(found, expected, rtol=0, atol=5e-2 if low else 1e-5)


def summing_job(demo, *, folder):
    """Two copies sum gradients up as often as there are groups of weights, however many micro-steps there are."""
    parallel.join("cpu", ParallelSettings(2, 60.0))
    model = load_model(ModelSettings(path=demo / "model"))
    learner = Learner(model, Optimizer(model, STEP), 60)
    samples, prompts = samples_of(demo)
    texts = [sample for sample in samples if sample.source == 1]
    samples = [samples[0], *(dataclasses.replace(text, source=i) for i in range(1, 9) for text in texts)]
    prompts = [prompts[0], *[prompts[1]] * 8]
    steps = learner._plan(samples, prompts)[0]
    seen = parallel.gather([any(samples[i].source == 0 for i in step.samples) for step in steps])
    assert {True, False} == {any(each) for each in zip(*seen, strict=True)} and all(step.pictured for step in steps)
    between, counts, gradients = parallel.mesh().get_group("replicate"), [0, 0, 0], []
    whole, all_reduce = fsdp.sum_over_copies, torch.distributed.all_reduce

    def counted(tensor, *arguments, group=None, **how):
        counts[len(gradients)] += group is between
        return all_reduce(tensor, *arguments, group=group, **how)

    def step(rate):
        gradients.append({name: parallel.plain(w.grad) for name, w in model.named_parameters()})
        model.zero_grad()
        return 0.0

    learner.optimizer.step, torch.distributed.all_reduce = step, counted
    for each in (whole, lambda model, on: whole(model, True)):  # and so in every micro-step
        fsdp.sum_over_copies = each
        learner.update(samples, prompts, policy, 0.0)
    fsdp.sum_over_copies, torch.distributed.all_reduce = whole, all_reduce
    groups = len(fsdp.blocks_of(model)) + (fsdp.embedding_of(model) is not None) + 1
    assert counts == [groups, groups * len(steps), 0]
    for name, expected in gradients[1].items():
        assert torch.allclose(gradients[0][name], expected, rtol=0, atol=1e-5 * float(expected.abs().max())), name
    (folder / f"{parallel.rank()}").touch()


def test_copies_sum_gradients_up_in_the_last_micro_step(demo, tmp_path):
    in_worlds([(4, summing_job, (demo,))], tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


# --- whole runs ---


@pytest.mark.parametrize(("sizes", "changes"), [((2, 4), {}), ((2,), {"overlap": 1})], ids=["in turn", "ahead"])
def test_waves_do_not_depend_on_the_number_of_ranks(sizes, changes, demo, tmp_path):
    in_worlds([(size, run_job, (rl_config(demo, tmp_path / f"{size}", **changes),)) for size in sizes], tmp_path)
    run_job(rl_config(demo, tmp_path / "1", **changes), folder=tmp_path)
    expected = rows_of(tmp_path / "1")
    assert sum(row.get("trained_groups", 0) for row in expected) >= 4
    for size in map(str, sizes):
        expect_close(rows_of(tmp_path / size), expected)
        for wave in ("000001", "000002"):
            name = f"rollouts/{wave}.jsonl"
            assert (tmp_path / size / name).read_text() == (tmp_path / "1" / name).read_text()
        weights, whole = tensors_of(tmp_path / size), tensors_of(tmp_path / "1")
        assert all(torch.allclose(weights[name], whole[name], rtol=0, atol=1e-4) for name in whole)
        assert not list((tmp_path / size / "checkpoints").glob("*.part"))


def noting_job(config, *, folder):
    """A run that notes whose pictures have been decoded for this rank."""
    made, keep = set(), Prompts.keep

    def noted(self, id, prompt):
        made.add(id)
        keep(self, id, prompt)

    Prompts.keep = noted
    try:
        run_job(config, folder=folder)
    finally:
        Prompts.keep = keep
    (folder / f"made-{parallel.size()}-{parallel.rank()}").write_text(json.dumps(sorted(made)))


@pytest.mark.parametrize(("damaged", "workers"), [(False, 0), (True, 1)])
def test_a_rank_decodes_what_it_reads_and_all_leave_out_the_same(damaged, workers, demo, tmp_path):
    tasks = with_damaged_pictures(demo, tmp_path) if damaged else demo / "train.jsonl"
    changes = {"tasks": tasks, "bad_rows": "skip", "eval": EvalSettings()}
    several = dataclasses.replace(rl_config(demo, tmp_path / "2"), workers=workers, **changes)
    in_worlds([(2, noting_job, (several,))], tmp_path)
    noting_job(dataclasses.replace(rl_config(demo, tmp_path / "1"), **changes), folder=tmp_path)
    expect_close(rows_of(tmp_path / "2"), rows_of(tmp_path / "1"))
    for path in (tmp_path / "1/rollouts").glob("*.jsonl"):
        assert path.read_text() == (tmp_path / "2/rollouts" / path.name).read_text()
    alone, *each = (set(json.loads((tmp_path / f"made-{name}").read_text())) for name in ("1-0", "2-0", "2-1"))
    assert each[0] | each[1] == alone
    if not damaged:  # where a task falls out, those behind it change their rank
        assert all(len(one) < len(alone) for one in each)


def test_one_rank_of_several_asks_the_servers(demo, tmp_path):
    """As often as a process alone does; weights that all of them lay are the same, and so is the run."""
    asked = {}
    for size in (1, 2):
        with fake(demo / "model") as server:
            engine = EngineSettings("http", (server.url,), "vllm", model="tiny", patience_s=30.0)
            config = rl_config(demo, tmp_path / f"{size}", engine=engine)
            in_worlds([(size, run_job, (config,))], tmp_path)
            asked[size] = sorted(json.dumps(body) for path, _, body in server.requests if path.endswith("completions"))
        assert not list((tmp_path / f"{size}" / "weights").glob("*.part"))
    assert asked[1] == asked[2]
    expect_close(rows_of(tmp_path / "2"), rows_of(tmp_path / "1"))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_any_number_of_ranks(dtype, demo, tmp_path):
    config = functools.partial(cold_config, demo, dtype=dtype)
    in_worlds([(2, run_job, (config(tmp_path / "whole"),))], tmp_path)
    for size in (1, 2, 4):
        cut_to(tmp_path / "whole", tmp_path / f"{size}", 1)
    in_worlds([(size, run_job, (config(tmp_path / f"{size}"),)) for size in (2, 4)], tmp_path)
    run_job(config(tmp_path / "1"), folder=tmp_path)
    assert rows_of(tmp_path / "2") == rows_of(tmp_path / "whole")
    expect_equal(tensors_of(tmp_path / "2"), tensors_of(tmp_path / "whole"))
    cut_to(tmp_path / "1", tmp_path / "back", 2)  # one process has written the second step
    in_worlds([(2, run_job, (config(tmp_path / "back"),))], tmp_path)
    expected = tensors_of(tmp_path / "whole")
    for name in ("1", "4", "back"):
        found = tensors_of(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # A shift of all keys leaves a softmax as it is, but for what is rotated: its gradient is rounding, which
            # Adam makes a step of the whole rate, either way, in each of the two steps that ran apart.
            apart = 2 * 2 * STEP.lr if key.endswith("k_proj.bias") else 2e-4
            assert torch.allclose(found[key].float(), value.float(), rtol=2**-7, atol=apart), key


def test_transformers_reads_what_several_ranks_write(demo, tmp_path):
    in_worlds([(2, write_job, (demo,))], tmp_path)
    from transformers import Glm4vForConditionalGeneration

    theirs, ours = Glm4vForConditionalGeneration.from_pretrained(tmp_path), Glm4v.from_pretrained(demo / "model")
    ids = torch.arange(20)
    mine = ours(ids, torch.tensor([0, 20], dtype=torch.int32), ids.expand(3, -1))
    assert torch.allclose(mine, theirs(input_ids=ids[None]).logits[0], atol=1e-4)
    written = Glm4v.from_pretrained(tmp_path)
    expect_equal(dict(written.named_parameters()), dict(ours.named_parameters()))


def write_job(demo, *, folder):
    parallel.join("cpu", ParallelSettings())
    write_model(load_model(ModelSettings(path=demo / "model")), demo / "model", folder)


def full_disk_job(demo, *, folder):
    """The second rank's disk is full, then the first one's in the middle of the model."""
    parallel.join("cpu", ParallelSettings())
    model = load_model(ModelSettings(path=demo / "model"))
    for step, (owner, name, rank) in enumerate(
        ((torch.distributed.checkpoint.HuggingFaceStorageWriter, "write_data", 1), (fsdp.Later, "cpu", 0)), 2
    ):
        whole, calls = getattr(owner, name), []

        def full(self, *arguments, whole=whole, calls=calls, rank=rank):
            calls.append(self)
            if parallel.rank() == rank and len(calls) == (1 if rank else 5):
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(self, *arguments)

        save = functools.partial(
            checkpoint.save,
            folder,
            write_model=lambda part: write_model(model, demo / "model", part),
            tensors={"weight": model.lm_head.weight.detach()},
            state={},
            keep=2,
        )
        save(step=1)
        setattr(owner, name, full)
        with pytest.raises(OSError, match=rf"step-00000{step} cannot be written: No space left .* as they were"):
            save(step=step)
        setattr(owner, name, whole)


def test_a_full_disk_of_any_rank_leaves_the_older_checkpoints(demo, tmp_path):
    in_worlds([(2, full_disk_job, (demo,))], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def failing_job(demo, *, folder):
    """The second rank alone fails while a checkpoint is written: it waits for nobody, and the first one loses it."""
    parallel.join("cpu", ParallelSettings(timeout_s=60.0))
    model = load_model(ModelSettings(path=demo / "model"))
    if parallel.rank():
        fsdp.Later.cpu = lambda self: bytearray(1 << 50)
    with pytest.raises((MemoryError, RuntimeError)) as failed:
        checkpoint.save(folder, 1, lambda part: write_model(model, demo / "model", part), {}, {}, 2)
    assert isinstance(failed.value, MemoryError) if parallel.rank() else parallel.lost(failed.value)


def test_a_rank_that_fails_alone_while_saving_waits_for_nobody(demo, tmp_path):
    start = time.monotonic()
    in_worlds([(2, failing_job, (demo,))], tmp_path)
    assert not list(tmp_path.iterdir()) and time.monotonic() - start < 50  # the world's patience is a minute


# --- what ranks tell each other ---


def telling_job(*, folder):
    parallel.join("cpu", ParallelSettings())
    rank, size = parallel.rank(), parallel.size()
    assert parallel.collect([str(i) for i in parallel.share(7)], 7) == [str(i) for i in range(7)]
    assert {k: float(v) for k, v in parallel.sums({"a": torch.tensor(1.0 + rank)}).items()} == {"a": 1.0 + 2.0 + 3.0}
    assert parallel.agree(float(rank + 5), 15 * (rank == 1)) == (5.0, 15)
    assert sum(parallel.gather(parallel.first_to_tell())) == 1
    assert parallel.on_first(lambda: parallel.rank()) == 0
    with pytest.raises(FileNotFoundError, match="none"):
        parallel.on_first(Path("none").read_text)
    parallel.expect_same("a number", 3)
    with pytest.raises(parallel.Apart, match=r"a number must be the same on all ranks, got another one on rank 1"):
        parallel.expect_same("a number", min(rank, 1))
    assert size == 3
    (folder / f"{rank}").touch()


def test_ranks_tell_each_other(tmp_path):
    in_worlds([(3, telling_job, ())], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def refusing_job(*, folder):
    with pytest.raises(ValueError, match="parallel: replicate must divide the 2 processes, got 3"):
        parallel.join("cpu", ParallelSettings(replicate=3))


def test_what_does_not_go_on_several_ranks_is_refused(tmp_path):
    in_worlds([(2, refusing_job, ())], tmp_path)


def test_one_process_is_a_world():
    assert parallel.gather(3) == [3] and list(parallel.share(3)) == [0, 1, 2] and parallel.collect([1, 2], 2) == [1, 2]
    assert parallel.agree(1.0, 0) == (1.0, 0) and parallel.first_to_tell() and parallel.size() == 1
