"""What surrounds attention to latents: queries through W_UK, and the parts' mean latents through W_UV.

A program has one head and several sequences, its part of the map is read once for them. With EARLY it fetches that part
while the launch before it still works.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _field_at(i, SIZE: tl.constexpr, FIELDS: tl.constexpr):
    """Where latent i of SIZE lies when the even ones come before the odd ones."""
    return (i % FIELDS) * (SIZE // FIELDS) + i // FIELDS


@triton.jit
def absorb_kernel(
    q, q_stride, q_head_stride, kv_b, out, batch, H: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
    V: tl.constexpr, RANK: tl.constexpr, FIELDS: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, H, RANK + ROPE]; grid (heads, tiles of BL latents, tiles of BM sequences)."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    head = tl.program_id(0)
    l = tl.program_id(1) * BL + tl.arange(0, BL)
    b = tl.program_id(2) * BM + tl.arange(0, BM)
    exists = (b < batch)[None, :]
    n = tl.arange(0, NOPE)
    w = tl.load(kv_b + (head * (NOPE + V) + n)[:, None] * RANK + l[None, :])
    if EARLY:
        gdc_wait()
        # Not before: what starts then reads what the launch before this one wrote, the newest latent.
        gdc_launch_dependents()
    x_at = q + b[None, :].to(tl.int64) * q_stride + head * q_head_stride
    x = tl.load(x_at + n[:, None], mask=exists, other=0.0)
    y = tl.dot(tl.trans(w), x)
    out_at = out + (b[None, :].to(tl.int64) * H + head) * (RANK + ROPE)
    tl.store(out_at + _field_at(l, RANK, FIELDS)[:, None], y.to(DTYPE), mask=exists)
    if tl.program_id(1) == 0:
        e = tl.arange(0, ROPE)[:, None]
        rope = tl.load(x_at + NOPE + e, mask=exists, other=0.0)
        tl.store(out_at + RANK + _field_at(e, ROPE, FIELDS), rope, mask=exists)


@triton.jit
def finish_kernel(
    mean, weight, kv_b, out, batch, splits,
    H: tl.constexpr, NOPE: tl.constexpr, V: tl.constexpr, RANK: tl.constexpr, FIELDS: tl.constexpr,
    SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, H·V]; grid (heads, tiles of BV outputs, tiles of ROWS / GROUPS sequences).

    Each of ROWS rows adds up every GROUPS-th part of a sequence, AT_ONCE of them loaded together; a sequence's rows
    meet behind W_UV, in a product that needs 8 rows anyway.
    """
    DTYPE: tl.constexpr = out.dtype.element_ty
    BM: tl.constexpr = ROWS // GROUPS
    head = tl.program_id(0)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    b = tl.program_id(2) * BM + tl.arange(0, ROWS) // GROUPS
    group = tl.arange(0, ROWS) % GROUPS
    r = tl.arange(0, RANK)
    w = tl.load(kv_b + (head * (NOPE + V) + NOPE + v)[:, None] * RANK + r[None, :])
    if EARLY:
        gdc_wait()
    weight_at = weight + (b * H + head) * splits
    i = tl.arange(0, SPLITS)[None, :]
    heft = tl.load(weight_at[:, None] + i, mask=(b < batch)[:, None] & (i < splits), other=float("-inf"))
    parts = tl.sum((heft > float("-inf")).to(tl.int32), 1)
    # Padding has no part: 0.
    top = tl.where(parts > 0, tl.max(heft, 1), 0.0)
    total = tl.where(parts > 0, tl.sum(tl.exp2(heft - top[:, None]), 1), 1.0)
    seen = tl.zeros([ROWS, RANK], tl.float32)
    # Row after row, and part after part: a thread then has all parts of what it adds up.
    k = tl.arange(0, AT_ONCE * ROWS)
    b_at = tl.program_id(2) * BM + k % ROWS // GROUPS
    mean_at = mean + (b_at.to(tl.int64) * splits * H + head)[:, None] * RANK + r[None, :]
    for start in tl.range(0, tl.max(parts, 0), AT_ONCE * GROUPS, num_stages=1):
        j = start + tl.arange(0, AT_ONCE)[:, None] * GROUPS + group[None, :]
        lives = j < parts[None, :]
        share = tl.exp2(tl.load(weight_at[None, :] + j, mask=lives, other=float("-inf")) - top[None, :])
        part_at = (start + k // ROWS * GROUPS + k % GROUPS) * (H * RANK)
        lives = tl.reshape(lives, [AT_ONCE * ROWS])[:, None]
        some = tl.load(mean_at + part_at[:, None], mask=lives, other=0.0).to(tl.float32)
        some *= tl.reshape(share, [AT_ONCE * ROWS])[:, None]
        seen += tl.sum(tl.reshape(some, [AT_ONCE, ROWS, RANK]), 0)
    seen = (seen * (1.0 / total)[:, None]).to(DTYPE)
    if FIELDS > 1:
        seen = tl.reshape(tl.permute(tl.reshape(seen, [ROWS, FIELDS, RANK // FIELDS]), (0, 2, 1)), [ROWS, RANK])
    y = tl.sum(tl.reshape(tl.dot(w, tl.trans(seen)), [BV, BM, GROUPS]), 2)
    b = tl.program_id(2) * BM + tl.arange(0, BM)[None, :]
    tl.store(out + b.to(tl.int64) * (H * V) + head * V + v[:, None], y.to(DTYPE), mask=b < batch)
