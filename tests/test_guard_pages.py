"""Nothing outside of a tensor is touched: inputs lie against pages that may not be read, at either end.

A load beyond a tensor's end goes unnoticed almost always, and so does a sanitizer when the load is an instruction of
its own; here the process dies. Results are those of the same inputs elsewhere, to the bit.
"""

import ctypes
import mmap

import pytest
import torch

import glm4v_ext
from glm4v_ext import _C
from glm4v_ext.testing import DTYPES, forced_isa, forced_product, isa_levels

pytestmark = pytest.mark.long

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = mmap.PAGESIZE


class Walled:
    """Makes copies of tensors, of the same strides, whose last (or first) element touches a page that cannot be read.

    They lie in memory that is used again by ``clear``, which the copies must not outlive.
    """

    def __init__(self, at_end: bool) -> None:
        self.at_end, self.areas, self.used = at_end, {}, {}

    def area(self, pages: int) -> int:
        mine = self.areas.setdefault(pages, [])
        at = self.used.get(pages, 0)
        self.used[pages] = at + 1
        if at == len(mine):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            begin = LIBC.mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            for wall in (begin, begin + (pages + 1) * PAGE):
                assert LIBC.mprotect(wall, PAGE, 0) == 0
            mine.append(begin + PAGE)
        return mine[at]

    def clear(self) -> None:
        self.used.clear()

    def __call__(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.numel() == 0:
            return x.clone()
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        size = extent * x.element_size()
        pages = -(-size // PAGE)
        begin = self.area(pages) + (pages * PAGE - size if self.at_end else 0)
        memory = torch.frombuffer((ctypes.c_char * size).from_address(begin), dtype=x.dtype)
        return memory.as_strided(x.shape, x.stride()).copy_(x)


def unwalled(x):  # a copy of the same strides elsewhere
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) if isinstance(x, torch.Tensor) else x


def dense(x):
    return x


def turned(x):  # the first two dims the other way round in memory
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def cut(x):  # of wider rows, beginning within them
    if x.dim() == 0:
        return x
    wide = x.new_empty((*x.shape[:-1], x.shape[-1] + 5))
    return wide[..., 3:-2].copy_(x)


LAYOUTS = [dense, turned, cut]


def rows_and_width(rows, width, dtype):
    return [torch.randn(rows, width).to(dtype) for _ in range(2)] + [torch.randn(width).to(dtype)]


def norms(size, dtype):
    x, residual, weight = rows_and_width(3, size, dtype)
    yield glm4v_ext.rms_norm, [x, weight]
    yield glm4v_ext.add_rms_norm, [x, residual, weight]
    yield glm4v_ext.rms_norm_add, [x, residual, weight]


def swiglu(size, dtype):
    yield glm4v_ext.swiglu, [torch.randn(3, 2 * size).to(dtype)]


def products(size, dtype):
    for rows in (1, 3, 9, 29):
        x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, size), (2 * size + 1, size), 2 * size + 1))
        yield glm4v_ext.linear, [x, weight, bias]
    yield glm4v_ext.linear, [torch.randn(size, 37).to(dtype), torch.randn(5, 37).to(dtype)]
    yield glm4v_ext.merge_patches, [torch.randn(shape).to(dtype) for shape in ((8, size), (5, size, 2, 2), 5)]
    for still in (False, True):
        patches, weight = torch.randn(3, 3, 2, size).to(dtype), torch.randn(7, 3, 2, 1, size).to(dtype)
        patches = patches[:, :, :1].expand_as(patches) if still else patches
        inputs = [patches.reshape(3, -1), weight, torch.randn(7).to(dtype)]
        yield lambda *given, still=still: glm4v_ext.patch_embed(*given, still=still), inputs


def token_logprob(size, dtype):
    hidden, weight = torch.randn(5, size).to(dtype), torch.randn(size + 2, size).to(dtype)
    for index in (torch.int32, torch.int64):
        targets = torch.randint(0, size + 2, (5,), dtype=index)
        yield lambda *given: glm4v_ext.token_logprob(*given, 0.7, True), [hidden, weight, targets]


