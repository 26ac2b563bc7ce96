"""Which tiles a batch of routes gets: as in `klquant.kernels.linear.tiles`, a table."""

from klquant.kernels.linear.dispatch import QuantMLP
from klquant.kernels.linear.layout import Packed
from klquant.kernels.linear.tiles import Tile, few_split, make_tile, most_tokens

# Up to here a program a route reads no more than the experts' distinct weights take (mostly), and nothing is sorted.
FEW_TOKENS = 8


def few_tiles(gate_up: Packed, down: Packed, shared: QuantMLP | None) -> tuple[Tile, Tile]:
    """Tiles of the two kernels without sorting. Routed and shared programs share a launch, and so a tile.

    The 18 bricks that 2304 inputs are in INT4 leave a quarter of eight warps' last turn idle, and a tenth of four's.
    """
    beside = (gate_up, down) if shared is None else (shared.gate_up, shared.down)
    split = min(few_split(w.bits) for w in (down, beside[1]))
    tiles = []
    for rows, warps, pair in ((32, 4, (gate_up, beside[0])), (16, split, (down, beside[1]))):
        candidates = (make_tile(w.bits, rows, FEW_TOKENS, warps, warps) for w in pair)
        tiles.append(min(candidates, key=lambda tile: tile.stages))
    return tuple(tiles)


def many_tiles(gate_up: Packed, down: Packed, routes: int) -> tuple[Tile, Tile]:
    """Tiles of the two grouped kernels, for as many tokens as an expert gets on average. Both have as many tokens."""
    share, both = routes // gate_up.experts, (gate_up, down)
    if share <= 32:
        wanted = 8 if share <= 2 else 16 if share <= 8 else 32
        tokens = min(wanted, *(most_tokens(w, 4) for w in both))
        split = 8 if tokens == 8 else 4
        return tuple(make_tile(w.bits, 32, tokens, warps=split, split=split) for w in both)
    tokens = min(64 if share <= 256 else 128, *(most_tokens(w, 1) for w in both))
    if tokens == 32:
        return tuple(make_tile(w.bits, 64, tokens, warps=4, split=1) for w in both)
    return tuple(make_tile(w.bits, 128 if w.row_bricks % 8 == 0 else 64, tokens, warps=8, split=1) for w in both)
