"""Parity with `transformers.Glm4vForConditionalGeneration` on the same files, and what the model refuses."""

import pytest
import torch
from transformers import Glm4vForConditionalGeneration

from glm4v import Glm4v, KVCache
from glm4v.layers import Mlp
from glm4v.weights import parts
from glm4v_ext import swiglu
from tests.glm4v.prompts import Prompt, pack

BUILD = {
    "text": lambda c: Prompt(c, 1).add_text(9),
    "image": lambda c: Prompt(c, 2).add_text(3).add_image(4, 6).add_text(5),
    "images": lambda c: Prompt(c, 3).add_image(2, 8).add_image(6, 4).add_text(4).add_image(2, 2).add_text(1),
    "video": lambda c: Prompt(c, 4).add_text(2).add_video(3, 4, 2).add_text(4),
    "videos": lambda c: Prompt(c, 5).add_video(2, 2, 4).add_text(3).add_video(1, 6, 2).add_text(2),
    "mixed": lambda c: Prompt(c, 6).add_image(4, 4).add_video(2, 4, 2).add_text(3).add_image(2, 6).add_text(2),
}


@pytest.fixture(scope="module")
def hf(tiny_checkpoint):
    return Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return Glm4v.from_pretrained(tiny_checkpoint)


def assert_relative(actual, expected, bound=1e-4):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= bound, f"relative error {error:.2e}, expected at most {bound}"


@torch.no_grad()
@pytest.mark.parametrize("kind", BUILD)
def test_logits(kind, model, hf):
    prompt = BUILD[kind](hf.config)
    assert_relative(model(**pack([prompt], hf)), prompt.logits(hf))


@torch.no_grad()
def test_packed_prompts_do_not_see_each_other(model, hf):
    prompts = [build(hf.config) for build in BUILD.values()]
    logits = model(**pack(prompts, hf)).split([len(p.ids) for p in prompts])
    for prompt, found in zip(prompts, logits, strict=True):
        assert_relative(found, prompt.logits(hf))


def test_every_gradient(model, hf):
    prompts = [build(hf.config) for build in BUILD.values()]
    logits = [prompt.logits(hf) for prompt in prompts]
    cotangent = torch.randn(sum(map(len, logits)), logits[0].shape[1])
    hf.zero_grad()
    torch.cat(logits).backward(cotangent)
    model.zero_grad()
    model(**pack(prompts, hf)).backward(cotangent)
    expected, seen = dict(hf.named_parameters()), set()
    for name, parameter in model.named_parameters():
        names = parts(name)
        for part, grad in zip(names, parameter.grad.chunk(len(names)), strict=True):
            assert_relative(grad, expected[part].grad)
            seen.add(part)
    assert seen == set(expected)


@torch.no_grad()
def test_video_rows_may_be_flat(model, hf):
    rows, flat = (Prompt(hf.config, 7).add_video(3, 4, 2, flat=f).add_text(2) for f in (False, True))
    a, b = pack([rows], hf), pack([flat], hf)
    assert a["video_grid_thw"].tolist() == [[3, 4, 2]] and b["video_grid_thw"].tolist() == [[1, 4, 2]] * 3
    assert torch.equal(model(**a), model(**b))
    images = {"patches": a["pixel_values_videos"], "grid_thw": a["video_grid_thw"]}
    assert torch.equal(model.visual(**images), model.visual(images["patches"], b["video_grid_thw"]))


@torch.no_grad()
def test_autocast_is_as_accurate_as_transformers(model, hf):
    prompt = BUILD["mixed"](hf.config)
    exact = prompt.logits(hf)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**pack([prompt], hf)), prompt.logits(hf)
        batch, cache = pack([prompt], hf), model.new_cache(1, len(prompt.ids) + 1)
        first = model.prefill(batch, cache)
        next_position = batch["position_ids"].max() + 1
        second = model.decode(first.argmax(-1), next_position.expand(3, 1), cache)
    assert ours.dtype == theirs.dtype == first.dtype == second.dtype == torch.bfloat16
    errors = [(logits.float() - exact).abs().max() for logits in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] and second.isfinite().all()
    assert torch.equal(first[0], ours[-1])


