"""The hub's `tiktoken.model`: Kimi's byte-pair ranks, read without the checkpoint's remote code.

The file has one `base64(token bytes) rank` pair a line. Special tokens follow the ranks: 256 ids, named by
`added_tokens_decoder` of `tokenizer_config.json`, the rest reserved. Text is split by Kimi's pattern, in which runs of
Han characters stand apart from other letters; then each piece is merged by rank with the `tiktoken` package.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from klquant.errors import UserError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
NUM_SPECIAL = 256

# Kimi encodes at most this many characters at once, and cuts runs without (or of nothing but) white space. The cuts
# fall between tokens, so they belong to the format: other limits would give other ids.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class TiktokenBPE:
    """Byte-pair encoding by ranks. `special`: token text → id, only the ones that have a name."""

    def __init__(self, file: Path, special: Mapping[str, int]) -> None:
        """Read `file`. Raises UserError naming the line that is corrupt, or the special id that clashes with a rank."""
        import tiktoken

        ranks = read_ranks(file)
        for text, token_id in special.items():
            if token_id < len(ranks):
                raise UserError(
                    f"{file}: special token {text!r} has id {token_id}, which is a rank of this file "
                    f"({len(ranks)} ranks); tokenizer_config.json belongs to another tokenizer"
                )
        named = set(special.values())
        unnamed = [i for i in range(len(ranks), len(ranks) + NUM_SPECIAL) if i not in named]
        reserved = {f"<|reserved_token_{i}|>": i for i in unnamed}
        self.special = dict(special)
        self.vocab_size = max([len(ranks) - 1, *named]) + 1
        self._named = frozenset(special)
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=reserved | self.special
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the names of special tokens in it are ordinary text."""
        return [i for piece in split_overlong(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_special(self, text: str) -> list[int]:
        """Ids of `text`; the names of special tokens in it become their ids."""
        return [
            i
            for piece in split_overlong(text)
            for i in self._encoding.encode(piece, allowed_special=self._named, disallowed_special=())
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))

    def token_id(self, text: str) -> int | None:
        return self.special.get(text)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes → rank. The ranks must be 0 … n−1, each once, with every single byte among the tokens."""
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            try:
                encoded, rank = fields
                token, rank = base64.b64decode(encoded, validate=True), int(rank)
            except (ValueError, binascii.Error):
                raise UserError(f"{file}: line {number} is not 'base64-token rank'; download the file again") from None
            if not token or token in ranks or rank in seen or rank < 0:
                raise UserError(f"{file}: line {number} repeats or empties a token or rank; download the file again")
            ranks[token] = rank
            seen.add(rank)
    if not ranks:
        raise UserError(f"{file}: no tokens in it; download the file again")
    if max(seen) != len(ranks) - 1:
        raise UserError(
            f"{file}: {len(ranks)} tokens but ranks up to {max(seen)}: lines are missing; download it again"
        )
    missing = next((b for b in range(256) if bytes([b]) not in ranks), None)
    if missing is not None:
        raise UserError(f"{file}: byte 0x{missing:02x} is not among the tokens, so not every text can be encoded")
    return ranks


def split_overlong(text: str) -> Iterator[str]:
    """Cut `text` where Kimi's tokenizer does: every MAX_CHARS, and every MAX_RUN within a run of (non-)white space."""
    for start in range(0, len(text), MAX_CHARS):
        part = text[start : start + MAX_CHARS]
        last = 0
        for run in _RUN.finditer(part) if len(part) > MAX_RUN else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[last:cut]
                last = cut
        yield part[last:]
