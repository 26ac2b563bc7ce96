"""Where text comes from: files of the user, built-in text, public datasets. Documents are read lazily.

A document is a text or a conversation. A source is a named sequence of documents; windows are shared out between
sources evenly, so one file should hold one domain.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

from klquant.calibrate.chat import Message, require_messages
from klquant.calibrate.mixes import Mix, MixSource, known_mixes, load_mix
from klquant.core.packages import is_installed
from klquant.errors import UserError

Document = str | list[Message]
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
BUILT_IN = "tiny"
SELF = "self"  # the model's own text, which only calibration takes
CALIB = "--calib"


@dataclass(frozen=True)
class Library:
    """A module that reads a source, and what to say where it is not installed."""

    module: str
    lack: str


@dataclass(frozen=True)
class Source:
    """A domain: `open()` starts its documents from the first. `origin` says where they come from, for the record.
    `library`: what reads them, where klquant does not by itself."""

    name: str
    origin: str
    open: Callable[[], Iterator[Document]]
    library: Library | None = None


def require_readable(spec: str, option: str = CALIB) -> None:
    """Raises UserError where what `spec` names does not exist, or what reads it is not installed. Nothing is read."""
    for source in resolve_sources(spec, seed=0, option=option):
        if source.library is not None and not is_installed(source.library.module):
            raise UserError(source.library.lack)


def resolve_sources(spec: str, seed: int, option: str = CALIB) -> list[Source]:
    """What `--calib` names: a mix ("tiny", "default"), a mix file (.yaml), or text files and folders, comma-separated.

    `seed` orders the rows of public datasets; files keep their order. `option` is what errors name. Raises UserError
    for what does not exist.
    """
    if spec == BUILT_IN:
        resource = files("klquant.mixes") / "tiny.jsonl"
        return [Source(BUILT_IN, "klquant's built-in text", lambda: _jsonl(resource, "tiny.jsonl"))]
    if spec in known_mixes() or Path(spec).suffix in (".yaml", ".yml"):
        mix = load_mix(spec)
        return [_dataset_source(mix, source, seed, option) for source in mix.sources]
    parts = [spec] if Path(spec).exists() else [part.strip() for part in spec.split(",") if part.strip()]
    paths = [file for part in parts for file in _text_files(part, option)]
    if not paths:
        raise UserError(f"text {spec!r} names no file")
    if len(set(paths)) != len(paths):
        raise UserError(f"text {spec!r} names a file twice")
    stems = [p.stem for p in paths]
    return [_file_source(p, p.stem if stems.count(p.stem) == 1 else str(p)) for p in paths]


def _text_files(part: str, option: str) -> list[Path]:
    path = Path(part)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"{path}: no {', '.join(TEXT_SUFFIXES)} file in this folder")
        return found
    if not path.exists():
        mixes = [BUILT_IN, *([SELF] if option == CALIB else []), *known_mixes()]
        known = ", ".join(mixes)
        if part in mixes:
            raise UserError(f"{option}: {part!r} is a mix and stands alone; give one mix, or files and folders")
        if part == SELF:
            raise UserError(f"{option}: 'self' is for calibration only; give text files or a mix (known: {known})")
        raise UserError(f"text {part!r}: no such file or folder, and no mix of that name (known: {known})")
    if path.suffix not in TEXT_SUFFIXES:
        raise UserError(f"{path}: text must be {', '.join(TEXT_SUFFIXES)} or a mix in .yaml")
    return [path]


def _file_source(path: Path, name: str) -> Source:
    if path.suffix == ".parquet":
        pyarrow = Library("pyarrow", f"{path}: reading parquet needs pyarrow: pip install pyarrow")
        return Source(name, str(path), lambda: _parquet(path, str(path), pyarrow), pyarrow)
    read = {".txt": _txt, ".jsonl": _jsonl}[path.suffix]
    return Source(name, str(path), lambda: read(path, str(path)))


def _txt(path: Path, where: str) -> Iterator[Document]:
    """The whole file is one document."""
    try:
        yield path.read_bytes().decode("utf-8-sig")  # bytes, because reading as text would rewrite \r\n
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def _jsonl(path, where: str) -> Iterator[Document]:
    """One row a line, `text` or chat `messages`; other keys are ignored, blank lines skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            at = f"{where}: line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError:
                raise UserError(f"{at} is not JSON in UTF-8") from None
            if not isinstance(row, dict):
                raise UserError(f"{at} is not a JSON object")
            yield _document(row, at)


def _parquet(path: Path, where: str, pyarrow: Library) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(pyarrow.lack) from None
    try:
        file = pq.ParquetFile(path)
        columns = [c for c in ("messages", "text") if c in file.schema_arrow.names]
        row_number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns) if columns else ():
            for row in batch.to_pylist():
                row_number += 1
                yield _document(row, f"{where}: row {row_number}")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: not a readable parquet file: {error}") from None
    if not columns:
        raise UserError(f"{where}: neither a 'text' nor a 'messages' column")


def _document(row: dict, at: str) -> Document:
    """A row's conversation if it has `messages`, else its `text`."""
    if row.get("messages") is not None:
        return _unicode(require_messages(row["messages"], at), at)
    if not isinstance(row.get("text"), str):
        raise UserError(f"{at} has neither 'text' (a string) nor chat 'messages'")
    return _unicode(row["text"], at)


def _unicode(document: Document, at: str) -> Document:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        (document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise UserError(f"{at} holds half a surrogate pair, which is not Unicode text") from None
    return document


def _dataset_source(mix: Mix, source: MixSource, seed: int, option: str) -> Source:
    origin = f"{source.dataset}@{source.revision}"
    own = ", 'self' (the model's own text)" if option == CALIB else ""
    other = f"or pass {option} with a text file{own} or 'tiny' (built in)"
    where = f"mix {mix.name!r}, source {source.name!r}"
    library = Library("datasets", f"{where} needs the datasets library: pip install 'klquant[data]', {other}")
    return Source(source.name, origin, lambda: _dataset_documents(source, seed, library, where, other), library)


def _dataset_documents(source: MixSource, seed: int, library: Library, where: str, other: str) -> Iterator[Document]:
    """The first `rows` rows of the pinned revision, shuffled by `seed`. `other`: what to do where there are none."""
    try:
        import datasets
    except ImportError:
        raise UserError(library.lack) from None
    # Its retries would be ten lines before the one that says it all.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        # Streaming reads the rows it needs instead of downloading gigabytes.
        stream = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=True
        )
        rows = list(islice(stream, source.rows))
    except Exception as error:  # the library raises a dozen unrelated types for "no network" and "no such dataset"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: {source.dataset} cannot be read ({first}); check the network, {other}") from None
    random.Random(f"{seed}:{source.name}").shuffle(rows)
    for number, row in enumerate(rows, 1):
        yield _document(source.row(row), f"{where}: row {number} of {source.dataset}")
