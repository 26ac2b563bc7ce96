"""How the latents of a sequence are shared among programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """`tokens` latents at a time by `warps` warps, `stages` deep; a sequence in up to `splits` parts."""

    tokens: int
    warps: int
    stages: int
    splits: int


def decode_tile(batch: int, most_tokens: int, processors: int, shared_kib: int, wide: bool) -> Tile:
    raise NotImplementedError
