"""Which tile a shape gets: a table, so that nothing is tuned at first use and results do not depend on the machine."""

from dataclasses import dataclass

from klquant.kernels.linear.layout import CHUNK, Packed, brick_inputs

# A block of sm86 or sm89 may use 99 KiB, and so may all that run on a multiprocessor together; what is left is the
# compiler's, for reductions and layouts.
SHARED_BYTES = 96 * 1024


@dataclass(frozen=True)
class Tile:
    """`rows` outputs × `tokens`, by `warps` warps.

    split > 1: bricks of one row shared among that many warps; scaled: codes are multiplied by their scales before the
    product, which rounds them.
    """

    rows: int
    tokens: int
    warps: int
    split: int
    stages: int
    scaled: bool = False

    @property
    def options(self) -> dict[str, int]:
        """As the kernels name it."""
        sizes = {"BN": self.rows, "BM": self.tokens, "SPLIT": self.split, "STAGES": self.stages}
        return sizes | {"num_warps": self.warps}


def make_tile(bits: int, rows: int, tokens: int, warps: int, split: int, stages: int, scaled: bool = False) -> Tile:
    """A tile with `stages` pipeline stages, or as many as shared memory holds."""
    weight = rows * CHUNK * (3 if bits == 3 else 2)
    stage = split * (weight + brick_inputs(bits) * tokens * 2)
    # The stage that is multiplied takes no buffer of its own, except, on Hopper, for the inputs that wgmma reads.
    return Tile(rows, tokens, warps, split, max(2, min(stages, 1 + SHARED_BYTES // stage)), scaled)


def most_tokens(w: Packed, split: int) -> int:
    """The most tokens a tile can have: the more scales a brick has, the more sums are alive, and registers spill."""
    scales = max(1, brick_inputs(w.bits) // w.group) if w.group else 1
    if split > 1:
        return 32 if scales < 8 else 16
    return 128 if scales == 1 and w.bits != 3 else 64 if scales < 8 else 32


def linear_tile(w: Packed, tokens: int, gated: bool, wgmma: bool) -> Tile:
    """The tile of y [tokens, N] on a card that has `wgmma` or not.

    Many rows are one tile after the other for a warp or two; where there are few, warps share a row's bricks.
    """
    rows = w.row_bricks * 16
    if tokens <= 8:
        if gated or rows >= 8192:
            return make_tile(w.bits, 32, 8, warps=2, split=1, stages=5)
        if rows >= 4608:
            return make_tile(w.bits, 32, 8, warps=2, split=2, stages=5)
        return make_tile(w.bits, 16, 8, warps=4, split=4, stages=5)
    if tokens <= most_tokens(w, 4):
        few = 16 if tokens <= 16 else 32
        if rows >= 8192:
            return make_tile(w.bits, 64, few, warps=4, split=1, stages=4)
        split = 2 if rows >= 4608 else 4
        return make_tile(w.bits, 32, few, split, split, stages=4)
    most = most_tokens(w, 1)
    if tokens <= 64 and rows < 4608:
        return make_tile(w.bits, 32, min(32, most_tokens(w, 4)), warps=4, split=4, stages=3)
    few_rows = rows < 8192 or w.row_bricks % 8
    if tokens <= 128 or most == 32 or (few_rows and not wgmma):
        return make_tile(w.bits, 64, min(64, most), warps=4, split=1, stages=4)
    if few_rows:
        return make_tile(w.bits, 64, most, warps=4, split=1, stages=3)
    return make_tile(w.bits, 128, min(64, most), warps=4, split=1, stages=4, scaled=w.bits < 16)


def parts_tile(w: Packed, tokens: int) -> tuple[Tile, int]:
    """A tile, and how many programs share its inputs: several where rows are few and long, or most processors would
    have nothing to do. Their sums are added up later."""
    if w.row_bricks * 16 >= 4608 or w.bricks < 32:
        return linear_tile(w, tokens, False, False), 1
    if tokens <= 8:
        return make_tile(w.bits, 32, 8, warps=2, split=2, stages=5), 3
    if tokens <= 16:
        return make_tile(w.bits, 32, 16, warps=2, split=1, stages=5), 6
    tile = make_tile(w.bits, 64, min(32 if tokens <= 32 else 64, most_tokens(w, 1)), warps=4, split=1, stages=4)
    return tile, 6 if tokens <= 64 else 2 if tokens <= 128 else 1
