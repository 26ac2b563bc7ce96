"""What benchmarks/kernels.py runs: shapes of Kimi-Linear-48B, random packed weights, tiles to try, FP64 to compare."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from klquant.core.grid import Quantized
from klquant.core.spec import WeightSpec
from klquant.kernels.card import has_wgmma
from klquant.kernels.linear.dispatch import QuantMLP, apply_linear
from klquant.kernels.linear.layout import Packed, interleave, pack, split_rows, values
from klquant.kernels.linear.tiles import Tile, linear_tile, make_tile
from klquant.kernels.moe.dispatch import QuantExperts, apply_experts
from klquant.kernels.moe.reference import experts as reference_experts
from klquant.kernels.moe.tiles import JOINED_TOKENS, joined_tiles, many_tiles, shares_launch

HIDDEN, INNER, EXPERTS, TOP = 2304, 1024, 256, 8
TOKENS = (1, 4, 16, 64, 512, 4096)
EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 2048, 4096, 8192)
# name → N, K, whether the rows are gate and up of an MLP
SHAPES = {
    "KDA q·k·v": (12288, 2304, False),
    "KDA, MLA o": (2304, 4096, False),
    "MLA q·kv_a": (6720, 2304, False),
    "shared gate·up": (2048, 2304, True),
    "shared down": (2304, 1024, False),
    "dense gate·up": (18432, 2304, True),
    "dense down": (2304, 9216, False),
    "head": (163840, 2304, False),
}
# Nobody asks for the logits of more positions at once.
HEAD_TOKENS = 64
LAYER = "experts, shared"


@dataclass(frozen=True)
class Case:
    """`tiles`: of the one or two kernels, or none for what the table says."""

    shape: str
    bits: int
    tokens: int
    tiles: tuple[Tile, ...] = ()


def random_weight(shape: tuple[int, ...], bits: int, device: str = "cuda") -> Quantized:
    """Random codes and scales, g128."""
    spec = WeightSpec(bits=bits)
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape, dtype=torch.int8, device=device)
    groups = (*shape[:-1], spec.groups(shape[-1]))
    scale = (0.5 + torch.rand(groups, device=device)) / (spec.qmax * shape[-1] ** 0.5)
    return Quantized(spec, codes, scale.bfloat16())


@cache
def linear_weight(shape: str, bits: int) -> Packed:
    n, k, gated = SHAPES[shape]
    if gated:
        return interleave(*(pack(random_weight((n // 2, k), bits)) for _ in "gu"))
    return pack(random_weight((n, k), bits))


@cache
def expert_weights(bits: int) -> QuantExperts:
    """INT`bits` experts, INT8 shared expert: as the recipes have it."""
    shared = QuantMLP(linear_weight("shared gate·up", 8), linear_weight("shared down", 8))
    gate_up = interleave(*(pack(random_weight((EXPERTS, INNER, HIDDEN), bits)) for _ in "gu"))
    return QuantExperts(gate_up, pack(random_weight((EXPERTS, HIDDEN, INNER), bits)), shared)


def copied(w: Packed, count: int) -> list[Packed]:
    return [w, *(w.map(torch.clone) for _ in range(count - 1))]


def inputs(case: Case) -> Tensor:
    k = HIDDEN if case.shape == LAYER else SHAPES[case.shape][1]
    return torch.randn(case.tokens, k, device="cuda").bfloat16()


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    """(weight, expert): TOP distinct experts a token, uniformly at random."""
    expert = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP).indices.int()
    return torch.rand(tokens, TOP, device="cuda") / TOP, expert


def run_linear(case: Case, x: Tensor, w: Packed) -> Tensor:
    from klquant.kernels.linear.triton import linear

    gated = SHAPES[case.shape][2]
    return linear(x, w, *case.tiles, gated=gated) if case.tiles else apply_linear(x, w, gated)


def run_experts(case: Case, x: Tensor, w: QuantExperts, weight: Tensor, expert: Tensor) -> Tensor:
    from klquant.kernels.moe.triton import combine, joined, many_tokens

    if not case.tiles:
        return apply_experts(w, x, weight, expert)
    beside = (w.shared.gate_up, w.shared.down) if shares_launch(w.shared, case.tiles) else None
    if case.tokens <= JOINED_TOKENS:
        return combine(joined(x, weight, expert, w.gate_up, w.down, beside, *case.tiles), x.dtype)
    apart = None if beside else w.shared(x)
    return combine(many_tokens(x, weight, expert, w.gate_up, w.down, beside, apart, *case.tiles), x.dtype)


def check(case: Case) -> float:
    """‖y − want‖ / ‖want‖ against FP64. What y is written to held NaN before."""
    torch.manual_seed(case.tokens)
    x = inputs(case)
    if case.shape == LAYER:
        return _check_experts(case, x)
    n, _, gated = SHAPES[case.shape]
    w = linear_weight(case.shape, case.bits)
    poison(case.tokens * n)
    y = run_linear(case, x, w)
    exact = values(w, torch.float32)
    parts = split_rows(exact, n // 2) if gated else (exact,)
    error = norm = 0.0
    for at in range(0, y.shape[1], 8192):
        first, *second = (x.double() @ part[at : at + 8192].double().T for part in parts)
        want = F.silu(first) * second[0] if gated else first
        error += (y[:, at : at + 8192].double() - want).square().sum().item()
        norm += want.square().sum().item()
    return (error / norm) ** 0.5


def _check_experts(case: Case, x: Tensor) -> float:
    w = expert_weights(case.bits)
    weight, expert = routing(case.tokens)
    poison(case.tokens * TOP * HIDDEN)
    y = run_experts(case, x, w, weight, expert)
    if not y.isfinite().all():
        return float("nan")
    some = torch.randperm(case.tokens, device="cuda")[:64]
    inputs_TC = x[some].double()
    want = reference_experts(inputs_TC, weight[some].double(), expert[some], w.gate_up, w.down)
    gate, up = split_rows(values(w.shared.gate_up, torch.float64), INNER)
    h = F.silu(inputs_TC @ gate.T) * (inputs_TC @ up.T)
    want = want + h @ values(w.shared.down, torch.float64).T
    return ((y[some].double() - want).norm() / want.norm()).item()


def poison(values_16: int) -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    blocks = [torch.full((values_16 // part + 1,), float("nan"), device="cuda").bfloat16() for part in (1, 2, 8)]
    torch.cuda.synchronize()
    del blocks


def linear_candidates(shape: str, bits: int, tokens: int) -> list[tuple[Tile, ...]]:
    """Tiles worth trying for a linear map, the table's first."""
    w, gated = linear_weight(shape, bits), SHAPES[shape][2]
    few = [(16 << i, 8, *warps) for i in range(3) for warps in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 8))]
    some = [(32 << i, t, *warps) for i in range(3) for t in (16, 32, 64) for warps in ((2, 1), (2, 2), (4, 1), (4, 4))]
    many = [(rows, t, warps, 1) for rows in (64, 128) for t in (32, 64, 128) for warps in (4, 8)]
    kinds = few if tokens <= 8 else some if tokens <= 64 else many
    tiles = [linear_tile(w, tokens, gated, has_wgmma(w.words))]
    for rows, t, warps, split in kinds:
        if w.row_bricks * 16 % rows == 0 and rows >= (32 if gated else 16) and (t == 8 or t < 2 * tokens):
            tiles += [make_tile(bits, rows, t, warps, split, stages) for stages in (3, 5)]
    return [(tile,) for tile in dict.fromkeys(tiles)]


