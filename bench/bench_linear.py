"""linear against F.linear and oneDNN's fp32 product, at the widths of the tower, the merger and the decoder."""

import pytest
import torch
import torch.nn.functional as F

from bench.shapes import MERGED_WIDTH, MERGER_INNER, TEXT_WIDTH, VISION_INNER, VISION_WIDTH, cases
from glm4v_ext import linear

# Name -> (M, K, N)
PRODUCTS = {
    f"{name}-M{m}": (m, k, n)
    for name, k, n in (
        ("qkv", VISION_WIDTH, 3 * VISION_WIDTH),
        ("proj", VISION_WIDTH, VISION_WIDTH),
        ("gate-up", VISION_WIDTH, 2 * VISION_INNER),
        ("down", VISION_INNER, VISION_WIDTH),
    )
    for m in (576, 9216)
} | {
    "merger-up-M144": (144, MERGED_WIDTH, MERGER_INNER),
    "decoder-up-M512": (512, TEXT_WIDTH, 2 * MERGER_INNER),
    "decode-qkv-M1": (1, TEXT_WIDTH, 36 * 128),
    "decode-qkv-M16": (16, TEXT_WIDTH, 36 * 128),
    "decode-up-M1": (1, TEXT_WIDTH, 2 * MERGER_INNER),
    "decode-up-M16": (16, TEXT_WIDTH, 2 * MERGER_INNER),
    "decode-down-M1": (1, MERGER_INNER, TEXT_WIDTH),
    "decode-down-M8": (8, MERGER_INNER, TEXT_WIDTH),
}


def has_onednn_product(dtype):
    """16-bit products need instructions that not every machine has."""
    if not torch.backends.mkldnn.is_available():
        return False
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in checks or getattr(torch.ops.mkldnn, checks[dtype])()


@pytest.mark.parametrize("product", cases(PRODUCTS, quick=["qkv-M576", "decode-qkv-M1", "decode-qkv-M16"]))
def bench_linear(race, device, dtype, product, backward):
    m, k, n = product
    x, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    peers = {"glm4v_ext": lambda: linear(x, weight), "F.linear": lambda: F.linear(x, weight)}
    if device == "cpu" and has_onednn_product(dtype) and not backward:
        peers["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    products = 3 if backward else 1
    race(
        peers,
        flops=products * 2 * m * k * n,
        bytes=products * (x.nbytes + weight.nbytes + m * n * dtype.itemsize),
        leaves=(x, weight) if backward else (),
    )
