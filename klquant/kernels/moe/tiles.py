"""Which tiles a batch of routes gets: as in `klquant.kernels.linear.tiles`, a table."""

from dataclasses import dataclass

from klquant.kernels.linear.dispatch import QuantMLP
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile, make_tile, most_tokens

# Up to here a program a route reads about what the experts' distinct weights take, and sorting would cost more.
FEW_TOKENS = 4
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


def norm_router_tile(tokens: int) -> RouterTile:
    """Behind the norm of few tokens, in one launch with it."""
    return RouterTile(2, 1 << (tokens - 1).bit_length(), 512, 4)


def router_tile(tokens: int) -> RouterTile:
    """More experts in a program read the tokens less often, which few tokens leave too few programs for."""
    return RouterTile(2, 8, 512, 4) if tokens <= 8 else RouterTile(4, 8, 512, 8)


def few_tiles(gate_up: Packed, down: Packed, shared: QuantMLP | None, top: int) -> tuple[Tile, Tile]:
    """Tiles of the two kernels without sorting. Routed and shared programs share a launch, and so a tile.

    In the second a warp or more has a route of its own.
    """
    beside = (None, None) if shared is None else (shared.gate_up, shared.down)
    split = max(8, 1 << (top - 1).bit_length())
    return (
        _tile(32, 8, 2, 1, 5, gate_up, beside[0]),
        _tile(32, 8, split, split, 3, down, beside[1]),
    )


def many_tiles(gate_up: Packed, down: Packed, routes: int, wgmma: bool) -> tuple[Tile, Tile]:
    """Tiles of the two grouped kernels, for as many tokens as an expert gets on average. Both have as many tokens."""
    share, both = routes // gate_up.experts, (gate_up, down)
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


def _tile(rows: int, tokens: int, warps: int, split: int, stages: int, *weights: Packed | None) -> Tile:
    """One tile for weights of several widths of codes: whichever needs more shared memory says how many stages fit."""
    tiles = (make_tile(w.bits, rows, tokens, warps, split, stages) for w in weights if w is not None)
    return min(tiles, key=lambda tile: tile.stages)


def shares_launch(shared: QuantMLP, tiles: tuple[Tile, Tile]) -> bool:
    """Whether the shared expert runs in the launches of the grouped kernels: where their tiles suit few tokens."""
    return tiles[0].tokens <= 32 and all(
        w.row_bricks * 16 % tile.rows == 0 for w, tile in zip((shared.gate_up, shared.down), tiles, strict=True)
    )
