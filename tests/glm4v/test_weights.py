"""Checkpoint files: names, mapping, shards, and one clear line for each thing that can be wrong with them."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Glm4vForConditionalGeneration

from examples.make_checkpoint import make_checkpoint
from glm4v import Config, Glm4v, InputError, weights


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("shard", [300_000, 10**9])
def test_written_files_are_what_transformers_writes(tiny_checkpoint, tmp_path, shard):
    Glm4v.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path, max_shard_bytes=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert_same(tensors(tmp_path), tensors(tiny_checkpoint))
    if shard < 10**9:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {f.name for f in files} and len(files) > 1
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path).values())
        assert all(f.stat().st_size < shard + 10_000 for f in files)
    else:
        assert [f.name for f in files] == ["model.safetensors"]
    theirs, report = Glm4vForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and theirs.dtype == torch.float32


def test_shards_of_transformers(tmp_path):
    folder = make_checkpoint(tmp_path / "a", dtype=torch.bfloat16, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = Glm4v.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not model.training
    model.save_pretrained(tmp_path / "b")
    assert_same(tensors(tmp_path / "b"), tensors(folder))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def mapped(tensor, file):
    """Whether the memory of ``tensor`` is a mapping of ``file``."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            if low <= tensor.data_ptr() < high:
                return line.rstrip().endswith(str(file))
    return False


def test_tensors_stay_in_the_mapped_file(tiny_checkpoint, tmp_path):
    model = Glm4v.from_pretrained(tiny_checkpoint)
    file = tiny_checkpoint / "model.safetensors"
    copied = [name for name, p in model.named_parameters() if not mapped(p, file)]
    assert copied == ["model.visual.merger.gate_up_proj.weight"]  # its halves stand apart in transformers' order
    model.save_pretrained(tmp_path)
    again = Glm4v.from_pretrained(tmp_path)
    assert all(mapped(p, tmp_path / "model.safetensors") for p in again.parameters())
    half = Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.float16)
    assert not any(mapped(p, file) for p in half.parameters())


def test_training_leaves_the_file_alone(tiny_checkpoint):
    before = (tiny_checkpoint / "model.safetensors").read_bytes()
    model = Glm4v.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tiny_checkpoint / "model.safetensors").read_bytes() == before


