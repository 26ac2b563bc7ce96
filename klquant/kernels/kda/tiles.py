"""How the states of a step are shared among programs: written down, so that nothing is tuned at first use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A head's state in `splits` programs, two or more, of `warps` warps, each with as many of its columns.

    early: the states are fetched while what they will meet is still being computed (programmatic dependent launch,
    which a card has from compute capability 9.0 on).
    """

    splits: int
    warps: int
    early: bool = False


def decode_tile(early: bool) -> Tile:
    """The tile of a card that can start launches early or not, for any number of sequences.

    Quarters of a state: one sequence is work for 128 multiprocessors, and of many sequences seven programs fit on each,
    so that some compute or wait for each other while others load. Of 128 × 128 values a thread has 32: nothing spills.
    """
    return Tile(4, 4, early=early)
