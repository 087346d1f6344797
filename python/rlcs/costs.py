"""What a GLM-4.1V costs, by its sizes alone: parameters, FLOPs, bytes. Tests hold each formula to the model. No torch.

A FLOP is a multiplication or an addition in a matrix product; norms, rotations and activations are left out (below 1 %
at the released sizes). Dims: T tokens, P patches, M = P / 4 merged rows, C width, L layers, I inner size, H query
heads, K kv heads, D head dim, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from glm4v.config import CHANNELS, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, Config

from .packing import Cost

PATCH = CHANNELS * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
MERGED = MERGE_SIZE**2  # patches of a row that the language model reads


def parameters(config: Config) -> dict[str, int]:
    """Of the tower with its merger, the language model and the head, exactly; a tied head counts 0."""
    v, t = config.vision_config, config.text_config
    c, out = v.hidden_size, v.out_hidden_size
    block = 2 * c + 4 * c * c + (3 * c if v.attention_bias else 0) + 3 * c * out
    merger = out * out + 2 * out + 3 * out * v.intermediate_size
    vision = v.depth * block + PATCH * c + c + v.table_side**2 * c + 2 * c + MERGED * c * out + out + merger
    c, kv = t.hidden_size, t.num_key_value_heads * t.head_dim
    text = t.num_hidden_layers * (_layer_weights(config) + c + 2 * kv + 4 * c) + t.vocab_size * c + c
    return {"vision": vision, "text": text, "head": 0 if config.tie_word_embeddings else t.vocab_size * c}


@dataclass(frozen=True)
class Flops:
    """Of a forward pass, by what the backward pass and recomputation multiply."""

    blocks: float = 0.0  # products with the weights of all blocks
    pairs: float = 0.0  # attention: each query with each key that it sees
    patches: float = 0.0  # the first layer, whose input needs no gradient
    merger: float = 0.0
    head: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def forward(self) -> float:
        return self.blocks + self.pairs + self.patches + self.merger + self.head

    def update(self, recompute: bool) -> float:
        """Forward and backward. Attention's backward makes five products for the forward's two, since it makes the
        scores again; so does the head's with its logits."""
        again = int(recompute)
        return (
            (3 + again) * self.blocks + (3.5 + again) * self.pairs + 2 * self.patches + 3 * self.merger + 4 * self.head
        )


def text_flops(config: Config, tokens: float, pairs: float, rows: float = 0) -> Flops:
    """Of ``tokens`` whose queries see ``pairs`` keys in all (T (T + 1) / 2 in a causal sequence of T), with logits of
    ``rows`` of them."""
    t = config.text_config
    return Flops(
        blocks=2 * tokens * t.num_hidden_layers * _layer_weights(config),
        pairs=4 * pairs * t.num_hidden_layers * t.num_attention_heads * t.head_dim,
        head=2 * rows * t.hidden_size * t.vocab_size,
    )


def vision_flops(config: Config, patches: float, pairs: float) -> Flops:
    """Of pictures of so many patches, which see ``pairs`` others in all (P * P in a picture of P)."""
    v = config.vision_config
    c, out = v.hidden_size, v.out_hidden_size
    merger = MERGED * c * out + out * out + 3 * out * v.intermediate_size
    return Flops(
        blocks=2 * patches * v.depth * (4 * c * c + 3 * c * out),
        pairs=4 * pairs * v.depth * c,
        patches=2 * patches * PATCH * c,
        merger=2 * patches / MERGED * merger,
    )


def packing_cost(config: Config) -> Cost:
    """In MFLOP of a forward pass, what `packing` balances; logits, of what is learned alone, are left out."""
    kinds = (
        text_flops(config, 1, 0), text_flops(config, 0, 0.5),  # a token sees those before it
        vision_flops(config, 1, 0), vision_flops(config, 0, 1),
    )  # fmt: skip
    return Cost(*(1e-6 * flops.forward for flops in kinds))


def kv_bytes(config: Config, value: int = 2) -> int:
    """Of one token in the cache: keys and values of all layers."""
    t = config.text_config
    return 2 * value * t.num_hidden_layers * t.num_key_value_heads * t.head_dim


def state_bytes(config: Config, dtype: str = "bfloat16") -> dict[str, int]:
    """What training holds for the weights (`optimizer.Optimizer`): those in bf16 have fp32 masters, and their gradients
    are in fp32 as well for the moment of the step."""
    count = sum(parameters(config).values())
    value, half = (4, 0) if dtype == "float32" else (2, 1)
    return {
        "weights": value * count,
        "gradients": value * count,
        "masters": half * 4 * count,
        "moments": 8 * count,
        "gradients in fp32": half * 4 * count,
    }


def activation_bytes(
    config: Config, tokens: float, rows: float, patches: float, recompute: bool, value: int = 2
) -> float:
    """The most that a micro-step holds besides weights and gradients: as the last decoder layer's MLP goes backward,
    or before, as the head does.

    A decoder layer keeps for each token six rows of C (its input, what norms read and give), queries, keys, values and
    output of attention with a statistic a head, and 3 I of the MLP; a block of the tower 10 C and 3 I. With
    recomputation only inputs of blocks are kept, and one block is whole. The head reads ``rows`` tokens.
    """
    t, v = config.text_config, config.vision_config
    c, inner, depth = t.hidden_size, t.intermediate_size, t.num_hidden_layers
    heads = 2 * (t.num_attention_heads + t.num_key_value_heads) * t.head_dim
    layer = value * (6 * c + heads + 3 * inner) + 4 * t.num_attention_heads
    block = value * (10 * v.hidden_size + 3 * v.out_hidden_size) + 4 * v.num_heads
    merger = value * (MERGED * v.hidden_size + 5 * v.out_hidden_size + 3 * v.intermediate_size)
    if recompute:
        text = tokens * (value * (depth - 1) * c + layer)
        tower = patches * value * (2 * v.depth + 1) * v.hidden_size  # each block reads a sum and its norm
        in_tower = patches * (block + value * 2 * v.out_hidden_size)
    else:
        text = tokens * depth * layer
        tower = patches * (v.depth * block + value * 2 * v.hidden_size)
        in_tower = patches * value * 2 * v.out_hidden_size
    tower += patches / MERGED * merger
    # Gradients of gate and up, or before them of what the head has read.
    in_text = text + value * max(2 * inner * tokens, 2 * c * (tokens + rows))
    return tower + max(in_text, in_tower)


def _layer_weights(config: Config) -> int:
    """Of the matrices of a decoder layer."""
    t = config.text_config
    c, d = t.hidden_size, t.head_dim
    return c * d * 2 * (t.num_attention_heads + t.num_key_value_heads) + 3 * c * t.intermediate_size
