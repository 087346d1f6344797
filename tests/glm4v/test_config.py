import dataclasses
import json
import math
import shutil
import warnings

import pytest
from transformers import GenerationConfig, Glm4vConfig

from glm4v import Config, Glm4v, InputError, TextConfig, VisionConfig
from glm4v.config import UNREAD

ROPE = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25, "mrope_section": [4, 6, 6]}


def old_spelling(data):
    """The same settings as the first releases wrote them."""
    text = data["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"], text["partial_rotary_factor"] = rope.pop("rope_theta"), rope.pop("partial_rotary_factor")
    text["rope_scaling"] = rope
    data["vision_config"].pop("rope_parameters")
    if "dtype" in data:
        data["torch_dtype"] = data.pop("dtype")
    return data


def test_defaults_are_the_released_model():
    config = Config()
    assert (config.vision_config.table_side, config.vision_config.head_dim) == (24, 128)
    assert (config.text_config.head_dim, config.text_config.rotary_dim) == (128, 64)
    theirs = Glm4vConfig(text_config={"rope_parameters": {**ROPE, "rope_theta": 1e4}}).to_dict()
    for ours, other in ((config, theirs), (config.vision_config, theirs["vision_config"])):
        for field in dataclasses.fields(ours):
            if field.name in other and not dataclasses.is_dataclass(getattr(ours, field.name)):
                assert getattr(ours, field.name) == other[field.name], field.name


@pytest.mark.parametrize("spell", [dict, old_spelling])
def test_both_spellings_and_back(spell, tmp_path):
    theirs = Glm4vConfig(
        text_config={"rope_parameters": ROPE, "eos_token_id": [7, 8], "rms_norm_eps": 1e-6},
        vision_config={"depth": 3, "hidden_size": 96, "num_heads": 2},
        image_token_id=11,
    )
    theirs.save_pretrained(tmp_path)
    data = spell(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps({**data, "note": "kept"}))
    config = Config.from_pretrained(tmp_path)
    text = config.text_config
    assert (text.rope_theta, text.partial_rotary_factor, text.mrope_section) == (5e5, 0.25, (4, 6, 6))
    assert (text.rotary_dim, text.rms_norm_eps, config.image_token_id) == (32, 1e-6, 11)
    assert (config.vision_config.depth, config.vision_config.rope_theta) == (3, 1e4)

    config.save_pretrained(tmp_path / "again")
    assert Config.from_pretrained(tmp_path / "again") == config
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["note"] == "kept" and written["text_config"]["eos_token_id"] == [7, 8]
    again = Glm4vConfig.from_pretrained(tmp_path / "again").to_dict()
    expected = Glm4vConfig.from_pretrained(tmp_path).to_dict()
    assert {k: v for k, v in again.items() if k != "architectures"} == {
        k: v for k, v in expected.items() if k != "architectures"
    }


def test_rotary_settings_under_both_names(tmp_path):
    """As transformers reads such a file: the older name wins, and takes what it lacks from beside it."""
    data = Config().to_dict()
    data["text_config"] |= {
        "rope_scaling": {"type": "default", "mrope_section": [4, 6, 6]},
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.25,
    }
    data["vision_config"]["rope_scaling"] = {"rope_type": "default", "rope_theta": 77.0}
    (tmp_path / "config.json").write_text(json.dumps(data))
    ours, theirs = Config.from_pretrained(tmp_path), Glm4vConfig.from_pretrained(tmp_path)
    text = theirs.text_config.rope_parameters
    assert text == {**text, "rope_theta": 5e5, "partial_rotary_factor": 0.25, "mrope_section": [4, 6, 6]}
    for name in ("rope_theta", "partial_rotary_factor", "mrope_section"):
        assert getattr(ours.text_config, name) == pytest.approx(text[name]), name
    assert ours.vision_config.rope_theta == theirs.vision_config.rope_parameters["rope_theta"] == 77.0


