"""Which tiles a batch of routes gets: as in `klquant.kernels.linear.tiles`, a table."""

from dataclasses import dataclass

from klquant.kernels.linear.dispatch import QuantMLP
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile, make_tile, most_tokens

# Up to here hardly two tokens meet at an expert: each route is a tile, and nothing is sorted.
UNSORTED_TOKENS = 4
# Up to here both halves of the experts' work are one launch: of longer ones a launch more is nothing.
JOINED_TOKENS = 32
# Up to here the router is one launch with the norm before it.
NORM_ROUTER_TOKENS = 4
# For more tokens the router's logits are a matrix product, which is cuBLAS's in FP32.
ROUTER_TOKENS = 64


@dataclass(frozen=True)
class RouterTile:
    """A program of the router has the logits of `experts` for `tokens`, `columns` inputs at a time."""

    experts: int
    tokens: int
    columns: int
    warps: int

    def options(self, width: int) -> dict[str, int]:
        """As the kernels name it."""
        sizes = {"BE": self.experts, "BT": self.tokens, "BC": self.columns, "CHUNKS": -(-width // self.columns)}
        return sizes | {"EACH": min(4, self.columns // (32 * self.warps)), "num_warps": self.warps}


# More experts in a program would read the tokens less often; fewer tokens let each have a warp that chooses.
ROUTER_TILE = RouterTile(4, 4, 512, 4)


def norm_router_tile(tokens: int) -> RouterTile:
    """Behind the norm of few tokens, in one launch with it."""
    return RouterTile(2, 1 << (tokens - 1).bit_length(), 512, 4)


def joined_tiles(gate_up: Packed, down: Packed, tokens: int) -> tuple[Tile, Tile]:
    """Tiles of the two halves of one launch, alike in tokens and warps: one token's leave room for more warps each."""
    warps, *stages = (4, 5, 5) if tokens == 1 else (2, 5, 3)
    return tuple(make_tile(w.bits, 64, 8, warps, 1, n) for w, n in zip((gate_up, down), stages, strict=True))


def many_tiles(gate_up: Packed, down: Packed, share: int, wgmma: bool) -> tuple[Tile, Tile]:
    """Tiles of the two grouped kernels, for `share` tokens, which an expert gets on average. Both have as many
    tokens."""
    both = gate_up, down
    rows, wanted, warps, stages, scaled = (
        (64, 8, 2, 3, False) if share <= 4 else
        (64, 16, 4, 3, False) if share <= 8 else
        (128, 32, 4, 4, False) if share <= 48 else
        (128, 64, 4, 3, False) if share <= 96 or not wgmma else
        (128, 128, 4, 3, True)
    )  # fmt: skip
    most = 128 if scaled else min(most_tokens(w, 1) for w in both)
    tokens = min(wanted, most)
    if tokens == 64 and most < 128:
        warps = 8  # several scales a brick: more sums to hold
    rows = min(rows, *(64 if w.row_bricks % 8 else 128 for w in both))
    first, second = (make_tile(w.bits, rows, tokens, warps, 1, stages, scaled and w.bits < 16) for w in both)
    if share <= 4 and not gate_up.row_bricks % 8:
        # Its rows are long and many: twice as many a program, more of them on their way.
        first = make_tile(gate_up.bits, 128, tokens, 4, 1, 5)
    return first, second


def shares_launch(shared: QuantMLP, tiles: tuple[Tile, Tile]) -> bool:
    """Whether the shared expert runs in the launches of the grouped kernels: where their tiles suit few tokens."""
    return tiles[0].tokens <= 32 and all(
        w.row_bricks * 16 % tile.rows == 0 for w, tile in zip((shared.gate_up, shared.down), tiles, strict=True)
    )
