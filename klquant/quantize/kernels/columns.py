"""The two sequential loops over columns, a block of columns at a time with a tile of rows in registers.

GPTQ's sweep and coordinate descent are one loop: every column takes the code nearest to `want = ŵ + r / m`, and what
that changes is pushed, through a row of a matrix M, onto `r` of the columns behind it.
  sweep:   M = R with H + λI = R Rᵀ, R upper. The loss is ‖(w − ŵ) R‖², so column j makes up for r_j = Σ_{i<j} d_i R_ij
           (d = w − ŵ) when ŵ_j is nearest to w_j + r_j / R_jj. This is GPTQ's update without inverting anything.
  descent: M = H, r = (w − ŵ) H, and column j moves to the code nearest to ŵ_j + r_j / H_jj.
r of a block is one batched product with d of all columns; inside the block the kernel keeps it up to date.
Shape suffixes as in `klquant.quantize.gptq`; here tensors are inputs first, so that a column is contiguous.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.quantize.factor import permute_both, upper_factor
from klquant.quantize.kernels.numeric import round_between

BLOCK = 128
# One warp a program: 128 columns × 32 rows are 128 registers a thread, and no barrier is ever needed.
ROWS = 32
# Experts worked on at once. It bounds the temporaries, and because it is fixed the batched products, and so the bytes,
# are the same however many experts a caller passes (in multiples of it).
EXPERTS = 32


def batches(count: int) -> Iterator[slice]:
    """Slices of at most EXPERTS experts."""
    return (slice(i, min(i + EXPERTS, count)) for i in range(0, count, EXPERTS))


@triton.jit
def _load_column(
    d, codes, matrix, scale, zero, j, column, group, count, n, k, rows, inside, columns, REVISE: tl.constexpr
):
    """Of the block's column j, which is `column` in the weight and of a `group`: d, scale, zero, and its code when
    revising; its row of the matrix, the next column's entry there, and the pivot."""
    x = tl.load(d + j * n + rows, mask=inside, other=0.0)
    s = tl.load(scale + group * n + rows, mask=inside, other=1.0)
    z = tl.load(zero + group * n + rows, mask=inside, other=0.0) if zero is not None else 0.0 * s
    code = tl.load(codes + column.to(tl.int64) * n + rows, mask=inside, other=0).to(tl.float32) if REVISE else 0.0 * s
    matrix += j * k
    push = tl.load(matrix + columns, mask=columns < count, other=0.0)
    onward = tl.load(matrix + j + 1, mask=j + 1 < count, other=0.0)
    return x, s, z, code, push, onward, tl.load(matrix + j)


@triton.jit
def _row(acc, columns, j):
    """Row j of `acc`; 0 past its end. Registers have no index: a product with a one-hot vector reads them."""
    return tl.sum(acc * tl.where(columns == j, 1.0, 0.0)[:, None], axis=0)


