"""transformers' GLM models with the ops in them: the numbers they had, and everything restored behind them."""

import copy
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import (
    FAMILIES,
    GREEDY,
    TEXT,
    assert_like_stock,
    attentions,
    batch,
    enabled,
    exact_results,
    kinds,
    make,
    maps_classes,
    replaced,
    results,
)
from transformers import ContinuousBatchingConfig
from transformers.monkey_patching import clear_patch_mapping, get_patch_mapping

from glm4v_ext.integrations import transformers as dropin
from glm4v_ext.integrations.replacements import Replacement
from glm4v_ext.integrations.transformers import OPS, disable, enable

pytestmark = [pytest.mark.usefixtures("nothing_left_alone"), pytest.mark.long]

PADDED = {"rows": 3, "padding": "left"}
loads = pytest.mark.skipif(not maps_classes(), reason="this version of transformers cannot map its classes here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_all_gradients(family, dtype):
    # All experts at work: which ones a router chooses is no continuous function.
    experts = {"num_experts_per_tok": 4} if family == "glm4v_moe" else {}
    model, inputs = make(family, dtype, **experts), batch(**PADDED)
    exact = exact_results(model, inputs)
    stock = results(model, inputs)
    with enabled(model):
        ours = results(model, inputs)
    assert_like_stock(ours, stock, exact, dtype)
    again = results(model, inputs)
    assert all(torch.equal(again[name], stock[name]) for name in stock)  # and restored


@pytest.mark.parametrize(
    "case", [{}, {"rows": 3, "padding": "right"}, {"rows": 2, "video": (2, 4, 4)}, {"grids": (), "words": 9}], ids=str
)
def test_batches(case):
    model, inputs = make("glm4v"), batch(**case)
    exact, stock = exact_results(model, inputs), results(model, inputs)
    with enabled(model):
        assert_like_stock(results(model, inputs), stock, exact, torch.float32)


@pytest.mark.parametrize("family", ["glm4v", "glm_ocr"])
def test_packed_sequences(family):
    """Two sequences in one row, told apart by text positions that start anew."""
    model = make(family)
    text = torch.cat([torch.arange(7), torch.arange(12)]).expand(4, 1, -1)
    ids = torch.randint(1, 90, (1, 19))
    run = {"input_ids": ids, "position_ids": text, "use_cache": False}
    with torch.no_grad():
        stock = model(**run).logits
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits
        with enabled(model):
            ours = model(**run).logits
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[:, 7:], alone, rtol=1e-4, atol=1e-4)


# Padding between a row's tokens, as prompt tuning and multi-turn masks have it, and padding behind them.
HOLES = {
    "between": [[1, 1, 1, 0, 0, 1, 1, 1], [1] * 8],
    "everywhere": [[0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 1]],
    "behind": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8],
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mask", HOLES.values(), ids=HOLES)
def test_padding_anywhere(mask, grad):
    """The queries of padding, too, where somebody may read them: of those behind the tokens `generate` does."""
    model, mask = make("glm4v"), torch.tensor(mask)
    ids = torch.randint(1, 90, mask.shape)
    read = mask.bool() if grad else torch.ones_like(mask).bool()
    with torch.set_grad_enabled(grad):
        stock = model(input_ids=ids, attention_mask=mask).logits
        with enabled(model):
            torch.testing.assert_close(
                model(input_ids=ids, attention_mask=mask).logits[read], stock[read], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_with_right_padding(use_cache):
    model, inputs = make("glm4v"), batch(rows=3, padding="right")
    stock = model.generate(**inputs, **GREEDY, use_cache=use_cache)
    with enabled(model):
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=use_cache), stock)


@pytest.mark.parametrize("op", OPS)
def test_switches(op):
    model, inputs = make("glm4v"), batch(rows=2, padding="left")
    before, attention_before = kinds(model), attentions(model)
    exact, stock = exact_results(model, inputs), results(model, inputs)
    with enabled(model, **{name: name == op for name in OPS}):
        names = {name for hook_op, name, _ in dropin.HOOKS if hook_op == op}
        assert len(replaced(model)) == len(names)
        assert isinstance(model.lm_head, Replacement) == (op == "linear")
        assert all(any(cls.endswith(name) for name in names) for cls in replaced(model))
        assert (attentions(model) != attention_before) == (op == "flash_attn")
        assert_like_stock(results(model, inputs), stock, exact, torch.float32)
    assert kinds(model) == before
    assert all(a is b and x == y for (a, x), (b, y) in zip(attentions(model), attention_before, strict=True))


