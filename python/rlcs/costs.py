"""What a GLM-4.1V costs, by its sizes alone: parameters, FLOPs, bytes. Tests hold each formula to the model. No torch.

A FLOP is a multiplication or an addition in a matrix product; norms, rotations and activations are left out (below 1 %
at the released sizes). Dims: T tokens, P patches, M = P / 4 merged rows, C width, L layers, I inner size, H query
heads, K kv heads, D head dim, V vocab, R ranks that share the weights (`fsdp`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from glm4v.config import CHANNELS, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, Config

from .packing import Cost

PATCH = CHANNELS * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2
MERGED = MERGE_SIZE**2  # patches of a row that the language model reads


def parameters(config: Config) -> dict[str, int]:
    """Of the tower with its merger, the language model and the head, exactly; a tied head counts 0."""
    v, t, block = config.vision_config, config.text_config, _of_a_block(config)
    c, out = v.hidden_size, v.out_hidden_size
    ends = PATCH * c + c + v.table_side**2 * c + 2 * c + MERGED * c * out + out
    table = t.vocab_size * t.hidden_size
    return {
        "vision": v.depth * block["tower"] + ends + block["merger"],
        "text": t.num_hidden_layers * block["layer"] + table + t.hidden_size,
        "head": 0 if config.tie_word_embeddings else table,
    }


def adapters(config: Config, lora_rank: int) -> int:
    """Parameters of adapters on all linear layers but the head."""
    v, t, widths = config.vision_config, config.text_config, _adapted_widths(config)
    return lora_rank * (v.depth * widths["tower"] + widths["merger"] + t.num_hidden_layers * widths["layer"])


def gathered_together(config: Config) -> dict[str, int]:
    """Parameters that ranks gather in one (`fsdp.shard`): those of the largest block, of the embedding where the
    head has others, and of the root, which has all that is in no block."""
    v, t, block = config.vision_config, config.text_config, _of_a_block(config)
    table = 0 if config.tie_word_embeddings else t.vocab_size * t.hidden_size
    blocks = v.depth * block["tower"] + block["merger"] + t.num_hidden_layers * block["layer"]
    return {
        "block": max(block.values()),
        "embedding": table,
        "root": sum(parameters(config).values()) - blocks - table,
    }


@dataclass(frozen=True)
class Flops:
    """Of a forward pass, by what the backward pass and recomputation multiply."""

    blocks: float = 0.0  # products with the weights of all blocks
    pairs: float = 0.0  # attention: each query with each key that it sees
    patches: float = 0.0  # the first layer, whose input needs no gradient
    merger: float = 0.0
    head: float = 0.0
    adapters: float = 0.0  # of blocks, and of the merger, which is not computed again
    merger_adapters: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def forward(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def update(self, recompute: bool) -> float:
        """Forward and backward. Attention's backward makes five products for the forward's two, since it makes the
        scores again; so does the head's with its logits. What has adapters gives no gradient to its weights."""
        again, weights = int(recompute), int(not self.adapters)
        frozen = (2 + again) * self.blocks + (3.5 + again) * self.pairs + self.patches + 2 * self.merger + 3 * self.head
        adapters = (3 + again) * self.adapters + 3 * self.merger_adapters
        return frozen + adapters + weights * (self.blocks + self.patches + self.merger + self.head)


def text_flops(config: Config, tokens: float, pairs: float, rows: float = 0, lora_rank: int = 0) -> Flops:
    """Of ``tokens`` whose queries see ``pairs`` keys in all (T (T + 1) / 2 in a causal sequence of T), with logits of
    ``rows`` of them."""
    t = config.text_config
    return Flops(
        blocks=2 * tokens * t.num_hidden_layers * _layer_weights(config),
        pairs=4 * pairs * t.num_hidden_layers * t.num_attention_heads * t.head_dim,
        head=2 * rows * t.hidden_size * t.vocab_size,
        adapters=2 * tokens * t.num_hidden_layers * lora_rank * _adapted_widths(config)["layer"],
    )