@torch.no_grad()
def test_logits_to_keep(model, hf):
    prompts = [BUILD[kind](hf.config) for kind in ("text", "image")]
    batch = pack(prompts, hf)
    full, (a, b) = model(**batch), (len(p.ids) for p in prompts)
    index = torch.tensor([a - 2, a - 1, a + b - 2, a + b - 1])
    torch.testing.assert_close(model(**batch, logits_to_keep=2), full[index])
    torch.testing.assert_close(model(**batch, logits_to_keep=index), full[index])
    torch.testing.assert_close(model(**batch, logits_to_keep=a), torch.cat([full[:a], full[b:]]))
    assert model(**batch, logits_to_keep=0).shape == (0, full.shape[1])
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"logits_to_keep must be 0 or more, an index tensor or None, got {wrong}"):
            model(**batch, logits_to_keep=wrong)


@pytest.mark.parametrize("index", [-1, 10_000, 2**40])
def test_an_id_outside_the_vocabulary(index, model, hf):
    batch = pack([BUILD["text"](hf.config)], hf)
    batch["input_ids"][3] = index
    vocab = hf.config.text_config.vocab_size
    with pytest.raises(ValueError, match=rf"^glm4v: input_ids must be 0 to {vocab - 1}, got {index}$"):
        model(**batch)


def greedy(model, hf, prompts, steps):
    """Prefill once, then one packed step per token: ids ``[N, steps]``."""
    batch = pack(prompts, hf)
    cache = KVCache(model.config.text_config, len(prompts), max(len(p.ids) for p in prompts) + steps)
    logits = model.prefill(batch, cache)
    ends = batch["position_ids"].split([len(p.ids) for p in prompts], 1)
    positions = torch.stack([p.max() + 1 for p in ends])
    tokens, banned = [], torch.tensor(model.config.vision_token_ids)
    for step in range(steps):
        tokens.append(logits.index_fill(1, banned, -torch.inf).argmax(-1))
        if step + 1 < steps:
            logits = model.decode(tokens[-1], (positions + step).expand(3, -1), cache)
    return torch.stack(tokens, 1)


def test_greedy_tokens(model, hf):
    prompts = [BUILD[kind](hf.config) for kind in ("text", "image", "images", "video", "videos")]
    prompts += [Prompt(hf.config, seed).add_text(1 + seed % 7).add_image(2, 4).add_text(2) for seed in range(10, 26)]
    found = greedy(model, hf, prompts, 8)
    banned = [[token] for token in model.config.vision_token_ids]
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = hf.generate(
            **prompt.inputs(),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            bad_words_ids=banned,
            eos_token_id=-1,
        )
        assert tokens.tolist() == expected[0, len(prompt.ids) :].tolist()


@torch.no_grad()
def test_cache_rows_can_be_shared_and_dropped(model, hf):
    prompts = [BUILD[kind](hf.config) for kind in ("text", "image")]
    batch = pack(prompts, hf)
    cache = KVCache(model.config.text_config, 2, 40)
    model.prefill(batch, cache)
    cache.select(torch.tensor([1, 0, 1]))
    assert cache.batch_size == 3 and cache.seqlens.tolist() == [len(prompts[i].ids) for i in (1, 0, 1)]
    position = [int(prompts[i].positions(hf).max()) + 1 for i in (1, 0, 1)]
    logits = model.decode(torch.tensor([5, 6, 7]), torch.tensor(position).expand(3, -1), cache)
    for row, (i, token) in enumerate([(1, 5), (0, 6), (1, 7)]):
        longer = BUILD["text" if i == 0 else "image"](hf.config)
        longer._add([token])
        assert_relative(logits[row], longer.logits(hf)[-1])