def expert_candidates(bits: int, tokens: int) -> list[tuple[Tile, ...]]:
    """Pairs of tiles worth trying for a layer of experts, the table's first: one is varied at a time."""
    w = expert_weights(bits)
    few = tokens <= JOINED_TOKENS
    wgmma = has_wgmma(w.gate_up.words)
    both, share = (w.gate_up, w.down), tokens * TOP // EXPERTS
    table = joined_tiles(*both, tokens) if few else many_tiles(*both, share, wgmma)
    most = 8 if few else table[0].tokens * 2
    kinds = [(rows, warps, split) for rows in (32, 64, 128) for warps in (1, 2, 4, 8) for split in {1, warps}]
    pairs = [table]
    for t in (t for t in (8, 16, 32, 64, 128) if most // 4 <= t <= most):
        for rows, warps, split in kinds:
            for stages, scaled in product((3, 5), {False, t >= 32}):
                # The shared expert has 8 bits: whichever needs more shared memory says how many stages fit.
                tiles = (make_tile(b, rows, t, warps, split, stages, scaled) for b in (bits, 8))
                tile = min(tiles, key=lambda tile: tile.stages)
                alike = t == table[0].tokens and (not few or warps == table[0].warps)
                pairs += [(tile, table[1]), (table[0], tile)] if alike else [(tile, tile)]
    return list(dict.fromkeys(pairs))


def cases(
    only: str | None, tokens: tuple[int, ...] | None, sweep: bool, widths: tuple[int, ...] = (8, 4)
) -> list[Case]:
    """Everything, or the operation, the numbers of tokens and the bits of linear weights asked for."""
    found = []
    for shape in SHAPES if only != "experts" else ():
        for bits in widths if shape != "head" else set(widths) & {8}:
            for m in tokens or TOKENS:
                if shape != "head" or m <= HEAD_TOKENS:
                    tiles = linear_candidates(shape, bits, m) if sweep else [()]
                    found += [Case(shape, bits, m, tile) for tile in tiles]
    for m in (tokens or EXPERT_TOKENS) if only != "linear" else ():
        tiles = expert_candidates(4, m) if sweep else [()]
        found += [Case(LAYER, 4, m, pair) for pair in tiles]
    return found
