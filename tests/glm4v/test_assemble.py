"""`assemble` against its two sources: text logits of Glm4ForCausalLM, features of Aimv2VisionModel."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4vForConditionalGeneration,
)

from examples.make_checkpoint import make_tokenizer
from glm4v import Glm4v, InputError
from glm4v.assemble import assemble
from glm4v.cli import main
from glm4v_ext import patchify

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIDE = 56  # pixels: a 4 x 4 table


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.3) + (p.ndim == 1)
    return model.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Small sources in their own layouts: (encoder, decoder, encoder folder, decoder folder)."""
    root = tmp_path_factory.mktemp("parts")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = randomise(Aimv2VisionModel(Aimv2VisionConfig(**sizes, image_size=SIDE, patch_size=14, use_head=True)))
    tokenizer = make_tokenizer(300)
    vocab = tokenizer.get_vocab_size() + 7
    config = Glm4Config(
        **{**sizes, "hidden_size": 96, "intermediate_size": 112}, num_key_value_heads=1, head_dim=48, vocab_size=vocab,
        pad_token_id=0, eos_token_id=[1], rms_norm_eps=1e-5,
    )  # fmt: skip
    decoder = randomise(Glm4ForCausalLM(config))
    encoder.save_pretrained(root / "encoder")
    decoder.save_pretrained(root / "decoder")
    tokenizer.save(str(root / "decoder" / "tokenizer.json"))
    (root / "decoder" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ text }}", "eos_token": "a"})
    )
    return encoder, decoder, root / "encoder", root / "decoder"


@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "out"
    assemble(parts[2], parts[3], folder, seed=3)
    return folder


