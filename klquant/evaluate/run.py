"""The whole evaluation: text, reference pass (once), model pass, figures, the result file."""

import os
import platform
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from klquant.calibrate.tokenizer import Tokenizer, load_tokenizer
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.writer import write_json
from klquant.core.versions import versions
from klquant.errors import UserError
from klquant.evaluate.baselines import BaselineModel
from klquant.evaluate.options import EvalOptions, Silent, StoreKind, Watcher
from klquant.evaluate.passes import DTYPES, Passes
from klquant.evaluate.quantization import calibrated_on, quantization
from klquant.evaluate.result import (
    Checkpoint,
    Data,
    DomainText,
    Provenance,
    Quantization,
    Reference,
    Result,
    require_output,
)
from klquant.evaluate.size import describe
from klquant.evaluate.source import DeviceSource, Source
from klquant.evaluate.tasks.suite import Side, Suite
from klquant.evaluate.tasks.suite import notes as cut_questions
from klquant.evaluate.text import EvalText, eval_text
from klquant.evaluate.trace import Runner
from klquant.evaluate.windows import WindowFolder
from klquant.model.first_prompt import building_note

CACHE = "reference-cache"
UNFINISHED = ".unfinished"
# Whole distributions of the reference are kept while they take no more bytes than this.
FULL_BYTES = 4_000_000_000
# Of a config: what a pass over windows does not depend on, and who quantized or tuned a model may have changed.
USE_ONLY = {"max_context", "bos_id", "eos_ids", "pad_id"}


def evaluate(
    model: Path, against: Path | None, out: Path, options: EvalOptions, watcher: Watcher | None = None,
    baseline: BaselineModel | None = None,
) -> Result:  # fmt: skip
    """Evaluate the checkpoint `model` against the checkpoint `against` and write the result to the file `out`.

    With a `baseline` of `model` that is evaluated, against `model` itself. Raises UserError for what the user can mend;
    finished windows then wait beside `out` for the next call.
    """
    watcher = watcher or Silent()
    require_output(out, Result)
    device = torch.device(options.device)
    if baseline is None:
        ours, theirs = open_model(model), None if against is None else open_model(against)
        if theirs is not None:
            theirs.files.require_16_bits()
        source, checkpoint = DeviceSource(ours, device), describe(ours, model)
        made, notes = made_of(ours)
    else:
        ours, theirs, against = baseline.reader, baseline.reader, model
        source, checkpoint = baseline.source(device), baseline.checkpoint()
        made, notes = None, baseline.notes
    passes = prepare(ours, theirs or ours, options, watcher)
    text, dtype = passes.text, passes.dtype
    notes = [*text.notes, *notes, *(overlap_of(model, text) if baseline is None else [])]
    for note in notes:
        watcher.note(note)
    suite = _suite(source, theirs or ours, passes, options, watcher)
    reference = cache = floor = None
    if theirs is not None:
        reference = Reference(
            checkpoint=describe(theirs, against), arithmetic=passes.arithmetic(dtype), store=passes.store
        )
        truth = DeviceSource(theirs, device)
        cache = passes.reference(truth, reference, options.reference_cache or out.parent / CACHE)
        floor = passes.floor(truth, reference, cache) if options.floor else None
    purpose = passes.purpose(checkpoint.fingerprint, dtype) | {"reference": cache and cache.folder.name}
    journal = WindowFolder.open(out.with_name(out.name + UNFINISHED), purpose)
    scored = passes.compare(source, dtype, cache, journal, "model")
    tasks = []
    if suite is not None:
        sides = [_side("model", source, checkpoint, passes, journal.folder)]
        if theirs is not None:
            caches = options.reference_cache or out.parent / CACHE
            sides.append(_side("reference", truth, reference.checkpoint, passes, caches))
        tasks = suite.score(*sides)
        for note in cut_questions(tasks):
            watcher.note(note)
            notes.append(note)
    result = Result(
        model=checkpoint,
        arithmetic=passes.arithmetic(dtype),
        reference=reference,
        data=data_of(text, options),
        **passes.figures(scored, source),
        floor=floor,
        quantization=made,
        tasks=tasks,
        notes=notes,
        provenance=provenance_of(options, scored.seconds, scored.tokens),
    )
    write_json(out, result.model_dump(mode="json"))
    journal.remove()
    return result


