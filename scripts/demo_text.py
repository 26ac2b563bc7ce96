"""The demo model's text: Python's own standard library, read on the machine at hand, in two domains.

`code` is the library's source files, `prose` its documentation strings and the topics of `pydoc_data` (the language
reference's text). Both come under the PSF licence. A file or topic belongs to training, calibration or evaluation by
the hash of its name, so the three never share a document, whatever the Python version.

    python scripts/demo_text.py --out demo-train

writes `text/{calib,eval}/{code,prose}.jsonl`, `tokenizer.json`, `train-{code,prose}.bin` (uint16 token ids, little
endian) and `text.json` (Python version, hashes, counts), which `train_demo.py` reads.
"""

import argparse
import ast
import hashlib
import inspect
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

BOS, EOS, PAD = "[BOS]", "[EOS]", "[PAD]"
VOCAB_SIZE = 1536

# Machine-made tables, other people's packages, and modules that hold paths of the machine that built Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "ensurepip"}
SKIPPED_FILES = re.compile(r"_sysconfig.*|.*_(data|table|codes)\.py|keyword\.py|stringprep\.py")
MAX_FILE = 200_000
# What travels with the project: bytes a domain, and the longest piece of one document.
CARRIED = {"calib": 90_000, "eval": 50_000}
MAX_PIECE = 12_000
MIN_DOCSTRING, MIN_PROSE = 120, 1_000

# Words with their space, numbers in threes, punctuation, line ends with the white space before them.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip


def library_files() -> Iterator[tuple[str, str]]:
    """(name relative to the library, source text) of the standard library's modules, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(parts) or SKIPPED_FILES.fullmatch(path.name) or path.stat().st_size > MAX_FILE:
            continue
        try:
            source = path.read_text(encoding="utf-8").replace("\r\n", "\n").strip()
        except UnicodeDecodeError:  # the library's own tests of source encodings
            continue
        if source:
            yield "/".join(parts), source + "\n"


def docstrings(source: str) -> str:
    """The longer documentation strings of a module, in order; empty where it has none or does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, holders))
    texts = [inspect.cleandoc(text) for text in found if text]
    return "\n\n".join(t for t in texts if len(t) >= MIN_DOCSTRING)


def documents() -> dict[str, list[tuple[str, str]]]:
    """Domain → [(name, text)], in a fixed order."""
    from pydoc_data.topics import topics

    code = list(library_files())
    prose = [(f"topics/{name}", topics[name].strip() + "\n") for name in sorted(topics)]
    prose += [(name, docstrings(source)) for name, source in code]
    return {"code": code, "prose": [(name, text) for name, text in prose if len(text) >= MIN_PROSE]}


def split_of(name: str) -> str:
    """train, calib or eval. The library's own tests are trained on but not carried: their text is the least typical."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 16
    split = {0: "calib", 1: "eval"}.get(bucket, "train")
    return "train" if {"test", "tests"} & set(name.split("/")) else split


def carried(docs: list[tuple[str, str]], budget: int) -> list[str]:
    """Pieces of `docs`, in the order of their names' hashes, up to `budget` bytes in all; each ends at a line end."""
    pieces, used = [], 0
    for _, text in sorted(docs, key=lambda d: hashlib.sha256(d[0].encode()).hexdigest()):
        piece = text[: min(MAX_PIECE, budget - used)]
        piece = piece[: piece.rfind("\n") + 1]
        if piece.strip():
            pieces.append(piece)
            used += len(piece.encode())
    return pieces


def train_tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer: three specials, 256 bytes, then merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def digest(texts: list[str]) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode() + b"\0")
    return whole.hexdigest()


def prepare(out: Path) -> dict:
    """Write everything that training needs to `out`; returns what `text.json` says."""
    import numpy as np

    docs = documents()
    held = {(s, d): [t for t in docs[d] if split_of(t[0]) == s] for s in CARRIED for d in docs}
    train = {d: [text for name, text in docs[d] if split_of(name) == "train"] for d in docs}
    for (split, domain), some in held.items():
        path = out / "text" / split / f"{domain}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": piece}, ensure_ascii=False) for piece in carried(some, CARRIED[split]))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # Prose counts several times over, so that it gets its share of the merges.
    tokenizer = train_tokenizer(train["code"] + 3 * train["prose"])
    tokenizer.save(str(out / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    record = {"python": platform.python_version(), "licence": "PSF-2.0", "domains": {}}
    for domain, texts in train.items():
        ids = [i for e in tokenizer.encode_batch(texts) for i in (bos, *e.ids, eos)]
        np.array(ids, dtype="<u2").tofile(out / f"train-{domain}.bin")
        record["domains"][domain] = {
            "documents": len(texts),
            "bytes": sum(len(t.encode()) for t in texts),
            "tokens": len(ids),
            "sha256": digest(texts),
        }
    (out / "text.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the text, the tokenizer and the token ids")
    args = parser.parse_args()
    json.dump(prepare(args.out), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
