"""The model on each device: the same logits, one graph, no waiting of the host, a decode step that can be captured."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glm4v import Glm4v
from glm4v.cache import PagedCache
from glm4v.vision import patch_positions
from glm4v_ext.testing import devices


class Waits(TorchDispatchMode):
    """Counts the operations whose result's size or value the host would have to wait for on a GPU."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.OPS or masked or unsized:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_waits_are_seen():
    x = torch.arange(3)
    with Waits() as waits:
        x.sum().item(), x[x > 1], x.nonzero(), bool(x.any()), x.repeat_interleave(x)
    assert len(waits.seen) >= 5


def question(text, *images):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def batch(model, photos):
    return dict(model.processor([question("What?"), question("And here?", photos[0][:112, :168])]))


def on(device, model, batch):
    return model.to(device), {name: x if x is None else x.to(device) for name, x in batch.items()}


@torch.no_grad()
@pytest.mark.parametrize("device", devices())
def test_logits(device, tiny_checkpoint, model, batch):
    exact = Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.float32)(**batch)
    plain = model.to("cpu")(**batch)
    model, batch = on(device, model, batch)
    error, bound = ((logits.cpu().float() - exact).abs().max() for logits in (model(**batch), plain))
    assert error <= 2 * bound


@torch.no_grad()
@pytest.mark.parametrize("device", devices())
def test_index_tensors_may_stay_on_the_host(device, model, batch):
    model, there = on(device, model, batch)
    assert torch.equal(model(**batch, logits_to_keep=2), model(**there, logits_to_keep=2))


def test_the_default_device_is_nobodys(tiny_checkpoint, photos):
    """``torch.set_default_device("cuda")``: what is made on the host stays there."""
    answers = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            model = Glm4v.from_pretrained(tiny_checkpoint)
            asked = [question("What?"), question("And here?", photos[0][:112, :168])]
            assert model.processor(asked, pixels=False).image_grid_thw.tolist() == [[1, 8, 12]]
            answers.append(
                [a.token_ids for a in model.generate(asked, max_new_tokens=5, repetition_penalty=1.2, seed=3)]
            )
    assert answers[0] == answers[1]


def test_forward_waits_for_no_value(model, batch):
    """On the meta device there are no values: asking for one is an error, wherever a GPU would make the host wait."""
    nowhere = Glm4v(model.config, dtype=torch.bfloat16, device="meta")
    assert nowhere(**batch).shape == (len(batch["input_ids"]), model.config.text_config.vocab_size)
    cache = nowhere.new_cache(2, 64)
    logits = nowhere.prefill(batch, cache)
    assert nowhere.decode(logits.argmax(-1), torch.zeros(3, 2, dtype=torch.int64, device="meta"), cache).is_meta


def layers_of(model, batch):
    """Functions and arguments of the tower, the prefill and a decode step, each behind what the host has to know."""
    device, text = model.device, model.language_model
    units = [(h, w) for t, h, w in batch["image_grid_thw"].tolist() for _ in range(t)]
    lengths = torch.tensor([0, *(h * w for h, w in units)])
    tower = (
        batch["pixel_values"], batch["image_grid_thw"], patch_positions(units).to(device),
        lengths.cumsum(0, dtype=torch.int32).to(device), int(lengths.max()),
    )  # fmt: skip
    x, cu_seqlens = text.embed_tokens(batch["input_ids"]), batch["cu_seqlens"].int()
    longest = int(cu_seqlens.diff().max())
    cache = model.new_cache(len(cu_seqlens) - 1, longest + 8)
    text(x, batch["position_ids"], cu_seqlens, longest, cache)
    step = (x[:2], batch["position_ids"][:, -2:] + 1, cache)
    return {
        "tower": (model.visual.encode, tower),
        "prefill": (text, (x, batch["position_ids"], cu_seqlens, longest)),
        "step": (text.decode, step),
    }


@torch.no_grad()
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("part", ["tower", "prefill", "step"])
def test_host_waits_for_nothing(part, device, model, batch):
    function, arguments = layers_of(*on(device, model, batch))[part]
    with Waits() as waits:
        function(*arguments)
    assert waits.seen == []
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("part", ["tower", "prefill", "step"])
def test_one_graph(part, device, model, batch):
    model, batch = on(device, model, batch)
    (function, arguments), (_, again) = layers_of(model, batch)[part], layers_of(model, batch)[part]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*again))


