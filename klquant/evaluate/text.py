"""Evaluation text: the first windows of each domain, exactly as calibration cuts them.

Shape suffixes of `klquant.evaluate`: W = windows, S = positions of a window, V = vocabulary, L = layers, P = positions
sampled from a window; the rest as in `klquant.model`.
"""

import hashlib
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from klquant.calibrate.documents import require_readable, resolve_sources
from klquant.calibrate.tokenizer import Tokenizer
from klquant.calibrate.windows import Consumed, as_tensor, iter_windows
from klquant.errors import UserError

SEED = 0  # the order of a public dataset's rows; files keep theirs
DATA = "--data"


@dataclass(frozen=True)
class Domain:
    """A source of text and what was taken of it: `windows` of it are scored, `tokens` were encoded for them."""

    name: str
    origin: str
    documents: int
    tokens: int
    windows: int


@dataclass(frozen=True)
class EvalText:
    """ids int64 [W, S], domain after domain; sha256 (hex) covers ids and the domains' names, not where files lie."""

    ids_WS: Tensor
    domains: tuple[Domain, ...]
    sha256: str
    notes: tuple[str, ...]

    def windows_of(self) -> dict[str, range]:
        """Each domain's rows of `ids_WS`."""
        starts = [sum(d.windows for d in self.domains[:i]) for i in range(len(self.domains))]
        return {d.name: range(s, s + d.windows) for d, s in zip(self.domains, starts, strict=True)}


def require_text(spec: str) -> None:
    """Raises UserError where what `spec` names does not exist, or what reads it is not installed."""
    require_readable(spec, DATA)


def eval_text(spec: str, tokenizer: Tokenizer, *, windows: int, window: int) -> EvalText:
    """The first `windows` windows of `window` tokens of every source that `spec` names (`resolve_sources`).

    Raises UserError, with figures, when a domain does not fill one window.
    """
    rows: list[list[int]] = []
    domains, notes = [], []
    for source in resolve_sources(spec, SEED, DATA):
        consumed = Consumed()
        own = list(islice(iter_windows(source.open(), tokenizer, window, consumed), windows))
        if not own:
            raise UserError(
                f"{source.origin}: {consumed.tokens} tokens do not fill one window of {window}; "
                "give more text or a shorter --window"
            )
        if len(own) < windows:
            notes.append(f"domain {source.name!r} has text for {len(own)} of {windows} windows")
        if consumed.chats and tokenizer.template is None:
            notes.append(f"domain {source.name!r}: no chat template, chat rows were written as 'role: text'")
        domains.append(Domain(source.name, source.origin, consumed.documents, consumed.tokens, len(own)))
        rows += own
    ids_WS = as_tensor(rows, window)
    digest = hashlib.sha256(repr([(d.name, d.windows) for d in domains]).encode())
    digest.update(ids_WS.numpy().tobytes())
    return EvalText(ids_WS, tuple(domains), digest.hexdigest(), tuple(notes))