@pytest.mark.parametrize("video", [None, (2, 4, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_left_padding(family, video):
    model, inputs = make(family), batch(rows=3, padding="left", video=video)
    stock = model.generate(**inputs, **GREEDY)
    with enabled(model):
        assert torch.equal(model.generate(**inputs, **GREEDY), stock)
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), stock)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate_otherwise(options):
    model, inputs = make("glm4v"), batch(rows=2, padding="left")
    options = {**GREEDY, **options, "disable_compile": True}
    stock = model.generate(**inputs, **options)
    with enabled(model):
        assert torch.equal(model.generate(**inputs, **options), stock)


@pytest.mark.parametrize("family", ["glm4v", "glm4v_moe"])
def test_generate_in_continuous_batches(family):
    config = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=32)
    model, prompts = make(family), [list(range(1, 12)), [5, 6, 7], list(range(20, 60))]

    def answers():
        greedy = {"max_new_tokens": 6, "do_sample": False, "warmup": False, "continuous_batching_config": config}
        return [one.generated_tokens for one in model.generate_batch(prompts, **greedy).values()]

    stock = answers()
    assert [len(one) for one in stock] == [6, 6, 6]
    with enabled(model):
        assert answers() == stock


@loads
@pytest.mark.parametrize("family", FAMILIES)
def test_enabled_before_loading(family, tmp_path):
    model, inputs = make(family), batch()
    model.save_pretrained(tmp_path)
    before = kinds(model)
    enable()
    loaded = type(model).from_pretrained(tmp_path)
    assert replaced(loaded) >= {"Linear", "Conv2d"} and len(replaced(loaded)) >= 9
    assert type(loaded.model.visual) is type(model.model.visual)
    disable()
    assert (
        get_patch_mapping() == {} and kinds(loaded) == before and kinds(type(model).from_pretrained(tmp_path)) == before
    )
    with torch.no_grad():
        stock = loaded(**inputs).logits
        enable(model)
        torch.testing.assert_close(model(**inputs).logits, stock, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)  # an enabled model's checkpoint is anyone's
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, stock)


@loads
def test_the_last_call_decides(tmp_path):
    model = make("glm4v")
    before = kinds(model)
    enable(model)
    enable(model, **{op: op == "rope" for op in OPS})
    assert len(replaced(model)) == 4
    enable()
    enable(rms_norm=False)  # for models to come
    assert len(replaced(model)) == 4
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "Linear" in replaced(loaded) and "Glm4vRMSNorm" not in replaced(loaded)
    enable(loaded)
    assert "Glm4vRMSNorm" in replaced(loaded)
    disable(loaded)
    assert kinds(loaded) == before != kinds(model)
    disable()
    assert kinds(model) == before


@loads
def test_a_load_that_fails_leaves_nothing_behind(tmp_path):
    """transformers then puts none of the classes back that it had taken for those of the mapping."""
    make("glm4v").save_pretrained(tmp_path)
    for clear in (disable, enable, clear_patch_mapping):
        enable()
        with pytest.raises((ImportError, ValueError)):
            FAMILIES["glm4v"][1].from_pretrained(tmp_path, attn_implementation="none such")
        clear()
        disable()
        assert not replaced(make("glm4v"))
        with enabled(make("glm4v")) as model:
            assert replaced(model)


@loads
def test_threads_that_enable_at_once():
    switch, before = sys.getswitchinterval(), get_patch_mapping()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(change) for _ in range(10) for change in (enable, enable, disable)]:
                done.result()
    finally:
        sys.setswitchinterval(switch)
    disable()
    assert get_patch_mapping() == before == {}


