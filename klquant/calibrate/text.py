"""Calibration windows: token ids [W, S] that the model is run on while weights are quantized.

Windows are drawn from the sources in turn (first windows of each source, then second ones, …), so every domain has an
equal share and more windows can be had later without changing the ones already taken.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from klquant.calibrate.documents import SELF, Source, resolve_sources
from klquant.calibrate.tokenizer import Tokenizer
from klquant.calibrate.windows import Consumed, as_tensor, iter_windows
from klquant.checkpoint.config import KimiLinearConfig
from klquant.errors import UserError

Generate = Callable[[int, int, int], torch.Tensor]
"""`generate(n_sequences, length, seed)` → int64 [n_sequences, length] sampled from the model; `start_tokens` first."""

# Sequences that `self` samples at once. Fixed: the seed of a sequence must not depend on how windows are asked for.
SELF_BATCH = 8

# Frequent beginnings of text. The ones that are a single token of the model's vocabulary open sampled sequences.
_OPENINGS = (
    "The", "I", "In", "A", "It", "What", "How", "To", "We", "This", "If", "You", "#", "##", "def", "import", "from",
    "class", "//", "<", "{", "1", "-", "\n", "**", "Question", "Let", "Here", "我", "的", "在", "这", "一", "中国",
)  # fmt: skip


@dataclass(frozen=True)
class SourceInfo:
    """What a source has given: `tokens` were encoded (BOS and EOS among them), `windows` were taken."""

    name: str
    origin: str
    documents: int
    tokens: int
    windows: int


@dataclass(frozen=True)
class Calibration:
    """Windows and where they come from.

    ids: int64 [W, S]; source_of_window: int64 [W], index into `sources`; sha256: hex digest of ids, names and counts,
    independent of where files lie; notes: fallbacks and shortages, one line each, for the report.
    """

    ids: torch.Tensor
    source_of_window: torch.Tensor
    sources: tuple[SourceInfo, ...]
    sha256: str
    notes: tuple[str, ...]


class CalibrationPool:
    """Windows in a fixed order, taken bit by bit: `take(a)` then `take(b)` gives what `take(a + b)` gives."""

    def __init__(self, streams: "list[_Stream]", tokenizer: Tokenizer, window: int) -> None:
        self._streams = streams
        self._tokenizer = tokenizer
        self._window = window
        self._taken: list[tuple[int, list[int]]] = []
        self._asked = 0
        self._order = self._draw()

    def take(self, count: int) -> torch.Tensor:
        """The next `count` windows, int64 [≤ count, S]: fewer, down to none, when all sources are exhausted."""
        self._asked += count
        fresh = [pair for _, pair in zip(range(count), self._order, strict=False)]
        self._taken += fresh
        return as_tensor([ids for _, ids in fresh], self._window)

    def calibration(self) -> Calibration:
        """Everything taken so far. Raises UserError, with figures, when that is not even one window."""
        sources = tuple(
            SourceInfo(s.name, s.origin, s.consumed.documents, s.consumed.tokens, [i for i, _ in self._taken].count(k))
            for k, s in enumerate(self._streams)
        )
        if not self._taken:
            raise UserError(
                f"calibration text is too short: {sum(s.tokens for s in sources)} tokens in "
                f"{sum(s.documents for s in sources)} documents ({', '.join(s.origin for s in sources)}), "
                f"one window needs {self._window}; give more text or a shorter window"
            )
        ids = as_tensor([w for _, w in self._taken], self._window)
        source_of_window = torch.tensor([k for k, _ in self._taken], dtype=torch.int64)
        sha256 = _digest(ids, source_of_window, sources)
        return Calibration(ids, source_of_window, sources, sha256, self._notes(sources))

    def _draw(self) -> Iterator[tuple[int, list[int]]]:
        alive = dict(enumerate(self._streams))
        while alive:
            for k, stream in list(alive.items()):
                ids = next(stream.windows, None)
                if ids is None:
                    stream.exhausted = True
                    del alive[k]
                else:
                    yield k, ids

    def _notes(self, sources: tuple[SourceInfo, ...]) -> tuple[str, ...]:
        notes = []
        if any(s.consumed.chats for s in self._streams) and self._tokenizer.template is None:
            notes.append("the model has no chat template: chat rows were written as paragraphs of 'role: text'")
        most = max(s.windows for s in sources)
        for stream, info in zip(self._streams, sources, strict=True):
            if stream.exhausted and info.windows < most:
                notes.append(
                    f"source {info.name!r} is used up: {info.windows} windows where others gave {most} "
                    f"({info.tokens} tokens in {info.documents} documents)"
                )
        pairs = zip(self._streams, sources, strict=True)
        if unheard := [repr(info.name) for stream, info in pairs if not info.windows and not stream.exhausted]:
            notes.append(f"no window was left for {', '.join(unheard)}; give more tokens, or a shorter window")
        if len(self._taken) < self._asked:
            notes.append(f"{self._asked} windows were asked for, the text fills {len(self._taken)}")
        return tuple(notes)


def open_pool(
    spec: str,
    tokenizer: Tokenizer,
    cfg: KimiLinearConfig,
    *,
    window: int,
    seed: int = 0,
    generate: Generate | None = None,
) -> CalibrationPool:
    """A pool of `window`-token windows of what `spec` names (`resolve_sources`).

    "self" samples from the model through `generate`. Raises UserError for a spec that names nothing, and for a
    tokenizer with ids beyond the model's vocabulary.
    """
    tokenizer.require_fits(cfg)
    if spec == SELF:
        if generate is None:
            raise UserError("calibration on the model's own text ('self') needs the model; give text to calibrate on")
        return CalibrationPool([_sampled(generate, window, seed)], tokenizer, window)
    streams = [_stream(source, tokenizer, window) for source in resolve_sources(spec, seed)]
    return CalibrationPool(streams, tokenizer, window)


def start_tokens(tokenizer: Tokenizer, n_sequences: int, seed: int) -> list[list[int]]:
    """How sampled sequences begin: `[BOS]` for every other one, `[BOS, a common token]` for the rest."""
    common = [ids[0] for text in _OPENINGS if len(ids := tokenizer.encode(text)) == 1]
    draw = random.Random(seed)
    openings = [[] if i % 2 == 0 or not common else [draw.choice(common)] for i in range(n_sequences)]
    return [[tokenizer.bos_id, *opening] for opening in openings]


@dataclass
class _Stream:
    """A source with its windows under way."""

    name: str
    origin: str
    windows: Iterator[list[int]]
    consumed: Consumed
    exhausted: bool = False


def _stream(source: Source, tokenizer: Tokenizer, window: int) -> _Stream:
    consumed = Consumed()
    windows = iter_windows(source.open(), tokenizer, window, consumed)
    return _Stream(source.name, source.origin, windows, consumed)


def _sampled(generate: Generate, window: int, seed: int) -> _Stream:
    """An endless stream: every sampled sequence is a window and counts as a document."""
    consumed = Consumed()

    def windows() -> Iterator[list[int]]:
        batch = 0
        while True:
            ids = generate(SELF_BATCH, window, seed + batch)
            assert ids.shape == (SELF_BATCH, window), f"generate returned {tuple(ids.shape)}"
            for row in ids.tolist():
                consumed.documents += 1
                consumed.tokens += window
                yield row
            batch += 1

    return _Stream(SELF, "text sampled from the model", windows(), consumed)


def _digest(ids: torch.Tensor, source_of_window: torch.Tensor, sources: tuple[SourceInfo, ...]) -> str:
    record = [{k: v for k, v in asdict(s).items() if k != "origin"} for s in sources]
    digest = hashlib.sha256(json.dumps([list(ids.shape), source_of_window.tolist(), record]).encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
