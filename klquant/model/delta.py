"""The gated delta rule of Kimi Delta Attention: one step, chunked, and flash-linear-attention's kernel.

    S_t = (I − β_t k_t k_tᵀ) diag(exp g_t) S_{t−1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t / √D

with q and k l2-normed here, unless they are `normed` already (arXiv 2510.26692). All three functions take
q, k, v [B, S, H, D], g [B, S, H, D] FP32 ≤ 0, β [B, S, H] FP32, state [B, H, D, D] (key × value) FP32 or None (zeros),
and return (o [B, S, H, D], state after the last position) in at least FP32; kda_chunk_fla's o has v's dtype.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.core.packages import is_installed
from klquant.kernels.kda.borders import Borders
from klquant.model.norm import l2_norm, widen

DeltaPath = Literal["step", "chunk", "chunk_fla"]

# Exponents below this are raised to it. e^-60 is nothing beside any state, and keeps products clear of denormal
# numbers, on which CPUs are 30 times slower.
FLOOR = -60.0
# Sequences × heads × chunks whose in-chunk part is done at once: enough to amortize the calls, little enough for cache.
SLAB = 16
# Heads of a sequence that a CPU thread takes at a time.
HEADS = 4
# Threads at work on several cards share fla's kernels, and Triton's tuner, even with nothing to choose, keeps what it
# is at in the kernel itself: a second thread makes the first one's arguments go away under it.
_ONE_CALLER = Lock()


def delta_path(device: torch.device, dtype: torch.dtype, length: int) -> DeltaPath:
    """Which function runs `length` positions of `dtype` activations on `device`.

    FP32 never takes fla's kernel, which multiplies in TF32.
    """
    if length == 1:
        return "step"
    half = dtype in (torch.bfloat16, torch.float16)
    return "chunk_fla" if device.type == "cuda" and half and has_fla() else "chunk"


def has_fla() -> bool:
    """Whether flash-linear-attention is installed."""
    return is_installed("fla")


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, *, normed: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the function that `delta_path` names."""
    run = {"step": kda_step, "chunk": kda_chunk, "chunk_fla": kda_chunk_fla}[delta_path(q.device, q.dtype, q.shape[1])]
    return run(q, k, v, g, beta, state, normed=normed)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, raw: Tensor, A_log: Tensor, dt_bias: Tensor, beta: Tensor, state: Tensor | None,
    borders: Borders | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`delta_rule` for q and k that are normed, from what g is made of: raw [B, S, H, D] as `log_decay` takes it.

    fla's kernel makes g itself, so that it is not written out. With borders the S positions are those of N sequences
    one behind the other, B is 1, and the state [N, H, D, D].
    """
    if delta_path(q.device, q.dtype, q.shape[1]) == "chunk_fla":
        how = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
        if borders:
            how |= {"cu_seqlens": borders.device, "cu_seqlens_cpu": borders.host}
        return kda_chunk_fla(q, k, v, raw, beta, state, normed=True, **how)
    if borders:
        each = [
            gated_delta_rule(
                *(x[:, a:b] for x in (q, k, v, raw)), A_log, dt_bias, beta[:, a:b],
                None if state is None else state[n : n + 1],
            )
            for n, (a, b) in enumerate(borders.spans)
        ]  # fmt: skip
        outs, states = zip(*each, strict=True)
        return torch.cat(outs, 1), torch.cat(states)
    g = log_decay(raw.flatten(-2), A_log, dt_bias).unflatten(-1, raw.shape[-2:])
    return delta_rule(q, k, v, g, beta, state, normed=True)


def log_decay(raw_BSF: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g = −exp(A_log) · softplus(raw + dt_bias): the log decay [B, S, F] of each state row, FP32, ≤ 0."""
    raw = widen(raw_BSF) + dt_bias
    return -A_log.exp().repeat_interleave(raw.shape[-1] // A_log.shape[0]) * F.softplus(raw)


def kda_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, *, normed: bool = False
) -> tuple[Tensor, Tensor]:
    """One position (S = 1)."""
    unit = widen if normed else l2_norm
    q, k, v, beta = (x[:, 0] for x in (unit(q), unit(k), widen(v), beta))  # [B, H, D], β [B, H]
    if state is None:
        state = q.new_zeros(*q.shape, v.shape[-1])
    state = state * g[:, 0].exp()[..., None]
    seen = torch.einsum("bhk,bhkv->bhv", k, state)
    state = state + (beta[..., None] * k)[..., None] * (v - seen)[..., None, :]
    o = torch.einsum("bhk,bhkv->bhv", q * q.shape[-1] ** -0.5, state)
    return o[:, None], state