def test_saving_over_the_mapped_files(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    model = Glm4v.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    for shard in (300_000, 10**9, 500_000):  # each save removes what the last one left
        model.save_pretrained(folder, max_shard_bytes=shard)
        model = Glm4v.from_pretrained(folder)
        assert_same(dict(model.named_parameters()), expected)
        assert not list(folder.glob("*.tmp"))


def test_a_failed_save_leaves_the_old_files(tiny_checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    model = Glm4v.from_pretrained(folder)
    calls = []

    def full_disk(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder, max_shard_bytes=300_000)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def value_in(folder):
    """The number that every weight of the checkpoint is, of a mix both; None where loading says in one line that there
    is no whole checkpoint."""
    try:
        model = Glm4v.from_pretrained(folder)
    except InputError as error:
        assert str(error).startswith(f"weights: {folder}") and "\n" not in str(error)
        return None
    (value,) = {x for p in model.parameters() for x in (p.min().item(), p.max().item())}
    return value


SAVES = pytest.mark.parametrize(
    ("before", "after"),
    [(300_000, 300_000), (300_000, 500_000), (10**9, 300_000), (300_000, 10**9), (10**9, 10**9)],
)


@pytest.fixture
def ones_and_twos(tiny_checkpoint):
    models = [Glm4v.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        for value, model in enumerate(models, 1):
            for parameter in model.parameters():
                parameter.fill_(value)
    return models


def assert_saved_over(folder, model, shard):
    """A save over whatever an earlier one has left ends with its own files alone."""
    model.save_pretrained(folder, max_shard_bytes=shard)
    assert value_in(folder) == 2
    names = {file.name for file in folder.iterdir() if file.name.startswith("model") and file.suffix != ".tmp"}
    index = folder / "model.safetensors.index.json"
    told = {*json.loads(index.read_text())["weight_map"].values(), index.name} if index.exists() else set()
    assert names == (told or {"model.safetensors"})


@SAVES
def test_a_save_that_is_killed_leaves_no_mix_of_two_models(before, after, ones_and_twos, tmp_path, monkeypatch):
    ones, twos = ones_and_twos
    ones.save_pretrained(tmp_path / "model", max_shard_bytes=before)
    cuts = []

    def cut_before(step):
        def cut(*arguments, **options):
            cuts.append(shutil.copytree(tmp_path / "model", tmp_path / f"cut-{len(cuts)}"))
            return step(*arguments, **options)

        return cut

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(os, name, cut_before(getattr(os, name)))
        twos.save_pretrained(tmp_path / "model", max_shard_bytes=after)
    found = [value_in(folder) for folder in cuts]
    assert found[0] == 1 and found[-1] == 2 and len(found) > 2
    # Shards that take the names of old ones: between the first and the last of them there is no whole model.
    expected = {1, None, 2} if before == after < 10**9 else {1, 2}
    assert set(found) == expected and found == sorted(found, key=[1, None, 2].index)
    for folder in [*cuts, tmp_path / "model"]:
        assert_saved_over(folder, twos, after)


@SAVES
def test_a_save_that_fails_at_a_rename_leaves_no_mix_of_two_models(before, after, ones_and_twos, tmp_path, monkeypatch):
    ones, twos = ones_and_twos
    replace, found, same_names = os.replace, [], before == after < 10**9
    for failing in range(1, 99):
        folder, calls = tmp_path / str(failing), []
        ones.save_pretrained(folder, max_shard_bytes=before)

        def failing_replace(source, target, failing=failing, calls=calls):
            calls.append(source)
            if len(calls) == failing:
                raise OSError("input/output error")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing_replace)
        try:
            twos.save_pretrained(folder, max_shard_bytes=after)
        except OSError:
            found.append(value_in(folder))
            assert not [file for file in folder.iterdir() if file.suffix in (".tmp", ".old")]
        monkeypatch.setattr(os, "replace", replace)
        assert_saved_over(folder, twos, after)
        if len(calls) < failing:
            break
    # The index goes aside before the first shard is renamed, and comes back where that fails.
    assert found[: 1 + same_names] == [1] * (1 + same_names)
    assert set(found) == ({1, None, 2} if same_names else {1, 2}) and len(calls) == failing - 1


def test_progress_counts_every_byte(tiny_checkpoint):
    seen = []
    Glm4v.from_pretrained(tiny_checkpoint, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in tensors(tiny_checkpoint).values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_tied_head(tiny_checkpoint, tmp_path):
    data = Config.from_pretrained(tiny_checkpoint).to_dict()
    model = Glm4v(Config.from_dict({**data, "tie_word_embeddings": True}))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors(tmp_path)
    again = Glm4v.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.language_model.embed_tokens.weight
    theirs = Glm4vForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, again.lm_head.weight)


NAME = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NAME), rf": tensor {NAME} is missing$"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], r"layers.1\S+ is missing \(and 12 more\)$"),
        (lambda t: t.update(extra=torch.zeros(1)), "model.safetensors: tensor extra has no place in the model$"),
        (
            lambda t: t.update({NAME: torch.zeros(3, 4)}),
            rf"safetensors: tensor {NAME} must be \[128, 192\], got \[3, 4\]$",
        ),
        (lambda t: t.update({NAME: t[NAME].int()}), rf"safetensors: {NAME} must be F64, F32, BF16, F16, got I32$"),
    ],
)
def test_wrong_tensors_are_named(tiny_checkpoint, tmp_path, change, text):
    content = tensors(tiny_checkpoint)
    change(content)
    save_file(content, tmp_path / "model.safetensors")
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    with pytest.raises(InputError, match=text) as caught:
        Glm4v.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"weights: {tmp_path}") and "\n" not in str(caught.value)


