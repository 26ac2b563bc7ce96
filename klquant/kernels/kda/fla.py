"""flash-linear-attention's chunked delta rule, with its tiles chosen here instead of tuned.

Left alone fla tries 85 variants of six kernels when a process meets its first prompt, for a minute and a half,
and keeps on the disk what was best for that one. Of a short prompt all are alike, so that a first prompt of 20 tokens
can leave kernels that take half as long again for a long one; and two machines choose differently, so that sums differ.
"""

from functools import cache
from importlib import import_module

Choice = tuple[dict[str, int], int, int]  # what the kernel calls its tile, warps, stages

# The fastest for 4,096 tokens of 32 heads on an H100, which were the fastest, or 1 % slower, as an RTX 4090's code too.
# fla offers fewer to cards with less shared memory: there the first that it offers. The last two kernels, timed as an
# H100's code only, are for queries, keys and gates that are not made ready by klquant's own.
TILES: dict[str, tuple[Choice, ...]] = {
    "fla.ops.kda.gate:kda_gate_chunk_cumsum_vector_kernel": (({"BS": 64}, 4, 3), ({"BS": 32}, 4, 3)),
    "fla.ops.kda.chunk_intra_token_parallel:chunk_kda_fwd_kernel_intra_token_parallel": (({"BH": 2}, 1, 3),),
    "fla.ops.kda.chunk_intra:chunk_kda_fwd_kernel_inter_solve_fused": (({"BK": 32}, 1, 3),),
    "fla.ops.kda.wy_fast:recompute_w_u_fwd_kda_kernel": (({}, 4, 2),),
    "fla.ops.common.chunk_delta_h:chunk_gated_delta_rule_fwd_kernel_h_blockdim64": (
        ({"BV": 32}, 4, 3),
        ({"BV": 32}, 4, 2),
    ),
    "fla.ops.gla.chunk:chunk_gla_fwd_kernel_o": (({"BK": 64, "BV": 128}, 4, 2),),
    "fla.ops.utils.cumsum:chunk_local_cumsum_vector_kernel": (({"BS": 64}, 4, 3), ({"BS": 32}, 4, 3)),
    "fla.modules.norm.l2norm:l2norm_fwd_kernel": (({"BT": 16}, 4, 3),),
}


@cache
def settle() -> tuple[str, ...]:
    """Leave each kernel of `TILES` one tile, for all who use fla in this process. Returns the kernels that still tune,
    because this fla does not know them, or not with that tile.
    """
    return tuple(name.partition(":")[2] for name, choices in TILES.items() if not _choose(name, choices))


def _choose(name: str, choices: tuple[Choice, ...]) -> bool:
    module, _, kernel = name.partition(":")
    try:
        tuner = getattr(import_module(module), kernel)
    except (ImportError, AttributeError):
        return False
    # Around Triton's own kernel are its tuner and, around that, what works out constants.
    while not hasattr(tuner, "configs"):
        if not hasattr(tuner, "fn"):
            return False
        tuner = tuner.fn
    offered = {(*sorted(c.kwargs.items()), c.num_warps, c.num_stages): c for c in tuner.configs}
    wanted = ((*sorted(tile.items()), warps, stages) for tile, warps, stages in choices)
    found = next((offered[key] for key in wanted if key in offered), None)
    if found is not None:
        tuner.configs = [found]
    return found is not None