def kda_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, *, chunk: int = 64,
    normed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence `chunk` positions (a power of two) at a time, in plain torch; differentiable.

    On a CPU a few heads of one sequence are a unit of work: they stay in a core's cache, and the units, not the
    thousands of small operations in them, are what threads share. The units do not depend on the number of threads.
    """
    B, _, H, D = q.shape
    b, h = (1, HEADS) if q.device.type == "cpu" else (B, H)
    if state is None:
        state = widen(q).new_zeros(B, H, D, D)
    units = [
        (*(x[i : i + b, :, j : j + h] for x in (q, k, v, g, beta)), state[i : i + b, j : j + h], chunk, normed)
        for i in range(0, B, b)
        for j in range(0, H, h)
    ]
    outs, states = zip(*_share(lambda unit: _scan(*unit), units), strict=True)
    return _reassemble(outs, 2, H), _reassemble(states, 1, H)


def _reassemble(units: tuple[Tensor, ...], dim: int, heads: int) -> Tensor:
    """Units in order of sequence, then head → one tensor with `heads` along `dim`."""
    per_row = -(-heads // units[0].shape[dim])
    return torch.cat([torch.cat(units[i : i + per_row], dim) for i in range(0, len(units), per_row)])


def _share(run: Callable, units: list) -> list:
    """[run(unit) for unit in units], by as many threads as torch is set to use. Autograd stays in one."""
    threads = torch.get_num_threads()
    if min(threads, len(units)) == 1 or torch.is_grad_enabled() or units[0][0].device.type != "cpu":
        return [run(unit) for unit in units]
    torch.set_num_threads(1)  # what new threads start with
    try:
        with ThreadPoolExecutor(min(threads, len(units))) as pool:
            return list(pool.map(torch.no_grad()(run), units))
    finally:
        torch.set_num_threads(threads)


def _scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int, normed: bool
) -> tuple[Tensor, Tensor]:
    """`kda_chunk` of one unit: `_within` does what needs no state, then the state goes from chunk to chunk."""
    B, S, H, D = q.shape
    chunk = min(chunk, 1 << (S - 1).bit_length())
    n = -(-S // chunk)
    rows = B * H

    def cut(x: Tensor) -> Tensor:
        # Padding has k = β = 0 and g = 0: it neither decays the state nor adds to it.
        x = F.pad(x, (0, 0, 0, 0, 0, n * chunk - S)).view(B, n, chunk, H, -1)
        return x.permute(1, 0, 3, 2, 4).reshape(n * rows, chunk, -1)

    unit = widen if normed else l2_norm
    inputs = [cut(x) for x in (unit(q) * D**-0.5, unit(k), widen(v), g, beta[..., None])]
    slab = max(1, SLAB // rows) * rows
    s = state.flatten(0, 1)
    outs = []
    for part in zip(*(x.split(slab) for x in inputs), strict=True):
        within = (x.split(rows) for x in _within(*part))
        for qk, attn, solve, v_beta, decay, k_rest in zip(*within, strict=True):
            from_state = (qk @ s).unflatten(1, (chunk, 2))
            update = solve @ (v_beta - from_state[:, :, 1])
            outs.append(from_state[:, :, 0] + attn @ update)
            s = s * decay[..., None] + k_rest.mT @ update
    o = torch.stack(outs).view(n, B, H, chunk, D).permute(1, 0, 3, 2, 4).reshape(B, n * chunk, H, D)
    return o[:, :S], s.view(B, H, D, D)


def _within(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What a chunk contributes, whatever state it starts from. q, k, v, g [N, c, D], β [N, c, 1].

    The decay from position s to t is exp of the sum of g over (s, t]. Written as exp(G_t − G_s) over cumulative sums it
    cancels, and as exp(G_t)·exp(−G_s) it overflows. Instead blocks are joined two and two: between a pair's left and
    right half every decay is exp(rest of the left half after s) · exp(right half up to t), two factors ≤ 1 that only
    ever add up non-positive numbers. Joining also inverts the triangular system:
    [[A, 0], [L, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ L A⁻¹, B⁻¹]].

    Returns q and β·k decayed from the chunk's start, rows alternating [N, 2c, D]; decayed q kᵀ [N, c, c];
    (I + decayed β k kᵀ)⁻¹ [N, c, c]; β·v [N, c, D]; the whole chunk's decay [N, D]; k decayed to its end [N, c, D].
    """
    N, c, D = k.shape
    qk = torch.stack([q, beta * k], 2)  # [N, c, 2, D]
    attn = (q * k).sum(-1)[..., None, None]  # blocks [N, c / m, m, m]
    solve = torch.ones_like(attn)
    until, after = g, torch.zeros_like(g)  # sums over the block up to and with t, and over its rest after t
    m = 1
    while m < c:
        pairs = c // (2 * m)
        until, after = until.view(N, pairs, 2, m, D), after.view(N, pairs, 2, m, D)
        left_k = k.view(N, pairs, 2, m, D)[:, :, 0] * _decay(after[:, :, 0])
        right = qk.view(N, pairs, 2, m, 2, D)[:, :, 1] * _decay(until[:, :, 1])[..., None, :]
        low = (right.view(N, pairs, 2 * m, D) @ left_k.mT).view(N, pairs, m, 2, m)
        attn = _join(attn, low[..., 0, :])
        halves = solve.unflatten(1, (pairs, 2))
        solve = _join(solve, -(halves[:, :, 1] @ low[..., 1, :] @ halves[:, :, 0]))
        left_sum, right_sum = until[:, :, :, -1:].unbind(2)
        until = torch.stack([until[:, :, 0], until[:, :, 1] + left_sum], 2).view(N, c, D)
        after = torch.stack([after[:, :, 0] + right_sum, after[:, :, 1]], 2).view(N, c, D)
        m *= 2
    decay = _decay(until)
    qk = (qk * decay[:, :, None]).view(N, 2 * c, D)
    return qk, attn[:, 0], solve[:, 0], beta * v, decay[:, -1], k * _decay(after)