def test_wrong_files_are_named(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        Glm4v.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(InputError, match=r"model-00001-of-00002.safetensors: the file is missing"):
        Glm4v.from_pretrained(tmp_path)
    for content, text in (("[]", "must be a JSON object"), ("{", "is not JSON"), ("{}", "not an index of shards")):
        index.write_text(content)
        with pytest.raises(InputError, match=rf"index.json: {text}"):
            Glm4v.from_pretrained(tmp_path)
    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model.safetensors: not a whole safetensors file"):
            Glm4v.from_pretrained(tmp_path)


def test_a_tied_head_that_is_stored_too(tiny_checkpoint, tmp_path, monkeypatch):
    """As other writers do: taken where it is the embedding's equal, whatever NaN it holds."""
    monkeypatch.setattr(weights, "ROWS_BYTES", 10_000)
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    content = tensors(tiny_checkpoint)
    embedding = content["model.language_model.embed_tokens.weight"]
    embedding[-1] = float("nan")
    save_file(content | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    model = Glm4v.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight.data, embedding, rtol=0, atol=0, equal_nan=True)
    rows = weights.Rows(Glm4v.without_weights(tmp_path), tmp_path)
    assert torch.equal(rows("model.language_model.embed_tokens.weight", 2, 4), embedding[2:4])
    other = embedding.clone()
    other[-2, 5] += 1
    for head in (other, embedding[:-1].clone(), embedding.half()):
        save_file(content | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        with pytest.raises(
            InputError, match=r"safetensors: tensor lm_head.weight must equal model.language_model.em"
        ) as e:
            Glm4v.from_pretrained(tmp_path)
        assert str(e.value).endswith("embed_tokens.weight, which it is tied to")


def test_weights_that_no_op_takes_are_converted_or_refused(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    content = tensors(tiny_checkpoint)
    save_file({name: x.double() for name, x in content.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"dtype must be given, one of torch.float32, .* weights of torch.float64$"):
        Glm4v.from_pretrained(tmp_path)
    ours = dict(Glm4v.from_pretrained(tmp_path, dtype=torch.float32).named_parameters())
    assert_same(ours, dict(Glm4v.from_pretrained(tiny_checkpoint).named_parameters()))


def test_a_few_tensors_of_another_type_do_not_decide(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    kept = ("embeddings.", "norm")
    content = tensors(tiny_checkpoint)
    content = {name: x if any(part in name for part in kept) else x.bfloat16() for name, x in content.items()}
    save_file(content, tmp_path / "model.safetensors")
    model = Glm4v.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert weights.Rows(Glm4v.without_weights(tmp_path), tmp_path).dtype == torch.bfloat16


def test_a_tensor_in_two_shards(tiny_checkpoint, tmp_path):
    model = Glm4v.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    name = next(iter(load_file(second)))
    save_file({**load_file(first), name: torch.zeros(3)}, first)
    with pytest.raises(InputError, match=rf"{second.name}: tensor {name} is also in {first.name}$"):
        Glm4v.from_pretrained(tmp_path)


def test_wrong_arguments(tiny_checkpoint, tmp_path):
    for dtype in ("bfloat16", torch.int32, torch.complex64, torch.float64):
        with pytest.raises(InputError, match=rf"^weights: dtype must be torch.float32, .* or None, got {dtype!r}$"):
            Glm4v.from_pretrained(tiny_checkpoint, dtype=dtype)
    for folder in (None, 5, b"x"):
        with pytest.raises(InputError, match=rf"^checkpoint: the folder must be a path, got {type(folder).__name__}$"):
            Glm4v.from_pretrained(folder)
    for device in ("gpu", 1.5):
        with pytest.raises(InputError, match=rf"^device must be one that torch has here, got {device!r}: "):
            Glm4v.from_pretrained(tiny_checkpoint, device=device)
    model = Glm4v.from_pretrained(tiny_checkpoint)
    for size in (0, -1, 1.5, "5GB"):
        with pytest.raises(InputError, match=rf"max_shard_bytes must be a whole number above 0, got {size!r}$"):
            model.save_pretrained(tmp_path / "new", max_shard_bytes=size)
    model.generation_config = {"eos_token_id": torch.tensor(3)}  # nothing that a file can hold
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_headers_of_odd_length(tiny_checkpoint, tmp_path):
    """Other writers don't pad the header: tensors then start anywhere."""
    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)  # odd
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert NAME in file.keys()  # noqa: SIM118
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    ours = dict(Glm4v.from_pretrained(tmp_path).named_parameters())
    assert_same(ours, dict(Glm4v.from_pretrained(tiny_checkpoint).named_parameters()))


def test_a_file_that_becomes_shorter_while_it_is_read(tiny_checkpoint, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(tiny_checkpoint, folder)
    rows = weights.Rows(Glm4v.without_weights(folder), folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"weights: .*safetensors: must stay as it is while it is read, got a shorter"):
        rows("lm_head.weight", 0, 8)
