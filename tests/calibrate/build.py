"""Windows of text, as many as a test asks for."""

from collections.abc import Iterable
from itertools import islice

from torch import Tensor

from klquant.calibrate.documents import Document
from klquant.calibrate.text import Calibration, open_pool
from klquant.calibrate.tokenizer import Tokenizer
from klquant.calibrate.windows import as_tensor, iter_windows


def windows_from_texts(
    documents: Iterable[Document], tokenizer: Tokenizer, window: int, count: int | None = None
) -> Tensor:
    """The first `count` windows of `documents`, or all of them."""
    return as_tensor(list(islice(iter_windows(documents, tokenizer, window), count)), window)


def calibration_windows(
    spec: str, tokenizer: Tokenizer, cfg, *, tokens: int, window: int, generate=None
) -> Calibration:
    """The first `tokens // window` windows of `open_pool`."""
    pool = open_pool(spec, tokenizer, cfg, window=window, generate=generate)
    pool.take(tokens // window)
    return pool.calibration()
