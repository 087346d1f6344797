"""A plain attention module that calls flash-attention: one import changes, and it runs on the CPU too, with gradients.

python examples/flash_attention_in_your_module.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from glm4v_ext import flash_attn_func  # was: from flash_attn import flash_attn_func


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, heads * self.head_dim)
        self.kv = nn.Linear(width, 2 * kv_heads * self.head_dim)
        self.out = nn.Linear(heads * self.head_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, S, C]
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
        return self.out(flash_attn_func(q, k, v, causal=True).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    layer, x = Attention(256, heads=8, kv_heads=2), torch.randn(2, 100, 256, requires_grad=True)
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)

    q = layer.q(x).unflatten(-1, (8, 32)).transpose(1, 2)
    k, v = (t.transpose(1, 2) for t in layer.kv(x).unflatten(-1, (2, 2, 32)).unbind(2))
    expected = layer.out(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    )
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    print(f"largest difference from torch's sdpa: output {(out - expected).abs().max():.1e}, "
          f"gradient {(gradient - expected_gradient).abs().max():.1e}")  # fmt: skip
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