@torch.inference_mode()
@pytest.mark.parametrize("device", devices())
def test_decode_step_can_be_captured(device, model, batch):
    model, batch = on(device, model, batch)
    longest = int(batch["cu_seqlens"].diff().max())
    ids, positions = batch["input_ids"][:2].clone(), batch["position_ids"][:, -2:] + 1
    expected, found = [], []
    for logits in (expected, found):
        cache = model.new_cache(2, longest + 8)
        model.prefill(batch, cache)
        places = [x.data_ptr() for x in (*cache.k, *cache.v, cache.seqlens)]
        if logits is expected or device == "cpu":
            for step in range(4):
                logits.append(model.decode(ids, positions + step, cache))
        else:
            model.decode(ids, positions, cache)  # warms up: what it wrote, the graph writes again
            cache.seqlens -= 1
            where, graph = positions.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model.decode(ids, where, cache)
            for step in range(4):
                where.copy_(positions + step)
                graph.replay()
                logits.append(out.clone())
        assert places == [x.data_ptr() for x in (*cache.k, *cache.v, cache.seqlens)]  # static
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def count(calls, function):
    def counted(self):
        calls.append(self)
        return function(self)

    return counted


@pytest.mark.parametrize("device", devices())
def test_replayed_steps_are_the_steps(device, monkeypatch, tiny_checkpoint, photos):
    """Requests end at different steps, so that the cache is made anew while steps are being replayed."""
    replays = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count(replays, torch.cuda.CUDAGraph.replay))
    model = Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).to(device)
    prompts = [question("What?"), question("And here?", photos[0][:112, :168])]
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": [3, 4], "stop": [5, 6, 7, 8, 9], "logprobs": True}
    found = model.generate(prompts, **options)
    assert bool(replays) == (device == "cuda")
    before = len(replays)
    model.replays = False
    assert found == model.generate(prompts, **options) and len(replays) == before


class OnTheSameMemory:
    """What a recording does, without a GPU: the function again, where the first call's tensors lay."""

    def __init__(self, function):
        self.function, self.inputs = function, None

    def __call__(self, *tensors):
        self.inputs = self.inputs or [x.clone() for x in tensors]
        for kept, x in zip(self.inputs, tensors, strict=True):
            kept.copy_(x)
        return self.function(*self.inputs)


@torch.no_grad()
@pytest.mark.parametrize("device", devices())
def test_replayed_steps_of_pages_are_the_steps(device, monkeypatch, model, batch):
    """The sequences and their pages change from step to step, and so does how many there are."""
    replays = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count(replays, torch.cuda.CUDAGraph.replay))
    if device == "cpu":
        monkeypatch.setattr("glm4v.cache.Replayed", OnTheSameMemory)
    model, batch = on(device, model, batch)
    monkeypatch.setattr(model, "replays", True)
    lengths = batch["cu_seqlens"].diff()
    pages = -(-int(lengths.max()) // 16) + 3
    results = []
    for replays_now in (True, False):
        model.replays = replays_now
        cache = PagedCache(model.config.text_config, 2 * pages, 16, model.dtype, device)
        both = torch.randperm(2 * pages, generator=torch.Generator().manual_seed(0)).int().view(2, pages).to(device)
        cache.hold(both, lengths)
        token = model.prefill(batch, cache).argmax(-1)
        held, logits = lengths.clone(), []
        for step in range(30):
            rows = torch.tensor([[0, 1], [1, 0], [step % 2]][step % 3], device=device)
            cache.hold(both[rows], held[rows])
            out = model.decode(token[rows], held[rows].expand(3, -1), cache)
            assert torch.equal(cache.seqlens, held[rows] + 1)
            held[rows], token[rows] = held[rows] + 1, out.argmax(-1)
            logits.append(out)
        results.append(logits)
        assert len(replays) == (30 - 2 * 8 if device == "cuda" else 0)  # each number of rows begins with 8 plain steps
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_goes_with_its_last_user(paged, model, batch):
    model, lengths = model.to("cpu"), batch["cu_seqlens"].diff()
    longest = int(lengths.max()) + 2
    if paged:
        pages = -(-longest // 16)
        cache = PagedCache(model.config.text_config, 2 * pages, 16, model.dtype)
        cache.hold(torch.arange(2 * pages, dtype=torch.int32).view(2, pages), lengths)
    else:
        cache = model.new_cache(2, longest)
    tokens = model.prefill(batch, cache).argmax(-1)
    gc.disable()
    try:
        model.decode(tokens, batch["position_ids"][:, -2:] + 1, cache)
        alive = weakref.ref(cache)
        del cache
        assert alive() is None  # its keys and values wait for no collector
    finally:
        gc.enable()
