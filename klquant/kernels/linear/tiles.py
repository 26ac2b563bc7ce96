"""Which tile a shape gets: a table, so that nothing is tuned at first use and results do not depend on the machine."""

from dataclasses import dataclass

from klquant.kernels.linear.layout import CHUNK, Packed, brick_inputs

# A block of sm86 or sm89 may use 99 KiB, and so may all that run on a multiprocessor together. Narrow tiles hide
# latency with two blocks beside each other. What is left is the compiler's, for reductions and layouts.
WIDE_BYTES, NARROW_BYTES = 96 * 1024, 48 * 1024
MOST_STAGES = 4


@dataclass(frozen=True)
class Tile:
    """`rows` outputs × `tokens`, by `warps` warps; `split` > 1: bricks of one row shared among that many warps."""

    rows: int
    tokens: int
    warps: int
    split: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As the kernels name it."""
        sizes = {"BN": self.rows, "BM": self.tokens, "SPLIT": self.split, "STAGES": self.stages}
        return sizes | {"num_warps": self.warps}


def make_tile(bits: int, rows: int, tokens: int, warps: int, split: int) -> Tile:
    """A tile with as many pipeline stages as shared memory holds, MOST_STAGES at most."""
    weight = rows * CHUNK * (3 if bits == 3 else 2)
    stage = split * (weight + brick_inputs(bits) * tokens * 2)
    # The stage that is multiplied takes no buffer of its own, except, on Hopper, for the inputs that wgmma reads.
    stages = 1 + (NARROW_BYTES if split > 1 else WIDE_BYTES) // stage
    return Tile(rows, tokens, warps, split, min(max(stages, 2), MOST_STAGES))


def most_tokens(w: Packed, split: int) -> int:
    """The most tokens a tile can have: the more scales a brick has, the more sums are alive, and registers spill."""
    scales = max(1, brick_inputs(w.bits) // w.group) if w.group else 1
    if split > 1:
        return 32 if scales < 8 else 16
    return 128 if scales == 1 and w.bits != 3 else 64 if scales < 8 else 32


def few_split(bits: int) -> int:
    """Warps that share a row when there are few tokens; INT3's bricks are large, and fewer fit in shared memory."""
    return 4 if bits == 3 else 8


def linear_tile(w: Packed, tokens: int, gated: bool) -> Tile:
    """The tile of y [tokens, N]."""
    if tokens <= 8:
        return make_tile(w.bits, 32 if gated else 16, 8, few_split(w.bits), few_split(w.bits))
    if tokens <= most_tokens(w, 4):
        return make_tile(w.bits, 32, 16 if tokens <= 16 else 32, warps=4, split=4)
    if tokens <= 128 or most_tokens(w, 1) == 32:
        return make_tile(w.bits, 64, 32, warps=4, split=1)
    return make_tile(w.bits, 128 if w.row_bricks % 8 == 0 else 64, most_tokens(w, 1), warps=8, split=1)
