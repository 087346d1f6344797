"""A Hugging Face GLM-4.1V with the ops in it: three lines, the same tokens, less time.

python examples/patch_transformers.py                 # a tiny random model
python examples/patch_transformers.py --model DIR     # a checkpoint
"""

import argparse
import time

import torch
from transformers import AutoModelForImageTextToText, Glm4vConfig, Glm4vForConditionalGeneration

import glm4v_ext

TINY = Glm4vConfig(
    image_token_id=90,
    text_config={
        "vocab_size": 100, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "mrope_section": [4, 6, 6]},
    },
    vision_config={"hidden_size": 128, "depth": 2, "num_heads": 4, "out_hidden_size": 256, "intermediate_size": 512},
)  # fmt: skip


def ask(model, side):
    """Greedy tokens about one picture of ``side`` x ``side`` patches, and the seconds they took."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[1, 2, 3, *[model.config.image_token_id] * (side * side // 4), 4, 5, 6]])
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == model.config.image_token_id).int(),
        "pixel_values": torch.randn(side * side, 1176, generator=generator).to(model.dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -8:]
    return tokens.tolist(), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a checkpoint; without it, a tiny random model")
    parser.add_argument("--side", type=int, default=16, help="patches along a side of the picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    else:
        model = Glm4vForConditionalGeneration(TINY).eval()
    ask(model, options.side)  # the first call warms both up
    stock, stock_s = ask(model, options.side)

    # Before loading: enable(); one op less: enable(model, rope=False).
    glm4v_ext.integrations.transformers.enable(model)
    ours, ours_s = ask(model, options.side)
    print(f"transformers {stock} in {stock_s:.3f} s")
    print(f"with the ops {ours} in {ours_s:.3f} s")

    glm4v_ext.integrations.transformers.disable(model)
    assert ask(model, options.side)[0] == stock, "disable() restores"
    print("the same tokens" if ours == stock else "tokens differ: two were equally likely within rounding")


if __name__ == "__main__":
    main()