def test_tied_embeddings_in_either_place():
    data = Config().to_dict()
    assert not Config.from_dict(data).tie_word_embeddings
    assert Config.from_dict({**data, "tie_word_embeddings": True}).tie_word_embeddings
    data["text_config"]["tie_word_embeddings"] = True
    assert Config.from_dict(data).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "int4"}, "dtype of config must be one of float64, float32, bfloat16, float16, got 'int4'"),
        ({"dtype": 16}, "dtype of config must be one of float64, .*, got 16"),
        ({"tie_word_embeddings": "x"}, "tie_word_embeddings of config must be true or false, got 'x'"),
        ({"model_type": "glm4v_moe"}, "model_type of config must be glm4v, got glm4v_moe"),
        ({"text_config": None}, "text_config of config must be an object, got None"),
        ({"vision_config": {"patch_size": 16}}, "patch_size of vision_config must be 14, got 16"),
        ({"vision_config": {"out_hidden_size": 5}}, "out_hidden_size of vision_config must be text_config.hidden_size"),
        ({"vision_config": {"num_heads": 7}}, "hidden_size of vision_config must be a multiple of num_heads = 7"),
        (
            {"vision_config": {"num_heads": 4}},
            "hidden_size / num_heads of vision_config must be at most 256, .*, got 384",
        ),
        (
            {"text_config": {"num_attention_heads": 8}},
            "hidden_size / num_attention_heads of text_config must be at most 256, .*, got 512",
        ),
        ({"vision_config": {"num_heads": 0}}, "hidden_size of vision_config must be a multiple of num_heads = 0, got"),
        (
            {"text_config": {"num_hidden_layers": 1.5}},
            "num_hidden_layers of text_config must be a whole number, 0 or more, got 1.5",
        ),
        ({"text_config": {"num_hidden_layers": True}}, "num_hidden_layers of text_config must be a whole number, 0"),
        ({"text_config": {"vocab_size": -1}}, "vocab_size of text_config must be a whole number, 0 or more, got -1"),
        ({"text_config": {"rms_norm_eps": "a"}}, "rms_norm_eps of text_config must be a finite number, 0 or more, got"),
        ({"text_config": {"rms_norm_eps": math.nan}}, "rms_norm_eps of text_config must be a finite number, 0 or more"),
        ({"vision_config": {"rope_parameters": [1]}}, "rope_parameters of vision_config must be an object, got .1."),
        ({"vision_config": {"rope_parameters": {"rope_theta": 0}}}, "rope_theta of vision_config must be above 0, got"),
        (
            {"text_config": {"rope_parameters": {**ROPE, "mrope_section": 3}}},
            "mrope_section of text_config must be a list, got 3",
        ),
        (
            {"text_config": {"rope_parameters": {**ROPE, "rope_theta": "a"}}},
            "rope_theta of text_config must be a finite number",
        ),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act of text_config must be silu, got gelu"),
        ({"text_config": {"attention_dropout": 0.1}}, "attention_dropout of text_config must be 0.0, got 0.1"),
        (
            {"text_config": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1e308}}},
            "partial_rotary_factor of text_config must be at most 1: all dims of a head, got 1e[+]308",
        ),
        (
            {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1]}}},
            "mrope_section of text_config must be 3 sizes that sum to 16",
        ),
        *(
            (
                {"text_config": {"rope_parameters": {**ROPE, "mrope_section": wrong}}},
                "mrope_section of text_config must be 3 sizes that sum to 16, got ",
            )
            for wrong in (["4", "6", "6"], [-4, 10, 10], [4.0, 6.0, 6.0])
        ),
        (
            {"text_config": {"rope_parameters": {**ROPE, "rope_type": "yarn"}}},
            "rope_type of text_config must be default, got",
        ),
    ],
)
def test_errors_name_the_key_and_the_file(change, text, tmp_path):
    data = Config().to_dict()
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=text) as caught:
        Config.from_pretrained(tmp_path)
    assert str(caught.value).endswith(f"({tmp_path}/config.json)") and "\n" not in str(caught.value)


def test_folders_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"hf download zai-org/GLM-4.1V-9B-Thinking --local-dir GLM-4.1V-9B"):
        Config.from_pretrained("zai-org/GLM-4.1V-9B-Thinking")
    with pytest.raises(InputError, match="nowhere must be a folder; nothing is there"):
        Config.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config.json: the file is missing"):
        Config.from_pretrained(tmp_path)
    for content in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"^config: .*config.json: is not JSON: [^\n]*$"):
            Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"^config: .*config.json: cannot be read: Is a directory$"):
        Config.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"file must be a folder; a file is there"):
        (tmp_path / "file").write_text("")
        Config.from_pretrained(tmp_path / "file")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match=r"file must be a folder; a file is there"):
        Config.from_pretrained(f"{tmp_path.name}/file")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError("no space left on device")

    Config().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Config(image_token_id=7).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_impossible_sizes():
    with pytest.raises(InputError, match="hidden_size / num_heads of vision_config must be a multiple of 4, got 6"):
        VisionConfig(hidden_size=12, num_heads=2)
    with pytest.raises(
        ValueError, match="num_attention_heads of text_config must be a multiple of num_key_value_heads"
    ):
        TextConfig(num_key_value_heads=3)


def test_settings_without_effect_are_named(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    path = tmp_path / "generation_config.json"
    idle = {"max_length": 65536, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": [], "token_healing": False}
    path.write_text(json.dumps({**idle, "min_length": None, "temperature": 0.5, "top_k": 3, "pad_token_id": 0}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Glm4v.without_weights(tmp_path)
    path.write_text(
        '{"max_length": 20, "suppress_tokens": [5], "temperature": 0.5, "num_beams": 4, "min_new_tokens": 7}'
    )
    said = f"^config: {path}: has no effect on generate: min_new_tokens, num_beams, suppress_tokens, max_length$"
    with pytest.warns(UserWarning, match=said):
        Glm4v.without_weights(tmp_path)
    assert UNREAD.keys() <= vars(GenerationConfig()).keys()