def test_cache_refuses_what_does_not_fit(model, hf):
    batch, config = pack([BUILD["text"](hf.config)], hf), model.config.text_config
    with pytest.raises(ValueError, match="cache: capacity must be at least 9, got 8"):
        model.prefill(batch, KVCache(config, 1, 8))
    with pytest.raises(ValueError, match="must be empty and of 1 rows, got 0 tokens in 2 rows"):
        model.prefill(batch, KVCache(config, 2, 16))
    cache = KVCache(config, 1, 9)
    model.prefill(batch, cache)
    with pytest.raises(ValueError, match="cache: capacity must be at least 10, got 9"):
        model.decode(torch.tensor([1]), torch.full((3, 1), 9), cache)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "pixel_values must have 16 rows for image_grid_thw, got"),
        (
            {"image_grid_thw": torch.tensor([1.0, 4, 4])},
            r"must be whole numbers .I, 3., got torch.float32",
        ),
        ({"pixel_values": None}, "pixel_values and image_grid_thw must come together"),
        ({"pixel_values": None, "image_grid_thw": None}, r"must have 0 <\|image\|> tokens outside videos .*, got 6"),
        ({"image_grid_thw": torch.tensor([[1, 3, 8]])}, r"row 0 must be \(t, h, w\), .* got \[1, 3, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 12])}, "cu_seqlens must end at 16, the input_ids, got 12"),
        ({"cu_seqlens": torch.tensor([0, 19, 16])}, r"cu_seqlens must ascend from 0, got \[0, 19, 16\]"),
        ({"cu_seqlens": torch.tensor([[0, 16]])}, r"cu_seqlens must be whole numbers \[N . 1\], got .* \[1, 2\]"),
        ({"input_ids": torch.ones(1, 16).int()}, r"input_ids must be whole numbers \[T\], got torch.int32 \[1, 16\]"),
        ({"input_ids": torch.ones(16)}, r"input_ids must be whole numbers \[T\], got torch.float32 \[16\]"),
        (
            {"pixel_values": torch.zeros(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])},
            r"must have 4 <\|image\|> tokens outside videos for image_grid_thw, got 6",
        ),
        (
            {"pixel_values_videos": torch.zeros(16, 1176), "video_grid_thw": torch.tensor([[1, 4, 4]])},
            r"must have 4 <\|image\|> tokens inside videos for video_grid_thw, got 0",
        ),
    ],
)
def test_counts_that_disagree(change, text, model, hf):
    batch = {**pack([BUILD["image"](hf.config)], hf), **change}
    with pytest.raises(ValueError, match=text):
        model(**batch)


@torch.no_grad()
def test_bfloat16_stays_near(tiny_checkpoint, model, hf):
    half = Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = pack([BUILD["mixed"](hf.config)], hf)
    assert_relative(half(**batch).float(), model(**batch), 0.1)


def test_random_weights_follow_the_config(model):
    fresh = Glm4v(model.config)
    assert fresh.visual.blocks[0].norm1.weight.eq(1).all() and fresh.visual.downsample.bias.eq(0).all()
    assert 0.015 < fresh.language_model.layers[0].mlp.gate_up_proj.weight.std() < 0.025


def test_mlp_takes_many_rows_in_groups():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 16), torch.randn(2 * Mlp.group + 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), mlp.down_proj(swiglu(mlp.gate_up_proj(x))))


def test_sequences_behind_a_prefix(model, hf):
    prompt = BUILD["mixed"](hf.config)
    before = pack([prompt], hf)
    start, last = len(prompt.ids), int(before["position_ids"].max()) + 1
    tails = [torch.arange(5, 5 + n) for n in (3, 1, 0, 4)]
    spans = [torch.arange(last, last + len(tail)).expand(3, -1) for tail in tails]
    pictures = {name: x for name, x in before.items() if "pixel" in name or "grid" in name}
    shared = model.hidden(
        input_ids=torch.cat([before["input_ids"], *tails]),
        cu_seqlens=torch.tensor([0, start, *(start + n for n in (3, 4, 4, 8))], dtype=torch.int32),
        position_ids=torch.cat([before["position_ids"], *spans], 1),
        prefixes=[-1, 0, 0, 0, 0],
        **pictures,
    )
    assert_relative(shared[:start], model.hidden(**before))
    for tail, span, found in zip(tails, spans, shared[start:].split([3, 1, 0, 4]), strict=True):
        whole = model.hidden(
            input_ids=torch.cat([before["input_ids"], tail]),
            cu_seqlens=torch.tensor([0, start + len(tail)], dtype=torch.int32),
            position_ids=torch.cat([before["position_ids"], span], 1),
            **pictures,
        )
        assert torch.allclose(found, whole[start:], atol=1e-5)


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        ([-1], r"prefixes must be one for each of 2 sequences, got 1"),
        ([-1, 2], r"prefixes\[1\] must be a sequence without a prefix, or -1, got 2"),
        ([-1, -2], r"prefixes\[1\] must be a sequence without a prefix, or -1, got -2"),
        ([1, 0], r"prefixes\[0\] must be a sequence without a prefix, or -1, got 1"),
        ([-1, 1], r"prefixes\[1\] must be a sequence without a prefix, or -1, got 1"),
    ],
)
def test_prefixes_that_are_none(model, prefixes, said):
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=said):
        model.hidden(torch.arange(4), ends, torch.zeros(3, 4, dtype=torch.long), prefixes=prefixes)
    with pytest.raises(ValueError, match="prefixes must be None with a cache, got both"):
        model.hidden(
            torch.arange(4), ends, torch.zeros(3, 4, dtype=torch.long), model.new_cache(2, 4), prefixes=[-1, 0]
        )