@triton.jit(do_not_specialize=["start", "count"])
def round_block(
    d, r, codes, matrix, order, group, scale, zero, change, start, count, n, k, groups, matrix_stride, order_stride,
    QMIN: tl.constexpr, QMAX: tl.constexpr, REVISE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Choose the codes of columns start … start + count of the order given, for ROWS rows of one expert.

    d [E, K, N] FP32 in that order: the weight on entry (sweep) or w − ŵ (REVISE); w − ŵ on return.
    r [E, BLOCK, N] FP32; codes [E, K, N] int8 in the weight's own order; matrix [E, K, K] FP32, rows and columns in the
    order given; order [E, K] int32, group [E, K] int32: of each of these columns; scale, zero [E, G, N] FP32;
    change [E, N]: what REVISE adds to each row's loss.
    """
    e = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    columns = tl.arange(0, BLOCK)
    d += (e * k + start) * n
    codes += e * k * n
    order += e * order_stride + start
    group += e * order_stride + start
    scale += e * groups * n
    if zero is not None:
        zero += e * groups * n
    matrix += e * matrix_stride + start * (k + 1)
    valid = (columns < count)[:, None] & inside[None, :]
    acc = tl.load(r + (e * BLOCK + columns[:, None]) * n + rows[None, :], mask=valid, other=0.0)
    moved = tl.zeros([ROWS], tl.float32)
    # A column waits for the one before it, and for nothing else that takes long: what it needs from memory was asked
    # for a step earlier (where it lies in the weight, two), its r but for the last change is read from the registers
    # before that change is known, and divisors are inverted meanwhile.
    second = tl.minimum(1, count - 1)
    column, coming, coming_group = tl.load(order), tl.load(order + second), tl.load(group + second)
    x, s, z, code, push, onward, pivot = _load_column(
        d, codes, matrix, scale, zero, 0, column, tl.load(group), count, n, k, rows, inside, columns, REVISE
    )
    r_j = _row(acc, columns, 0)
    # Two columns a turn: what a turn hands to the next is waited for at its end, here half as often.
    for j in tl.range(count, loop_unroll_factor=2):
        x_, s_, z_, code_, push_, onward_, pivot_ = _load_column(
            d, codes, matrix, scale, zero, tl.minimum(j + 1, count - 1), coming, coming_group, count, n, k, rows,
            inside, columns, REVISE,
        )  # fmt: skip
        third = tl.minimum(j + 2, count - 1)
        coming_, group_ = tl.load(order + third), tl.load(group + third)
        r_next = _row(acc, columns, j + 1)
        if REVISE:
            pivot = tl.maximum(pivot, 1e-20)
            old = (code - z) * s
        else:
            old = x
        want = old + r_j * (1.0 / pivot)
        steps = round_between(want * (1.0 / s), QMIN - z, QMAX - z)
        delta = old - steps * s
        acc = tl.fma(tl.broadcast_to(push[:, None], [BLOCK, ROWS]), tl.broadcast_to(delta[None, :], [BLOCK, ROWS]), acc)
        if REVISE:
            moved += delta * (2 * r_j + pivot * delta)
            tl.store(d + j * n + rows, x + delta, mask=inside)
        else:
            tl.store(d + j * n + rows, delta, mask=inside)
        tl.store(codes + column.to(tl.int64) * n + rows, (steps + z).to(tl.int8), mask=inside)
        r_j = tl.fma(tl.zeros_like(delta) + onward, delta, r_next)
        column, coming, coming_group = coming, coming_, group_
        x, s, z, code, push, onward, pivot = x_, s_, z_, code_, push_, onward_, pivot_
    if REVISE:
        total = tl.load(change + e * n + rows, mask=inside, other=0.0)
        tl.store(change + e * n + rows, total + moved, mask=inside)


def factors(h_EKK: Tensor, order_EK: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """R [E, K, K] of the damped Hessians in the order given, and the damping used [E]."""
    parts = [upper_factor(permute_both(h_EKK[part], order_EK[part]), damp) for part in batches(h_EKK.shape[0])]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([factor for factor, _ in parts]), torch.cat([used for _, used in parts])


def sweep(
    w_ENK: Tensor, factor_EKK: Tensor, order_EK: Tensor, scale_ENG: Tensor, zero_ENG: Tensor | None, spec: WeightSpec
) -> Tensor:
    """Codes int8 [E, N, K] of `klquant.quantize.gptq.sweep`, from R of `factors` (E = 1: shared)."""
    e, _, k = w_ENK.shape
    codes = torch.empty(w_ENK.shape, dtype=torch.int8, device=w_ENK.device)
    factor_EKK, order_EK = factor_EKK.expand(e, k, k), order_EK.expand(e, k)
    for part in batches(e):
        d = torch.take_along_dim(w_ENK[part].mT, order_EK[part].unsqueeze(-1), dim=-2).contiguous()
        zero = None if zero_ENG is None else zero_ENG[part]
        codes[part] = _run(d, factor_EKK[part], order_EK[part], scale_ENG[part], zero, spec).mT
    return codes


def descend(w_ENK: Tensor, h_EKK: Tensor, q: Quantized) -> Quantized:
    """`klquant.quantize.gptq.descend`: one round of coordinate descent, kept in the rows where it lowers the loss."""
    k, codes = w_ENK.shape[-1], torch.empty_like(q.codes)
    order = torch.arange(k, device=w_ENK.device).expand(w_ENK.shape[0], k)
    h_EKK = h_EKK.expand(w_ENK.shape[0], k, k)
    for part in batches(w_ENK.shape[0]):
        old = q[part]
        d = (w_ENK[part] - old.decode()).mT.contiguous()
        new = old.codes.mT.clone(memory_format=torch.contiguous_format)  # `contiguous` may return the codes themselves
        change = torch.zeros(d.shape[0], d.shape[-1], device=d.device)
        _run(d, h_EKK[part], order[part], old.scale, old.zero, q.spec, codes=new, change=change)
        codes[part] = torch.where((change < 0).unsqueeze(-1), new.mT, old.codes)
    return replace(q, codes=codes)


def _run(
    d_EKN: Tensor, matrix_EKK: Tensor, order_EK: Tensor, scale_ENG: Tensor, zero_ENG: Tensor | None, spec: WeightSpec,
    *, codes: Tensor | None = None, change: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All blocks in turn; `codes` [E, K, N] are revised in place when given, else made by a sweep."""
    revise = codes is not None
    e, k, n = d_EKN.shape
    codes = codes if revise else torch.empty(d_EKN.shape, dtype=torch.int8, device=d_EKN.device)
    if matrix_EKK.stride()[1:] != (k, 1):
        matrix_EKK = matrix_EKK.contiguous()
    order, scale = order_EK.to(torch.int32).contiguous(), scale_ENG.float().mT.contiguous()
    group = order // spec.width(k)
    zero = None if zero_ENG is None else zero_ENG.float().mT.contiguous()
    r = torch.zeros(e, BLOCK, n, device=d_EKN.device)
    for start in range(0, k, BLOCK):
        count = min(BLOCK, k - start)
        block = slice(start, start + count)
        # FP32 without TF32: r is a small difference of many terms, and its error moves codes.
        if revise:
            torch.bmm(matrix_EKK[:, block], d_EKN, out=r[:, :count])
        elif start:
            torch.bmm(matrix_EKK[:, :start, block].mT, d_EKN[:, :start], out=r[:, :count])
        with torch.cuda.device_of(d_EKN):
            round_block[(triton.cdiv(n, ROWS), e)](
                d_EKN, r, codes, matrix_EKK, order, group, scale, zero, change,
                start, count, n, k, spec.groups(k), matrix_EKK.stride(0), order.stride(0),
                QMIN=spec.qmin, QMAX=spec.qmax, REVISE=revise, BLOCK=BLOCK, ROWS=ROWS, num_warps=1,
            )  # fmt: skip
    return codes
