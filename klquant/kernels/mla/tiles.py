"""How the latents of a sequence are shared among programs: computed from sizes that do not change, nothing is tuned."""

from dataclasses import dataclass

# With more shared memory a block than sm80 has, 64 latents at a time fit beside the queries; 32 fit everywhere.
SM80_KIB = 163
# A program has a multiprocessor to itself, all registers are in use. More parts than needed cost more adding up: they
# must be finished sooner by more than a tenth.
WORTH = 1.1
MOST_TURNS = 4


@dataclass(frozen=True)
class Tile:
    """`tokens` latents at a time by `warps` warps; a sequence in up to `splits` parts."""

    tokens: int
    warps: int
    splits: int


def decode_tile(batch: int, most_tokens: int, processors: int, shared_kib: int) -> Tile:
    """Tile of `batch` sequences of up to `most_tokens` on a card of so many multiprocessors."""
    tokens = 64 if shared_kib > SM80_KIB else 32
    counts = [max(1, turns * processors // batch) for turns in range(1, MOST_TURNS + 1)]
    # Turns that the multiprocessors really take, each of 1 / splits of a sequence.
    cost = [-(-batch * splits // processors) / splits for splits in counts]
    splits = next(s for s, turns in zip(counts, cost, strict=True) if turns <= WORTH * min(cost))
    return Tile(tokens, 8, min(splits, -(-most_tokens // tokens)))
