"""Documents → windows: `[BOS] ids [EOS]` one after another, cut every `window` tokens from the start.

Shape suffixes: W = windows, S = tokens in a window.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from klquant.calibrate.documents import Document
from klquant.calibrate.tokenizer import Tokenizer

# A longer text is encoded bit by bit, so that one window of a huge file does not cost the whole file. The cuts lie
# behind a line break and before a visible character, where Kimi's pattern (and its like) always ends a token.
MAX_PIECE = 1 << 20
_LINE_START = re.compile(r"\n(?=\S)")


@dataclass
class Consumed:
    """How much text a stream of windows has taken so far. `tokens` counts BOS and EOS and the unfinished window."""

    documents: int = 0
    tokens: int = 0
    chats: int = 0


def iter_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, window: int, consumed: Consumed | None = None
) -> Iterator[list[int]]:
    """Windows of `window` ids each, as many as the documents fill; a remainder at the end is dropped.

    Lazy: a document is read and encoded when the first window that needs it is asked for. Empty texts are skipped.
    A chat template that writes BOS or EOS itself does not get a second one. `consumed` is counted up on the way.
    """
    consumed = consumed or Consumed()
    rest: list[int] = []
    for document in documents:
        if isinstance(document, str) and not document.strip():
            continue
        consumed.documents += 1
        consumed.chats += not isinstance(document, str)
        for ids in _document_ids(document, tokenizer):
            consumed.tokens += len(ids)
            rest += ids
            full = len(rest) // window * window
            for start in range(0, full, window):
                yield rest[start : start + window]
            del rest[:full]


def as_tensor(windows: list[list[int]], window: int) -> torch.Tensor:
    """int64 [W, S], also for no windows at all."""
    return torch.tensor(windows, dtype=torch.int64).reshape(len(windows), window)


def _document_ids(document: Document, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """`[BOS] ids [EOS]` of one document, in order, in one list or several."""
    if isinstance(document, str):
        yield [tokenizer.bos_id]
        for piece in _pieces(document):
            yield tokenizer.encode(piece)
        yield [tokenizer.eos_id]
        return
    ids = tokenizer.apply_chat(document)
    bos = [tokenizer.bos_id] if ids[:1] != [tokenizer.bos_id] else []
    eos = [tokenizer.eos_id] if ids[-1:] != [tokenizer.eos_id] else []
    yield bos + ids + eos


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > MAX_PIECE:
        cut = _LINE_START.search(text, start + MAX_PIECE)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]