def attention(size, dtype):
    for heads, kv_heads, options in ((4, 2, {"causal": True}), (3, 3, {"softcap": 3.0, "window_size": (7, 3)})):
        for cu_q, cu_k in (([0, 1, 1, 20], [0, 33, 50, 67]), ([0, 49, 70], [0, 17, 17])):
            q = torch.randn(cu_q[-1] + 2, heads, size).to(dtype)
            k, v = (torch.randn(cu_k[-1] + 3, kv_heads, size).to(dtype) for _ in range(2))
            cu = [torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k)]

            def run(*given, options=options):
                return glm4v_ext.flash_attn_varlen_func(*given, 70, 70, **options)

            yield run, [q, k, v, *cu]


def paged_attention(size, dtype):
    q = torch.randn(20, 4, size).to(dtype)
    pages = [torch.randn(5, 16, 2, size).to(dtype) for _ in range(2)]
    cu = [torch.tensor([0, 3, 20]), torch.tensor([0, 16, 39])]
    table = torch.tensor([[4, 0], [1, 3]], dtype=torch.int32)
    with torch.no_grad():
        yield (
            lambda q, k, v, *rest: glm4v_ext.flash_attn_varlen_func(
                q.detach(), k.detach(), v.detach(), *rest[:2], 20, 39, block_table=rest[2], causal=True
            ),
            [q, *pages, *cu, table],
        )


def kvcache(size, dtype):
    for queries, heads, kv_heads in ((1, 4, 2), (1, 3, 3), (3, 16, 1)):
        q, *fresh = (torch.randn(2, queries, h, size).to(dtype) for h in (heads, kv_heads, kv_heads))
        caches = [torch.randn(2, 70, kv_heads, size).to(dtype) for _ in range(2)]
        for lengths in ([70 - queries, 5], [0, 16]):

            def run(q, k_cache, v_cache, k, v, lengths):
                with torch.no_grad():
                    given = [q, k_cache, v_cache, k, v]
                    out, lse = glm4v_ext.flash_attn_with_kvcache(
                        *given, cache_seqlens=lengths, causal=True, return_softmax_lse=True
                    )
                return out, lse, k_cache.detach().clone(), v_cache.detach().clone()

            yield run, [q, *caches, *fresh, torch.tensor(lengths)]


