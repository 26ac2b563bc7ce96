"""`attend` on Hopper: pages on their way to shared memory while others are multiplied.

Triton's own pipeline keeps a third page for products of warp groups, for which there is no room beside the queries.
Here a page is fetched into the place of the one just used, two turns before its own: memory is never idle unless a
page's products take longer than the page. Of codes it is their words that wait there; they become two operands, the
even latents and the odd ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from klquant.kernels.mla.words import code_asm, unit

BUFFERS = gl.constexpr(2)
# 16 bytes a thread of 8 warps: rows of 256 or more values, of 64 and of 32.
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
NARROWEST = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [8, 1], [1, 0]))


@gluon.jit
def _fetch(
    latent, rope, data, page, tile, end, first,
    WORDS: gl.constexpr, TAIL: gl.constexpr, PAGE: gl.constexpr, ROPE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """A page's WORDS ‖ TAIL values a token into their places: one group of copies. Tokens from `end` on are zeros."""
    place = (tile - first) % BUFFERS
    page_at = data + page.to(gl.int64) * (PAGE * (WORDS + TAIL))
    t = gl.arange(0, PAGE, gl.SliceLayout(1, WIDE))[:, None]
    r = gl.arange(0, WORDS, gl.SliceLayout(0, WIDE))[None, :]
    seen = (tile * PAGE + t < end) & (r < WORDS)
    async_copy.async_copy_global_to_shared(latent.index(place), page_at + t * (WORDS + TAIL) + r, mask=seen)
    t = gl.arange(0, PAGE, gl.SliceLayout(1, ROPE_LAYOUT))[:, None]
    e = gl.arange(0, TAIL, gl.SliceLayout(0, ROPE_LAYOUT))[None, :]
    seen = (tile * PAGE + t < end) & (e < TAIL)
    async_copy.async_copy_global_to_shared(rope.index(place), page_at + t * (WORDS + TAIL) + WORDS + e, mask=seen)
    async_copy.commit_group()


@gluon.jit
def _query(q_at, first: gl.constexpr, COUNT: gl.constexpr, STRIDE: gl.constexpr, H: gl.constexpr, BH: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    """COUNT values of each head's query in shared memory."""
    DTYPE: gl.constexpr = q_at.dtype.element_ty
    h = gl.arange(0, BH, gl.SliceLayout(1, LAYOUT))[:, None]
    i = gl.arange(0, COUNT, gl.SliceLayout(0, LAYOUT))[None, :]
    value = gl.load(q_at + h * STRIDE + first + i, mask=h < H, other=0.0)
    PLACE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BH, COUNT], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [BH, COUNT], PLACE, value)


@gluon.jit
def _codes(words, FIELD: gl.constexpr, FORMAT: gl.constexpr, DTYPE: gl.constexpr):
    """As `klquant.kernels.mla.words._codes`."""
    ASM: gl.constexpr = code_asm(FORMAT, FIELD, gl.bfloat16 == DTYPE)
    return gl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2).to(DTYPE, bitcast=True)


@gluon.jit
def _weigh(scores, seen, factor, top, weights):
    """(p, fade, top, weights): weights of a page's scores, and what those before are multiplied with."""
    scores = gl.where(seen, scores * factor, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 0))
    p = gl.exp2(scores - higher[None, :])
    fade = gl.exp2(top - higher)
    return p, fade, higher, weights * fade[None, :] + p


@gluon.jit
def _leave(mean_at, acc, total, ACC: gl.constexpr, H: gl.constexpr, RANK: gl.constexpr):
    """Store the mean [ROWS, BH] at mean_at, pointing to its first row."""
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [32, 1], [1, 8], [0, 1])
    ROWS: gl.constexpr = acc.shape[0]
    BH: gl.constexpr = acc.shape[1]
    out = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(0, ACC))[None, :]
    h = gl.arange(0, BH, gl.SliceLayout(0, OUT))[None, :]
    r = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))[:, None]
    gl.store(mean_at + h * RANK + r, gl.convert_layout(out.to(mean_at.dtype.element_ty), OUT), mask=h < H)