def vision_flops(config: Config, patches: float, pairs: float, lora_rank: int = 0) -> Flops:
    """Of pictures of so many patches, which see ``pairs`` others in all (P * P in a picture of P)."""
    v = config.vision_config
    c, out = v.hidden_size, v.out_hidden_size
    merger = MERGED * c * out + out * out + 3 * out * v.intermediate_size
    return Flops(
        blocks=2 * patches * v.depth * (4 * c * c + 3 * c * out),
        pairs=4 * pairs * v.depth * c,
        patches=2 * patches * PATCH * c,
        merger=2 * patches / MERGED * merger,
        adapters=2 * patches * v.depth * lora_rank * _adapted_widths(config)["tower"],
        merger_adapters=2 * patches / MERGED * lora_rank * _adapted_widths(config)["merger"],
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


def state_bytes(
    config: Config, dtype: str = "bfloat16", shards: int | None = None, lora_rank: int = 0
) -> dict[str, float]:
    """What a process holds for the weights. Alone, it has them in ``dtype``; those in bf16 have fp32 masters
    (`optimizer.Optimizer`), and their gradients are in fp32 as well for the moment of the step. A rank of several has
    the rows of its shard, all in fp32. With adapters those are fp32, and what is frozen is in ``dtype``."""
    value, rows = 4 if dtype == "float32" else 2, sum(parameters(config).values()) / (shards or 1)
    if lora_rank:
        trained = adapters(config, lora_rank) / (shards or 1)
        sizes = (value * rows + 4 * trained, 4 * trained, 0.0, 8 * trained, 0.0)
    else:
        value, half = (value, 4 - value) if shards is None else (4, 0)
        sizes = (value * rows, value * rows, 2 * half * rows, 8 * rows, 2 * half * rows)
    return dict(zip(("weights", "gradients", "masters", "moments", "gradients in fp32"), sizes, strict=True))


def gathered_bytes(config: Config, shards: int, value: int = 2, lora_rank: int = 0) -> tuple[float, float]:
    """Weights and gradients that one of several ranks has whole in a micro-step behind the first: the most in a block's
    backward pass, beside activations, and the most outside of blocks, where there are none.

    The root's weights stay from the forward pass on, as does the head's gradient. Beside them are a block's weights and
    gradients, the next block's weights as they came in, and the gradients of the block before in fp32, which ranks have
    summed up. At the beginning the weights of root and embedding are there as they came in and as they are read; at the
    end the root's gradients are summed in fp32, and those of the embedding wait. With adapters these alone have
    gradients: there are but the weights.
    """
    of, head = gathered_together(config), config.text_config.vocab_size * config.text_config.hidden_size
    ends = value * (of["root"] + of["embedding"])
    if lora_rank:
        return value * (of["root"] + 2 * of["block"]), 2 * ends
    in_block = value * (of["root"] + head) + (3 * value + 4) * of["block"]
    return in_block, max(2 * ends, ends + 4 * of["root"] * (1 + 1 / shards))


def moved_bytes(config: Config, value: int = 2, lora_rank: int = 0) -> tuple[int, int]:
    """Whole weights that ranks gather for a micro-step, and gradients that they sum up, in fp32. A block's are gathered
    forward and backward, the embedding's forward, the root's once for both."""
    every, of, added = sum(parameters(config).values()), gathered_together(config), adapters(config, lora_rank)
    return value * (2 * (every + added) - of["embedding"] - of["root"]), 4 * (added or every)


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


def _of_a_block(config: Config) -> dict[str, int]:
    """Parameters of a block of the tower, the merger and a decoder layer."""
    v, t = config.vision_config, config.text_config
    c, out = v.hidden_size, v.out_hidden_size
    width, kv = t.hidden_size, t.num_key_value_heads * t.head_dim
    return {
        "tower": 2 * c + 4 * c * c + (3 * c if v.attention_bias else 0) + 3 * c * out,
        "merger": out * out + 2 * out + 3 * out * v.intermediate_size,
        "layer": _layer_weights(config) + width + 2 * kv + 4 * width,
    }


def _adapted_widths(config: Config) -> dict[str, int]:
    """Of a block's linear layers: what goes in and what comes out, all together."""
    v, t = config.vision_config, config.text_config
    c, out, width = v.hidden_size, v.out_hidden_size, t.hidden_size
    heads, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    return {
        "tower": 4 * c + 2 * c + 2 * (c + out) + out,  # qkv, proj; gate and up, down
        "merger": 2 * out + 2 * (out + v.intermediate_size) + v.intermediate_size,
        "layer": 4 * width + 2 * (heads + kv) + 2 * (width + t.intermediate_size) + t.intermediate_size,
    }


def _layer_weights(config: Config) -> int:
    """Of the matrices of a decoder layer."""
    t = config.text_config
    c, d = t.hidden_size, t.head_dim
    return c * d * 2 * (t.num_attention_heads + t.num_key_value_heads) + 3 * c * t.intermediate_size