def test_text_logits_are_the_decoders(parts, base):
    _, decoder, *_ = parts
    ids = torch.randint(0, decoder.config.vocab_size - 40, (37,))
    model = Glm4v.from_pretrained(base)
    ours = model(ids, torch.tensor([0, 37]), torch.arange(37).expand(3, -1))
    torch.testing.assert_close(ours, decoder(ids[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_features_are_the_encoders_with_rotary_off(parts, base, monkeypatch):
    encoder, *_ = parts
    tower = Glm4v.from_pretrained(base).visual
    monkeypatch.setattr("glm4v.vision.patch_positions", lambda units: torch.zeros(16, 2, dtype=torch.int64))
    seen = []
    tower.merger.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    monkeypatch.setattr("glm4v.vision.merge_patches", lambda x, weight, bias: x)  # features before the downsample
    monkeypatch.setattr(tower.merger, "forward", lambda x: x)

    frame = torch.randint(0, 256, (1, SIDE, SIDE, 3), dtype=torch.uint8)
    patches, grid = patchify(frame, MEAN, STD)
    with torch.no_grad():
        ours = tower(patches, grid)
        pixels = ((frame[0].float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
        theirs = encoder(pixels).last_hidden_state[0]
    blocks = theirs.view(2, 2, 2, 2, -1).transpose(1, 2).reshape(16, -1)  # row-major to merge-block order
    torch.testing.assert_close(ours, blocks, rtol=1e-4, atol=1e-4)


def test_transformers_loads_the_result(base):
    _, info = Glm4vForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not any(info.values()), info
    config = json.loads((base / "config.json").read_text())
    assert len({config[k] for k in config if k.endswith("_token_id")}) == 6
    assert "chat_template" not in json.loads((base / "tokenizer_config.json").read_text())


def test_apples_own_spelling(parts, base, tmp_path):
    _, _, encoder_dir, decoder_dir = parts
    tensors = load_file(encoder_dir / "model.safetensors")
    apple = {
        "preprocessor.patchifier.proj.weight": tensors["embeddings.patch_embed.weight"],
        "preprocessor.patchifier.proj.bias": tensors["embeddings.patch_embed.bias"],
        "preprocessor.patchifier.norm.weight": tensors["embeddings.rms_norm.weight"],
        "preprocessor.pos_embed": tensors["embeddings.position_embedding.weight"][None].clone(),
        "trunk.post_trunk_norm.weight": tensors["rms_norm.weight"],
    }
    for i in range(2):
        ours, theirs = f"encoder.layers.{i}.", f"trunk.blocks.{i}."
        apple[theirs + "attn.qkv.weight"] = torch.cat([tensors[f"{ours}attention.{p}_proj.weight"] for p in "qkv"])
        apple[theirs + "attn.proj.weight"] = tensors[ours + "attention.out_proj.weight"]
        for number, part in ((1, "gate"), (2, "down"), (3, "up")):
            apple[f"{theirs}mlp.fc{number}.weight"] = tensors[f"{ours}ffn.{part}_proj.weight"]
        for number in (1, 2):
            apple[f"{theirs}norm_{number}.weight"] = tensors[f"{ours}rms_norm{number}.weight"]
    folder = tmp_path / "apple"
    folder.mkdir()
    save_file(apple, folder / "model.safetensors")
    settings = json.loads((encoder_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "aimv2"}))
    assemble(folder, decoder_dir, tmp_path / "out", seed=3)
    a, b = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(folder, copy, **settings):
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config = {key: value for key, value in {**config, **settings}.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"intermediate_size": 100}, "intermediate_size must be 96, the decoder's width, got 100"),
        ({"is_native": True}, "is_native must be false"),
        ({"patch_size": 16}, "patch_size must be 14, got 16"),
        ({"model_type": "clip"}, "model_type must be aimv2 or aimv2_vision_model, got clip"),
        ({"num_hidden_layers": 3}, "encoder.layers.2.attention.q_proj.weight is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"image_size": 84}, r"position_embedding.weight must be \[36, 64\], got \[16, 64\]"),
    ],
)
def test_errors_name_the_setting_and_write_nothing(parts, tmp_path, settings, text):
    encoder = change(parts[2], tmp_path / "encoder", **settings)
    with pytest.raises(InputError, match=text):
        assemble(encoder, parts[3], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model_type": "llama"}, "model_type must be glm4 .*, got llama"),
        ({"model_type": "glm4v", "vision_config": {"model_type": "x"}}, "model_type must be glm4 .*, got glm4v"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be default, got yarn"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a finite number above 0, got x"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number above 0, got 0"),
        ({"hidden_size": "96"}, "hidden_size must be a whole number above 0, got 96"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ],
)
def test_errors_of_the_decoder_write_nothing(parts, tmp_path, settings, text):
    decoder = change(parts[3], tmp_path / "decoder", **settings)
    with pytest.raises(InputError, match=rf"^assemble: .*config.json: {text}[^\n]*$"):
        assemble(parts[2], decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_settings_under_both_names(parts, tmp_path):
    """As transformers reads such a decoder: the older name wins, and takes what it lacks from beside it."""
    beside = {"rope_scaling": {"type": "default", "rope_theta": 77.0}, "partial_rotary_factor": 0.25}
    decoder = change(parts[3], tmp_path / "decoder", **beside)
    expected = Glm4Config.from_pretrained(decoder).rope_parameters
    text = assemble(parts[2], decoder, tmp_path / "out").text_config
    found = (text.rope_theta, text.partial_rotary_factor)
    assert found == (expected["rope_theta"], expected["partial_rotary_factor"]) == (77.0, 0.25)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_files_of_the_decoder_write_nothing(parts, tmp_path, name, content):
    decoder = change(parts[3], tmp_path / "decoder")
    (decoder / name).write_text(content)
    with pytest.raises(InputError, match=rf"^\w+: .*{name}: [^\n]*$"):
        assemble(parts[2], decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(parts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["assemble", "--vision", str(parts[2]), "--language", str(parts[3]), "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0 and "2 vision and 2 text layers, float32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "out must be a new or empty folder" in capsys.readouterr().err


def test_an_empty_name_is_no_folder(parts, tmp_path, capsys, monkeypatch):
    """A shell's variable that is not set: it would be the folder one is in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["assemble", "--vision", str(parts[2]), "--language", str(parts[3]), "--out", ""])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said == "glm4v: assemble: out must be a new or empty folder, got ''\n"
    assert not list(tmp_path.iterdir())


def test_the_default_device_is_nobodys(parts, base, tmp_path):
    with torch.device("meta"):
        assemble(parts[2], parts[3], tmp_path / "out", seed=3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_refuses_a_full_folder(parts, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out must be a new or empty folder"):
        assemble(parts[2], parts[3], tmp_path)