def patchify(size, dtype):
    patch = size % 7 + 1
    frames = torch.randint(0, 256, (3, 2 * patch, 4 * patch, 3), dtype=torch.uint8)
    large = torch.randint(0, 256, (1, 28, 56, 3), dtype=torch.uint8)
    for given, sides in ((frames, (2, patch, 2)), (large, (2, 14, 2))):
        for layout in (given, given.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
            yield lambda x, sides=sides: glm4v_ext.patchify(x, [0.5] * 3, [0.3] * 3, *sides, dtype=dtype)[0], [layout]


def interpolate_pos_embed(size, dtype):
    grid = torch.tensor([[1, 2, 6], [2, 4, 2], [0, 2, 2]])
    for side in (1, 5):
        x, table = torch.randn(28, size).to(dtype), torch.randn(side * side, size).to(dtype)
        yield glm4v_ext.interpolate_pos_embed, [x, table, grid]


def ropes(size, dtype):
    q, k = torch.randn(5, 3, 4 * size).to(dtype), torch.randn(5, 1, 4 * size).to(dtype)
    if 4 * size <= 256:
        yield glm4v_ext.rope_2d, [q, k, torch.randint(0, 30, (5, 2))]
    pairs = min(2 * size, 127)
    sections, positions = (pairs - pairs // 2, pairs // 2, 0), torch.randint(0, 900, (3, 5), dtype=torch.int32)
    for interleaved in (False, True):
        rotary = (sections, 1e4, 2 * pairs, interleaved)
        yield lambda *given, rotary=rotary: glm4v_ext.rope_3d(*given, *rotary), [q, k, positions]

        def in_place(q, k, positions, rotary=rotary):
            q, k = q.detach(), k.detach()
            glm4v_ext.rope_3d_(q, k, positions, *rotary)
            return q.clone(), k.clone()

        yield in_place, [q, k, positions]


def nothing(size, dtype):
    def empty(*shape):
        return torch.empty(shape, dtype=dtype)

    yield glm4v_ext.rms_norm, [empty(0, size), empty(size)]
    yield glm4v_ext.add_rms_norm, [empty(0, size), empty(0, size), empty(size)]
    yield glm4v_ext.swiglu, [empty(0, 2 * size)]
    for rows, inputs, outputs in ((0, size, 3), (3, 0, size), (size, 3, 0)):
        yield glm4v_ext.linear, [torch.zeros(rows, inputs).to(dtype), torch.zeros(outputs, inputs).to(dtype)]
    yield glm4v_ext.token_logprob, [empty(0, size), empty(7, size), torch.empty(0, dtype=torch.int64)]
    yield glm4v_ext.interpolate_pos_embed, [empty(0, size), empty(9, size), torch.empty(0, 3, dtype=torch.int64)]
    positions = torch.empty(3, 0, dtype=torch.int64)
    yield lambda *given: glm4v_ext.rope_3d(*given, (size, 0, 0), 1e4, 2 * size), [empty(0, 2, 256)] * 2 + [positions]
    for cu in ([0], [0, 0, 0]):
        cu = torch.tensor(cu, dtype=torch.int32)
        q, k = empty(0, 4, size), empty(0, 2, size)
        yield lambda *given: glm4v_ext.flash_attn_varlen_func(*given, 0, 0), [q, k, k, cu, cu]


OPS = [
    norms, swiglu, products, token_logprob, attention, paged_attention, kvcache, patchify, interpolate_pos_embed, ropes,
    nothing,
]  # fmt: skip
SIZES = [1, 2, 3, 15, 17, 33, 65]


def results(function, inputs, place):
    """Outputs of ``function(*inputs)``, then the gradients, with everything where ``place`` puts it."""
    leaves = [place(x) for x in inputs]
    wanted = [x.requires_grad_() for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    smooth = [o for o in outputs if o.requires_grad]
    torch.manual_seed(1)
    cotangents = [place(torch.randn(o.shape).to(o.dtype)) for o in smooth]
    grads = torch.autograd.grad(smooth, wanted, cotangents) if smooth else ()
    return [o.detach() for o in outputs] + list(grads)


@pytest.fixture(autouse=True)
def _own_products():
    products = glm4v_ext.build_info()["products"]
    for dtype in products:
        _C.force_product(dtype, "glm4v_ext")
    yield
    for dtype, name in products.items():
        _C.force_product(dtype, name)


@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_touches_nothing_outside(op, level):
    walls = [Walled(at_end) for at_end in (True, False)]
    with forced_isa(level):
        for dtype in DTYPES:
            for i, size in enumerate(SIZES):
                for j, (function, inputs) in enumerate(op(size, dtype)):
                    layout = LAYOUTS[(i + j) % len(LAYOUTS)]
                    inputs = [layout(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
                    expected = results(function, inputs, unwalled)
                    for walled in walls:
                        for found, right in zip(results(function, inputs, walled), expected, strict=True):
                            assert torch.equal(found, right), (size, dtype, layout)
                        walled.clear()


@pytest.mark.skipif("amx" not in isa_levels(), reason="needs a CPU with AMX")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_on_tiles_touch_nothing_outside(dtype, layout):
    with forced_product("glm4v_ext on tiles", dtype):
        for rows, inputs, outputs in ((128, 64, 160), (131, 77, 129), (200, 2400, 150), (5, 33, 31), (49, 15, 40)):
            given = [layout(torch.randn(shape).to(dtype)) for shape in ((rows, inputs), (outputs, inputs), (outputs,))]
            expected = results(glm4v_ext.linear, given, unwalled)
            for walled in (Walled(at_end) for at_end in (True, False)):
                for found, right in zip(results(glm4v_ext.linear, given, walled), expected, strict=True):
                    assert torch.equal(found, right), (rows, inputs, outputs)
