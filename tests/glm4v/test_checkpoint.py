import json

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Glm4vForConditionalGeneration

from examples.make_checkpoint import CONTROL_TOKENS, STOP_TOKENS, make_checkpoint
from glm4v.answer import TAGS


def test_transformers_reads_it(tiny_checkpoint):
    model, report = Glm4vForConditionalGeneration.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "[gMASK]<sop><|user|>\nHi<|assistant|>\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.isfinite().all()


def test_special_tokens_are_single_and_agree_with_the_config(tiny_checkpoint):
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    ids = [tokenizer.token_to_id(token) for token in CONTROL_TOKENS + TAGS]
    assert ids == list(range(ids[0], ids[0] + len(ids)))  # in GLM's order, without gaps
    assert config["image_token_id"] == tokenizer.token_to_id("<|image|>")
    assert config["text_config"]["eos_token_id"] == [tokenizer.token_to_id(token) for token in STOP_TOKENS]
    text = "Ünïcode, 数字 12345 and\n\n emoji 🌺"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_seed_decides_the_weights(tiny_checkpoint, tmp_path):
    again = make_checkpoint(tmp_path / "again", seed=0)
    other = make_checkpoint(tmp_path / "other", seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tiny_checkpoint, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (again / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


def test_shards_and_dtype(tmp_path):
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16, layers=(1, 3), max_shard_size="400KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    config = json.loads((folder / "config.json").read_text())
    assert (config["vision_config"]["depth"], config["text_config"]["num_hidden_layers"]) == (1, 3)
    assert config["dtype"] == "bfloat16"
