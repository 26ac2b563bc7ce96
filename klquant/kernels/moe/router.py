"""The router: logits in FP32, sigmoid, correction bias, the best R experts, renormalize, scale.

Few tokens: one launch, behind the norm's or together with it. A program has the logits of some experts for a tile of
tokens; the last program of a tile, which finds in `turn` that all others are through, chooses. Whoever is last reads
the same logits: the same bits every time.
Many tokens: the logits are cuBLAS's, and one launch chooses.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from klquant.kernels.moe.tiles import ROUTER_TILE, ROUTER_TOKENS, RouterTile, norm_router_tile
from klquant.kernels.norm.parts import Parts
from klquant.kernels.norm.triton import addends, columns, norm_product, sum_and_norm

# Tokens of a program that only chooses: each has a warp.
CHOOSE_TOKENS = 4
# Among int32 keys of choices: below every number, −∞ included.
NEVER = tl.constexpr(-(1 << 31))


@triton.jit
def in_parts(bias, experts, PARTS: tl.constexpr):
    """bias [E] as PARTS of [1, 32]."""
    parts = ()
    for i in tl.static_range(PARTS):
        e = i * 32 + tl.arange(0, 32)[None, :]
        parts = parts + (tl.load(bias + e, mask=e < experts, other=0.0),)  # noqa: RUF005
    return parts


@triton.jit
def choose(
    logits, bias, weight, expert, t, tokens, experts, top, scale,
    RENORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight, expert [T, top] of the tokens t [BT] from logits [T, E]; E ≤ 32 · PARTS.

    Among equals the lower index wins; a NaN is as good as none. 32 experts at a time, so that a token's are within one
    warp, which waits for no other; keys are integers ordered like the choices, for which cards have reductions.
    """
    exists = (t < tokens)[:, None]
    row = t.to(tl.int64)[:, None] * experts
    lane = tl.arange(0, 32)[None, :]
    z, keys, scores = (), (), ()
    for i in tl.static_range(PARTS):
        inside = exists & (i * 32 + lane < experts)
        # Other programs wrote them: not what the L1 cache may have.
        z = z + (tl.load(logits + row + i * 32 + lane, mask=inside, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    for i in tl.static_range(PARTS):
        score = tl.sigmoid(z[i])
        choice = score + bias[i]
        ordered = choice.to(tl.int32, bitcast=True)
        ordered = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        keys = keys + (tl.where((i * 32 + lane < experts) & (choice == choice), ordered, NEVER),)  # noqa: RUF005
        scores = scores + (score.to(tl.int32, bitcast=True),)  # noqa: RUF005
    r = tl.arange(0, BLOCK_R)[None, :]
    weights = tl.zeros([t.shape[0], BLOCK_R], tl.float32)
    chosen = tl.zeros([t.shape[0], BLOCK_R], tl.int32)
    # Not unrolled: only the last program comes here, and fetches what it runs from afar.
    for k in range(top):
        highest = keys[0]
        for i in tl.static_range(1, PARTS):
            highest = tl.maximum(highest, keys[i])
        highest = tl.max(highest, 1, keep_dims=True)
        best = tl.where(keys[0] == highest, lane, 32 * PARTS)
        for i in tl.static_range(1, PARTS):
            best = tl.minimum(best, tl.where(keys[i] == highest, i * 32 + lane, 32 * PARTS))
        best = tl.min(best, 1, keep_dims=True)
        # All but one are 0: the bits of that one.
        bits = tl.where(lane == best, scores[0], 0)
        others = (tl.where(lane == best, NEVER, keys[0]),)
        for i in tl.static_range(1, PARTS):
            bits = bits | tl.where(i * 32 + lane == best, scores[i], 0)
            others = others + (tl.where(i * 32 + lane == best, NEVER, keys[i]),)  # noqa: RUF005
        keys = others
        value = tl.xor_sum(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)
        weights = tl.where(r == k, value, weights)
        chosen = tl.where(r == k, best, chosen)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 1, keep_dims=True) + 1e-20)
    at = t.to(tl.int64)[:, None] * top + r
    tl.store(weight + at, weights * scale, mask=exists & (r < top))
    tl.store(expert + at, chosen, mask=exists & (r < top))