def _decay(log: Tensor) -> Tensor:
    return log.clamp_min(FLOOR).exp()


def _join(blocks: Tensor, low: Tensor) -> Tensor:
    """Diagonal blocks [N, 2n, m, m] and what lies below each pair [N, n, m, m] → diagonal blocks [N, n, 2m, 2m]."""
    blocks = blocks.unflatten(1, (-1, 2))
    top = F.pad(blocks[:, :, 0], (0, low.shape[-1]))
    return torch.cat([top, torch.cat([low, blocks[:, :, 1]], -1)], -2)


def kda_chunk_fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, *, normed: bool = False,
    **how: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flash-linear-attention's Triton kernel; CUDA only. Its state is FP32, its products take q's dtype.

    `how`: its arguments for making g itself, and for sequences one behind the other.
    """
    from fla.ops.kda import chunk_kda

    from klquant.kernels.kda.fla import settle

    with _ONE_CALLER:
        if tuned := settle():
            warnings.warn(
                "this flash-linear-attention is not the one whose kernels klquant knows: it tunes "
                f"{', '.join(tuned)} at their first use, which takes a minute or two; fla-core 0.6.0 needs none of it",
                stacklevel=2,
            )
        return chunk_kda(
            q=q, k=k, v=v, g=g, beta=beta, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=not normed, **how,
        )  # fmt: skip
