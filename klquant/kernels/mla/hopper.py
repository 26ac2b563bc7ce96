"""`attend` for 16-bit pages on Hopper: pages on their way to shared memory while others are multiplied.

Triton's own pipeline keeps a third page for products of warp groups, for which there is no room beside the queries.
Here a page is fetched into the place of the one just used, two turns before its own: memory is never idle unless a
page's products take longer than the page.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

BUFFERS = gl.constexpr(2)


@gluon.jit
def _fetch(
    latent, rope, data, page, tile, end, first,
    RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, WIDE: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """A page's latents into their places: one group of copies. Tokens from `end` on are zeros."""
    place = (tile - first) % BUFFERS
    page_at = data + page.to(gl.int64) * (PAGE * (RANK + ROPE))
    t = gl.arange(0, PAGE, gl.SliceLayout(1, WIDE))[:, None]
    r = gl.arange(0, RANK, gl.SliceLayout(0, WIDE))[None, :]
    async_copy.async_copy_global_to_shared(
        latent.index(place), page_at + t * (RANK + ROPE) + r, mask=(tile * PAGE + t < end) & (r < RANK)
    )
    t = gl.arange(0, PAGE, gl.SliceLayout(1, NARROW))[:, None]
    e = gl.arange(0, ROPE, gl.SliceLayout(0, NARROW))[None, :]
    async_copy.async_copy_global_to_shared(
        rope.index(place), page_at + t * (RANK + ROPE) + RANK + e, mask=(tile * PAGE + t < end) & (e < ROPE)
    )
    async_copy.commit_group()


@gluon.jit
def _grid(INSTRUCTION: gl.constexpr):
    """`gdc_wait` and `gdc_launch_dependents`, which Gluon has no names for."""
    gl.inline_asm_elementwise(
        "griddepcontrol." + INSTRUCTION + "; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def attend_kernel(
    q, data, page_table, table_stride, length, mean, weight, splits, factor,
    H: gl.constexpr, BH: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """`klquant.kernels.mla.triton.attend_kernel` with a page a turn; 8 warps, RANK ≥ 128, BH ≥ 32."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    # 16 bytes a thread, rows of RANK and of ROPE.
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BH // 2, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BH, 16])
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    if EARLY:
        _grid("launch_dependents")
    split = gl.program_id(0)
    b = gl.program_id(1)
    n = gl.load(length + b)
    tiles = gl.cdiv(n, PAGE)
    per = gl.cdiv(tiles, splits)
    first = split * per
    last = gl.minimum(first + per, tiles)
    h = gl.arange(0, BH, gl.SliceLayout(0, SCORES))
    weight_at = weight + (b * H + h) * splits + split
    if first < last:
        pages = page_table + b * table_stride
        page = gl.load(pages + first)
        page1 = gl.load(pages + gl.minimum(first + 1, last - 1))
        page2 = gl.load(pages + gl.minimum(first + 2, last - 1))
        end = gl.minimum(n, last * PAGE)
        latent = gl.allocate_shared_memory(DTYPE, [BUFFERS, PAGE, RANK], ROWS)
        rope = gl.allocate_shared_memory(DTYPE, [BUFFERS, PAGE, ROPE], ROWS)
        _fetch(latent, rope, data, page, first, end, first, RANK, ROPE, PAGE, WIDE, NARROW)
        _fetch(latent, rope, data, page1, first + 1, end, first, RANK, ROPE, PAGE, WIDE, NARROW)

        # Latents are on their way before the queries are there.
        if EARLY:
            _grid("wait")
        hw = gl.arange(0, BH, gl.SliceLayout(1, WIDE))[:, None]
        r = gl.arange(0, RANK, gl.SliceLayout(0, WIDE))[None, :]
        q_at = q + b.to(gl.int64) * (H * (RANK + ROPE))
        q_latent = gl.allocate_shared_memory(
            DTYPE, [BH, RANK], ROWS, gl.load(q_at + hw * (RANK + ROPE) + r, mask=hw < H, other=0.0)
        )
        hn = gl.arange(0, BH, gl.SliceLayout(1, NARROW))[:, None]
        e = gl.arange(0, ROPE, gl.SliceLayout(0, NARROW))[None, :]
        q_rope = gl.allocate_shared_memory(
            DTYPE, [BH, ROPE], ROWS, gl.load(q_at + hn * (RANK + ROPE) + RANK + e, mask=hn < H, other=0.0)
        )
        p_shared = gl.allocate_shared_memory(DTYPE, [PAGE, BH], gl.NVMMASharedLayout.get_default_for([PAGE, BH], DTYPE))
        t = gl.arange(0, PAGE, gl.SliceLayout(1, SCORES))[:, None]
        acc = gl.zeros([RANK, BH], gl.float32, ACC)
        top = gl.full([BH], float("-inf"), gl.float32, gl.SliceLayout(0, SCORES))
        weights = gl.zeros([PAGE, BH], gl.float32, SCORES)
        for tile in range(first, last):
            place = (tile - first) % BUFFERS
            async_copy.wait_group(BUFFERS - 1)
            fence_async_shared()
            scores = gl.zeros([PAGE, BH], gl.float32, SCORES)
            scores = warpgroup_mma(latent.index(place), q_latent.permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma(rope.index(place), q_rope.permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            scores = gl.where(tile * PAGE + t < end, scores * factor, float("-inf"))
            higher = gl.maximum(top, gl.max(scores, 0))
            p = gl.exp2(scores - higher[None, :])
            fade = gl.exp2(top - higher)
            weights = weights * fade[None, :] + p
            top = higher
            p_shared.store(p.to(DTYPE))
            fence_async_shared()
            acc *= gl.convert_layout(fade, gl.SliceLayout(0, ACC))[None, :]
            acc = warpgroup_mma(latent.index(place).permute((1, 0)), p_shared, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _fetch(latent, rope, data, page2, tile + BUFFERS, end, first, RANK, ROPE, PAGE, WIDE, NARROW)
            page2 = gl.load(pages + gl.minimum(tile + BUFFERS + 1, last - 1))
        async_copy.wait_group(0)
        total = gl.sum(weights, 0)
        gl.store(weight_at, top + gl.log2(total), mask=h < H)
        OUT: gl.constexpr = gl.BlockedLayout([8, 1], [32, 1], [2, 4], [0, 1])
        out = (acc / gl.convert_layout(total, gl.SliceLayout(0, ACC))[None, :]).to(DTYPE)
        ho = gl.arange(0, BH, gl.SliceLayout(0, OUT))[None, :]
        mean_at = mean + ((b.to(gl.int64) * splits + split) * H + ho) * RANK
        mean_at += gl.arange(0, RANK, gl.SliceLayout(1, OUT))[:, None]
        gl.store(mean_at, gl.convert_layout(out, OUT), mask=ho < H)
    else:
        if EARLY:
            _grid("wait")
        gl.store(weight_at, gl.full([BH], float("-inf"), gl.float32, gl.SliceLayout(0, SCORES)), mask=h < H)