def open_model(folder: Path) -> QuantizedReader:
    """A checkpoint, quantized or not, of which nothing is missing. Raises UserError naming what is, or is damaged."""
    reader = QuantizedReader.open(folder)
    reader.check_complete()
    return reader


def prepare(ours: QuantizedReader, theirs: QuantizedReader, options: EvalOptions, watcher: Watcher) -> Passes:
    """Text, arithmetic and store of an evaluation of `ours` against `theirs`."""
    text = _text(ours, theirs, options)
    device = torch.device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if note := building_note(device, DTYPES[dtype]):
        watcher.note(note)
    return Passes(text, device, dtype, options.store or _affordable(text, ours), watcher)


def data_of(text: EvalText, options: EvalOptions) -> Data:
    domains = [DomainText(**asdict(d)) for d in text.domains]
    return Data(spec=options.data, window=options.window, sha256=text.sha256, domains=domains)


def provenance_of(options: EvalOptions, seconds: float, tokens: int) -> Provenance:
    return Provenance(
        command=list(options.command), versions={"python": platform.python_version(), **versions()},
        device=_device_name(torch.device(options.device)),
        threads=torch.get_num_threads(), seconds=seconds, tokens=tokens,
    )  # fmt: skip


def _text(ours: QuantizedReader, reader: QuantizedReader, options: EvalOptions) -> EvalText:
    """The windows, cut by the reference's tokenizer. Raises UserError where the model's would cut others, and where the
    reference is no model of that shape.

    `reader` is the reference's."""
    for name in (field.name for field in fields(KimiLinearConfig) if field.name not in USE_ONLY):
        own, theirs = getattr(ours.config, name), getattr(reader.config, name)
        if own != theirs:
            own, theirs = (sorted(x) if isinstance(x, frozenset) else x for x in (own, theirs))
            raise UserError(
                f"{ours.files.folder}: {name} is {own}, but {reader.files.folder} has {theirs}; the reference must be "
                "the model that was quantized"
            )
    tokenizer = load_tokenizer(reader.files.folder)
    tokenizer.require_fits(reader.config)
    text = _cut(tokenizer, options)
    own = ours.files.folder / tokenizer.file.name
    differs = own.exists() and own.read_bytes() != tokenizer.file.read_bytes()
    if differs and _cut(load_tokenizer(ours.files.folder), options).sha256 != text.sha256:
        raise UserError(f"{own}: cuts the text into other tokens than {tokenizer.file}; copy that one over")
    return text


def _suite(
    source: Source, theirs: QuantizedReader, passes: Passes, options: EvalOptions, watcher: Watcher
) -> Suite | None:
    """The tasks, asked through the reference's tokenizer; what can be wrong with them is raised here."""
    if options.tasks is None:
        return None
    folder = theirs.files.folder
    suite = Suite(options.tasks, load_tokenizer(folder), folder, source.config.max_context, watcher)
    suite.require(Runner(source, DTYPES[passes.dtype], passes.device))
    return suite


def _side(
    whose: Literal["model", "reference"], source: Source, checkpoint: Checkpoint, passes: Passes, folder: Path
) -> Side:
    purpose = {"weights": checkpoint.fingerprint, "arithmetic": passes.arithmetic(passes.dtype).model_dump()}
    runner = partial(Runner, source, DTYPES[passes.dtype], passes.device)
    return Side(whose, checkpoint.name, runner, purpose, folder / "tasks")


def _cut(tokenizer: Tokenizer, options: EvalOptions) -> EvalText:
    return eval_text(options.data, tokenizer, windows=options.windows, window=options.window)


def made_of(reader: QuantizedReader) -> tuple[Quantization | None, list[str]]:
    """How the model was quantized, and a note where its record cannot be read."""
    try:
        return quantization(reader.files.folder, reader.config), []
    except UserError as error:
        return None, [f"{error}; what it holds is not in the result"]


def _affordable(text: EvalText, reader: QuantizedReader) -> StoreKind:
    return "full" if text.ids_WS.numel() * reader.config.vocab_size * 2 <= FULL_BYTES else "topk"


def overlap_of(model: Path, text: EvalText) -> list[str]:
    """Notes on text that the model was calibrated on. None where its record cannot be read, which `made_of` notes."""
    try:
        shared = calibrated_on(model) & {d.origin for d in text.domains}
    except UserError:
        return []
    return [f"the model was calibrated on text it is evaluated on: {origin}" for origin in sorted(shared)]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores"
