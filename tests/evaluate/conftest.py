"""A tiny model, its quantized variant and text to tell them apart on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from klquant.evaluate.options import EvalOptions
from klquant.evaluate.run import evaluate
from tests.checkpoint.build import quantized_checkpoint
from tests.tiny import tiny_config, write_checkpoint

WINDOW = 80


@pytest.fixture(scope="session")
def variant(tmp_path_factory) -> Path:
    """The tiny checkpoint, quantized by rounding."""
    folder = tmp_path_factory.mktemp("variant") / "int4"
    quantized_checkpoint(folder, tiny_config())
    return folder


@pytest.fixture(scope="session")
def dequantized(tmp_path_factory) -> Path:
    """`variant` in 16 bits: what transformers can load."""
    home = tmp_path_factory.mktemp("dequantized")
    plain = quantized_checkpoint(home / "int4", tiny_config())
    return write_checkpoint(home / "plain", tiny_config(), plain)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Two domains, documents of ugly lengths."""
    folder = tmp_path_factory.mktemp("text")
    for name, word in (("code", "def f(x): return x + {}\n"), ("prose", "The {} brown foxes jumped over it. ")):
        rows = [{"text": "".join(word.format(i * j) for i in range(j + 2))} for j in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def options(texts) -> EvalOptions:
    return EvalOptions(data=str(texts), windows=3, window=WINDOW)


@pytest.fixture(scope="session")
def reference_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def result(variant, tiny, options, reference_cache, tmp_path_factory):
    """The variant against the tiny model, with the floor."""
    out = tmp_path_factory.mktemp("result") / "int4.json"
    return evaluate(variant, tiny, out, replace(options, floor=True, reference_cache=reference_cache))