@loads
def test_the_head_is_that_of_a_loaded_model(tmp_path):
    """No patch mapping reaches it: it is in neither tower. Tied to the embedding, it stays so."""
    model = make("glm46v")
    model.save_pretrained(tmp_path)
    enable()
    loaded = type(model).from_pretrained(tmp_path)
    assert not isinstance(loaded.lm_head, Replacement) and isinstance(loaded.model.visual.merger.proj, Replacement)
    loaded.lm_head.weight = loaded.get_input_embeddings().weight
    enable(loaded)
    assert isinstance(loaded.lm_head, Replacement) and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    enable(loaded.model)  # the towers alone: the head is left as it was
    assert isinstance(loaded.lm_head, Replacement)
    disable(loaded)
    assert kinds(loaded) == kinds(model)


@loads
def test_attention_asked_for(tmp_path):
    model = make("glm_ocr")
    model.save_pretrained(tmp_path)
    enable()
    with pytest.warns(UserWarning, match="attn_implementation is 'eager', as asked for"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert {name for _, name in attentions(loaded)} == {"eager"}
    enable(loaded)
    assert "glm4v_ext" in {name for _, name in attentions(loaded)}
    disable(loaded)
    assert {name for _, name in attentions(loaded)} == {"eager"}


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("restore", [disable, lambda twin: disable()], ids=["itself", "all"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_copies_and_pickles(before, copied, restore):
    model, inputs = make("glm4v", attention=before), batch()
    enable(model)
    twin = copied(model)
    with torch.no_grad():
        assert kinds(twin) == kinds(model)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        restore(twin)
        assert not replaced(twin) and {name for _, name in attentions(twin)} == {before}
        twin(**inputs)
    enable(model)
    type(model)(model.config)  # a model made from an enabled one's configuration


def test_a_pickle_in_a_process_that_enables_nothing(tmp_path):
    model, inputs = make("glm4v"), batch()
    enable(model)
    torch.save((model, inputs), file := tmp_path / "model.pt")
    loaded = f"import torch; model, inputs = torch.load({str(file)!r}, weights_only=False)"
    script = f"{loaded}; print(model(**inputs)[0].shape)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{model(**inputs)[0].shape}\n", done.stderr


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = make("glm4v").train(), batch(rows=2, padding="right")
    exact, stock = exact_results(model, inputs), results(model, inputs)
    enable(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_like_stock(results(model, inputs), stock, exact, torch.float32)


def test_autocast():
    model, inputs = make("glm4v"), batch(rows=2, padding="left")
    exact = results(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = results(model, inputs)
        enable(model)
        ours = results(model, inputs)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in stock.items()}
    assert_like_stock(ours, stock, exact, torch.bfloat16)


def test_trainer_loss_curve(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [batch(seed=seed, words=4) for seed in range(12)]

    def collate(some):
        joined = {k: torch.cat([row[k] for row in some]) for k in some[0]}
        return {**joined, "labels": joined["input_ids"]}

    def curve(prepare):
        model = make("glm4v")
        prepare(model)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=6, learning_rate=3e-3, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, seed=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    stock, ours = curve(lambda model: None), curve(enable)
    assert len(stock) == 6 and stock[-1] < stock[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=1e-3, atol=1e-3)


def test_compile():
    """One graph of the language model, padding included, and of the tower with its index made beforehand."""
    model = make("glm4v")
    enable(model)
    text, tower = model.model.language_model, model.model.visual
    x, mask = torch.randn(2, 6, 64), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    run = {"inputs_embeds": x, "attention_mask": mask, "use_cache": False}
    compiled = torch.compile(text, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**run).last_hidden_state, text(**run).last_hidden_state)
    mask[0, 3] = 0
    with pytest.raises(RuntimeError, match=r"attention_mask must have no padding between tokens under torch.compile"):
        compiled(**run)
    grid, patches = torch.tensor([[1, 4, 4]]), torch.randn(16, 1176)
    index = {
        "position_ids": torch.randint(4, (16, 2)),
        "cu_seqlens": torch.tensor([0, 16], dtype=torch.int32),
        "max_seqlen": 16,
    }
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    out, plain = (f(patches, grid_thw=grid, **index).pooler_output for f in (compiled, tower))
    torch.testing.assert_close(out, plain)


def test_outputs_still_recorded():
    model, inputs = make("glm4v"), batch()
    enable(model)
    with torch.no_grad():
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == TEXT["num_hidden_layers"] + 1