@gluon.jit
def _grid(INSTRUCTION: gl.constexpr):
    """`gdc_wait` and `gdc_launch_dependents`, which Gluon has no names for."""
    gl.inline_asm_elementwise(
        "griddepcontrol." + INSTRUCTION + "; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def attend_kernel(
    q, data, scale, page_table, table_stride, length, mean, weight, splits, factor,
    H: gl.constexpr, BH: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr,
    FORMAT: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """`klquant.kernels.mla.triton.attend_kernel` with a page a turn; 8 warps, RANK ≥ 512, BH ≥ 32."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    CODED: gl.constexpr = FORMAT != "plain"
    WORDS: gl.constexpr = RANK // 2 if CODED else RANK
    TAIL: gl.constexpr = ROPE // 2 if CODED else ROPE
    UNIT: gl.constexpr = unit(FORMAT, DTYPE)
    GAIN: gl.constexpr = 128.0 if FORMAT == "int8" else 1.0
    THIN: gl.constexpr = NARROWEST if CODED else NARROW
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BH // 2, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BH, 16])
    OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, WORDS], DTYPE)
    ROPE_OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, TAIL], DTYPE)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
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
        latent = gl.allocate_shared_memory(data.dtype.element_ty, [BUFFERS, PAGE, WORDS], PLAIN if CODED else OPERAND)
        rope = gl.allocate_shared_memory(data.dtype.element_ty, [BUFFERS, PAGE, TAIL], PLAIN if CODED else ROPE_OPERAND)
        _fetch(latent, rope, data, page, first, end, first, WORDS, TAIL, PAGE, THIN)
        _fetch(latent, rope, data, page1, first + 1, end, first, WORDS, TAIL, PAGE, THIN)
        t = gl.arange(0, PAGE, gl.SliceLayout(1, SCORES))
        if CODED:
            even = gl.allocate_shared_memory(DTYPE, [PAGE, WORDS], OPERAND)
            odd = gl.allocate_shared_memory(DTYPE, [PAGE, WORDS], OPERAND)
            rope_even = gl.allocate_shared_memory(DTYPE, [PAGE, TAIL], ROPE_OPERAND)
            rope_odd = gl.allocate_shared_memory(DTYPE, [PAGE, TAIL], ROPE_OPERAND)
            step = gl.load(scale + page.to(gl.int64) * PAGE + t, mask=first * PAGE + t < end, other=0.0)
            acc_odd = gl.zeros([WORDS, BH], gl.float32, ACC)
        # Latents are on their way before the queries are there.
        if EARLY:
            _grid("wait")
        q_at = q + b.to(gl.int64) * (H * (RANK + ROPE))
        q_latent = _query(q_at, 0, WORDS, RANK + ROPE, H, BH, WIDE)
        q_rope = _query(q_at, RANK, TAIL, RANK + ROPE, H, BH, THIN)
        if CODED:
            q_odd = _query(q_at, WORDS, WORDS, RANK + ROPE, H, BH, WIDE)
            q_rope_odd = _query(q_at, RANK + TAIL, TAIL, RANK + ROPE, H, BH, THIN)
        p_shared = gl.allocate_shared_memory(DTYPE, [PAGE, BH], gl.NVMMASharedLayout.get_default_for([PAGE, BH], DTYPE))
        acc = gl.zeros([WORDS, BH], gl.float32, ACC)
        top = gl.full([BH], float("-inf"), gl.float32, gl.SliceLayout(0, SCORES))
        weights = gl.zeros([PAGE, BH], gl.float32, SCORES)
        for tile in range(first, last):
            place = (tile - first) % BUFFERS
            async_copy.wait_group(BUFFERS - 1)
            scores = gl.zeros([PAGE, BH], gl.float32, SCORES)
            if CODED:
                words = latent.index(place).load(WIDE)
                tail = rope.index(place).load(THIN)
                _fetch(latent, rope, data, page2, tile + BUFFERS, end, first, WORDS, TAIL, PAGE, THIN)
                next_seen = (tile + 1) * PAGE + t < end
                next_step = gl.load(scale + page1.to(gl.int64) * PAGE + t, mask=next_seen, other=0.0)
                page1 = page2
                even.store(_codes(words, 0, FORMAT, DTYPE))
                odd.store(_codes(words, 1, FORMAT, DTYPE))
                rope_even.store(_codes(tail, 0, FORMAT, DTYPE))
                rope_odd.store(_codes(tail, 1, FORMAT, DTYPE))
                fence_async_shared()
                scores = warpgroup_mma(even, q_latent.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma(odd, q_odd.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma(rope_even, q_rope.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma(rope_odd, q_rope_odd.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,)) * (step * UNIT)[:, None]
            else:
                fence_async_shared()
                scores = warpgroup_mma(latent.index(place), q_latent.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma(rope.index(place), q_rope.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,))
            seen = (tile * PAGE + t < end)[:, None]
            p, fade, top, weights = _weigh(scores, seen, factor, top, weights)
            if CODED:
                p *= (step * (UNIT * GAIN))[:, None]
                step = next_step
            p_shared.store(p.to(DTYPE))
            fence_async_shared()
            fade = gl.convert_layout(fade, gl.SliceLayout(0, ACC))[None, :]
            if CODED:
                acc = warpgroup_mma(even.permute((1, 0)), p_shared, acc * fade, is_async=True)
                acc_odd = warpgroup_mma(odd.permute((1, 0)), p_shared, acc_odd * fade, is_async=True)
                acc, acc_odd = warpgroup_mma_wait(0, deps=(acc, acc_odd))
            else:
                acc = warpgroup_mma(latent.index(place).permute((1, 0)), p_shared, acc * fade, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                _fetch(latent, rope, data, page2, tile + BUFFERS, end, first, WORDS, TAIL, PAGE, THIN)
            page2 = gl.load(pages + gl.minimum(tile + BUFFERS + 1, last - 1))
        async_copy.wait_group(0)
        total = gl.sum(weights, 0)
        gl.store(weight_at, top + gl.log2(total), mask=h < H)
        mean_at = mean + (b.to(gl.int64) * splits + split) * (H * RANK)
        _leave(mean_at, acc, total * GAIN, ACC, H, RANK)
        if CODED:
            _leave(mean_at + WORDS, acc_odd, total * GAIN, ACC, H, RANK)
    else:
        if EARLY:
            _grid("wait")
        gl.store(weight_at, gl.full([BH], float("-inf"), gl.float32, gl.SliceLayout(0, SCORES)), mask=h < H)
