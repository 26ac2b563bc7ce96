"""How the latents of a sequence are shared among programs: computed from sizes that do not change, nothing is tuned."""

from dataclasses import dataclass

# A program has a multiprocessor to itself, all registers are in use. More parts than needed cost more adding up: they
# must be finished sooner by more than a tenth.
WORTH = 1.1
MOST_TURNS = 4
# `hopper` takes 64 latents at a time, of so many values and more. The Triton kernel takes 32: products of 64 would be
# wgmma's, and ptxas 12.8, which Triton 3.6 and 3.7 bring along, puts wrong matrix descriptors into this kernel.
STAGED_RANK = 512


@dataclass(frozen=True)
class Tile:
    """`tokens` latents at a time by `warps` warps; a sequence in up to `splits` parts.

    early: a launch starts while the one before it still works, and waits for its results only when it has asked for
        what else it reads (programmatic dependent launch); of `staged` ones.
    staged: `klquant.kernels.mla.hopper`, a page at a time; Hopper only, latents of STAGED_RANK values and more.
    """

    tokens: int
    warps: int
    splits: int
    early: bool = False
    staged: bool = False

    def __str__(self) -> str:
        kind = (" early" if self.early else "") + (" staged" if self.staged else "")
        return f"{self.tokens}/{self.warps}/{self.splits}{kind}"


def decode_tile(batch: int, most_tokens: int, processors: int, staged: bool = False) -> Tile:
    """Tile of `batch` sequences of up to `most_tokens` on a card of so many multiprocessors."""
    tokens = 64 if staged else 32
    counts = [max(1, turns * processors // batch) for turns in range(1, MOST_TURNS + 1)]
    # Turns that the multiprocessors really take, each of 1 / splits of a sequence.
    cost = [-(-batch * splits // processors) / splits for splits in counts]
    splits = next(s for s, turns in zip(counts, cost, strict=True) if turns <= WORTH * min(cost))
    return Tile(tokens, 8, min(splits, -(-most_tokens // tokens)), early=staged, staged=staged)