# Whether their number is a multiple of 16 helps nothing here, and would be one more kernel to build.
@triton.jit(do_not_specialize_on_alignment=["tokens"])
def choose_kernel(
    logits, bias, weight, expert, tokens, experts, top, scale,
    RENORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BT tokens,)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    parts = in_parts(bias, experts, PARTS)
    choose(logits, parts, weight, expert, t, tokens, experts, top, scale, RENORMALIZE, PARTS, BLOCK_R)


@triton.jit
def finish(
    acc, logits, bias, weight, expert, turn, tokens, experts, top, scale,
    RENORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program's logits acc [BE, BT] → `logits`; the last program of a tile of tokens chooses for it."""
    BE: tl.constexpr = acc.shape[0]
    BT: tl.constexpr = acc.shape[1]
    # A warp for each token, even if some have none.
    CHOOSING: tl.constexpr = BT if BT > 4 else 4
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    first = tl.program_id(1) * BT
    last = tl.minimum(first + BT, tokens)
    t = first + tl.arange(0, BT)
    at = t.to(tl.int64)[None, :] * experts + e[:, None]
    # All do what only the last one needs, for it must not wait.
    parts = in_parts(bias, experts, PARTS)
    tl.store(logits + at, acc, mask=(e < experts)[:, None] & (t < last)[None, :])
    tl.debug_barrier()
    if tl.atomic_add(turn + tl.program_id(1), 1, sem="acq_rel") == tl.num_programs(0) - 1:
        chooses = first + tl.arange(0, CHOOSING)
        choose(logits, parts, weight, expert, chooses, last, experts, top, scale, RENORMALIZE, PARTS, BLOCK_R)


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def router_kernel(
    x, x_stride, norm, router, bias, logits, weight, expert, turn, tokens, experts, width, eps, top, scale,
    BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr, EACH: tl.constexpr,
    RENORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """logits [T, E] = (x / rms(x) · norm) · routerᵀ in IEEE FP32, and who is chosen.

    Grid (tiles of BE experts, tiles of BT tokens).
    """
    # All are [BE, BT, BC], of which a weight or a token has one: alike in registers, so that nothing moves.
    e = (tl.program_id(0) * BE + tl.arange(0, BE))[:, None, None]
    t = (tl.program_id(1) * BT + tl.arange(0, BT))[None, :, None]
    c = columns(BC, EACH)
    w = ()
    for i in tl.static_range(CHUNKS):
        inside = (i * BC + c < width) & (e < experts)
        w = w + (tl.load(router + e * width + i * BC + c, mask=inside, other=0.0),)  # noqa: RUF005
    # Products are added up where they are made, and meet once.
    acc = tl.zeros([BE, BT, BC], tl.float32)
    squares = tl.zeros([1, BT, BC], tl.float32)
    for i in tl.static_range(CHUNKS):
        inside = (i * BC + c < width) & (t < tokens)
        y = tl.load(x + t.to(tl.int64) * x_stride + i * BC + c, mask=inside, other=0.0).to(tl.float32)
        squares += y * y
        acc += w[i] * (y * tl.load(norm + i * BC + c, mask=i * BC + c < width, other=0.0).to(tl.float32))
    product = tl.sum(acc, 2) * tl.rsqrt(tl.sum(squares, 2) / width + eps)
    finish(
        product, logits, bias, weight, expert, turn, tokens, experts, top, scale, RENORMALIZE, PARTS, BLOCK_R
    )  # fmt: skip


@triton.jit
def norm_router_kernel(
    h, h_stride, delta, delta_stride, norm, router, bias, total, normed, logits, weight, expert, turn, tokens, experts,
    width, eps, top, scale,
    ROWS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr, EACH: tl.constexpr,
    RENORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same behind the norm of BT tokens, which each program makes; grid (tiles of BE experts, 1)."""
    acc = norm_product(
        h, h_stride, delta, delta_stride, norm, router, total, normed, tokens, width, experts, eps,
        ROWS, BE, BT, BC, CHUNKS, EACH,
    )  # fmt: skip
    finish(
        acc, logits, bias, weight, expert, turn, tokens, experts, top, scale, RENORMALIZE, PARTS, BLOCK_R
    )  # fmt: skip


def route(logits_TE: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    """FP32 logits [T, E] and bias [E] → (weight [T, R] FP32, expert [T, R] int32), best first."""
    tokens, experts = logits_TE.shape
    weight, expert = _routes(tokens, top, bias_E.device)
    choose_kernel[(triton.cdiv(tokens, CHOOSE_TOKENS),)](
        logits_TE, bias_E, weight, expert, tokens, experts, top, scale,
        **_constants(experts, top, renormalize), BT=CHOOSE_TOKENS, num_warps=CHOOSE_TOKENS,
    )  # fmt: skip
    return weight, expert


def route_tokens(
    x_TC: Tensor, router_EC: Tensor, bias_E: Tensor, top: int, scale: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """cuBLAS's logits, and a launch that chooses."""
    return route(F.linear(x_TC.float(), router_EC), bias_E, top, scale, renormalize)


def route_normed(
    total_TC: Tensor, normed_TC: Tensor, norm_C: Tensor, eps: float, router_EC: Tensor, bias_E: Tensor, top: int,
    scale: float, renormalize: bool, turn_T: Tensor, tile: RouterTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`route_tokens` of a norm. For few tokens one launch, which makes the norm again of what that was made of."""
    (tokens, width), experts = total_TC.shape, len(router_EC)
    if tokens > ROUTER_TOKENS:
        return route_tokens(normed_TC, router_EC, bias_E, top, scale, renormalize)
    tile = tile or ROUTER_TILE
    weight, expert = _routes(tokens, top, total_TC.device)
    logits = torch.empty(tokens, experts, device=total_TC.device, dtype=torch.float32)
    router_kernel[(triton.cdiv(experts, tile.experts), triton.cdiv(tokens, tile.tokens))](
        total_TC, total_TC.stride(0), norm_C, router_EC, bias_E, logits, weight, expert, turn_T, tokens, experts, width,
        eps, top, scale, **_constants(experts, top, renormalize), **tile.options(width),
    )  # fmt: skip
    return weight, expert


def add_rms_norm_route(
    h_TC: Tensor, delta_TC: Tensor | Parts | None, norm_C: Tensor, eps: float, router_EC: Tensor, bias_E: Tensor,
    top: int, scale: float, renormalize: bool, turn_T: Tensor, tile: RouterTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(h + delta, its norm, weight, expert) of few tokens in one launch. Parts have nothing beside them."""
    (tokens, width), experts = h_TC.shape, len(router_EC)
    weight, expert = _routes(tokens, top, h_TC.device)
    logits = torch.empty(tokens, experts, device=h_TC.device, dtype=torch.float32)
    total, normed = sum_and_norm(h_TC, delta_TC, norm_C.dtype)
    delta, delta_stride, delta_rows, _ = addends(delta_TC)
    tile = tile or norm_router_tile(tokens)
    assert tile.tokens >= tokens, "a program has all tokens"
    norm_router_kernel[(triton.cdiv(experts, tile.experts), 1)](
        h_TC, h_TC.stride(0), delta, delta_stride, norm_C, router_EC, bias_E, total, normed, logits, weight, expert,
        turn_T, tokens, experts, width, eps, top, scale, ROWS=delta_rows,
        **_constants(experts, top, renormalize), **tile.options(width),
    )  # fmt: skip
    return h_TC if total is None else total, normed, weight, expert


def _routes(tokens: int, top: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """weight and expert [T, R], to be filled."""
    weight = torch.empty(tokens, top, device=device, dtype=torch.float32)
    return weight, torch.empty(tokens, top, device=device, dtype=torch.int32)


def _constants(experts: int, top: int, renormalize: bool) -> dict[str, int]:
    return {
        "RENORMALIZE": renormalize, "PARTS": triton.cdiv(experts, 32),
        "BLOCK_R": triton.next_power_of_2(top),
    }  # fmt: skip
