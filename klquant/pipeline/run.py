"""The whole run: checks first, then unit after unit, then the finishing touches that make a folder a checkpoint."""

import math
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import klquant
from klquant.calibrate.coverage import whole_windows
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.calibrate.walk import WalkSettings
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.writer import Shard, ShardRecord, write_safetensors
from klquant.core.device import hardware, pick_devices
from klquant.core.memory import free_memory
from klquant.core.units import decimal
from klquant.errors import UserError
from klquant.model.first_prompt import building_note, import_fla
from klquant.pipeline.ahead import Ahead
from klquant.pipeline.behind import Behind
from klquant.pipeline.finish import finish
from klquant.pipeline.journal import Journal, Purpose
from klquant.pipeline.landing import Landing
from klquant.pipeline.placement import NO_LIMITS, Limits, Placement, limit_devices, place
from klquant.pipeline.report import Silent, Traffic, UnitDone, Watcher
from klquant.pipeline.streams import DTYPES, StreamStore, stream_names
from klquant.pipeline.text import draw_text, keep_text
from klquant.pipeline.units import Progress, UnitResult, Units, names_read, packed_bytes, shards_of, units_of
from klquant.recipe.decision import Decision
from klquant.recipe.plan import Plan

SHARD_BYTES = 5_000_000_000
# Tokens worked on at once, by kind of device. Fixed, because the order of a sum is part of its bytes; a GPU wants large
# batches, so that an expert's share of one is worth a launch.
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}


@dataclass(frozen=True)
class RunOptions:
    """What a user may choose beside model, recipe and output. `calib` is a mix or text files (None: the recipe's);
    `device` may be several, `cuda:0,cuda:1`."""

    calib: str | None = None
    device: str = "cpu"
    resume: bool = False
    shard_bytes: int = SHARD_BYTES
    limits: Limits = NO_LIMITS


def quantize(
    reader: CheckpointReader, plan: Plan, out: Path, options: RunOptions, watcher: Watcher | None = None
) -> dict:
    """Quantize `reader`'s checkpoint as `plan` says into the folder `out`; returns the provenance written there.

    Raises UserError for anything the user can mend; then nothing that looks like a checkpoint is at `out`, and what is
    done waits in `out`.unfinished for `resume`.
    """
    watcher = watcher or Silent()
    with Journal(out) as journal, torch.no_grad():
        before = journal.find(options.resume)
        if options.resume and before is None:
            watcher.note(f"nothing to resume at {out}: this run begins at the first layer")
        check_model(reader)
        settings = walk_settings(plan, options)
        limit_devices(settings, options.limits)
        purpose = Purpose(
            klquant.__version__, torch.__version__, reader.fingerprint(), plan.digest(),
            before and before["calibration"], hardware(settings.devices), options.shard_bytes,
        )  # fmt: skip
        made_from = {"recipe": plan.recipe.model_dump(mode="json"), "target": plan.target}
        if before:
            journal.check(purpose, made_from)
            if journal.complete:
                return journal.finish()
        text = None
        if plan.needs_calibration:
            # Asked again when the streams are made. What cannot fit is refused before there is a file.
            place_streams(plan, settings, options.limits)
            if note := building_note(settings.device, settings.dtype):
                watcher.note(note)
            params = plan.recipe.calibration
            text = draw_text(options.calib or params.mix, reader, params, settings, watcher, journal)
        elif lack := missing_tokenizer(reader.folder):
            watcher.note(f"{lack}: without it the result can neither be evaluated nor answer")
        if not before:
            journal.make()
            if text is not None:
                keep_text(text, journal)
                purpose = replace(purpose, calibration=text.calibration.sha256)
            journal.begin(purpose, made_from)
        for note in text.calibration.notes if text else ():
            watcher.note(note)
        shards = shards_of(plan, options.shard_bytes)
        if plan.needs_calibration:
            import_fla(settings.device, settings.dtype)
        _work(reader, plan, settings, journal, shards, text and text.calibration.ids, options.limits, watcher)
        return finish(reader, plan, journal, shards, text)


def walk_settings(plan: Plan, options: RunOptions) -> WalkSettings:
    """Where and in what batches the run works on a layer. Raises UserError as `pick_devices` does."""
    device, *others = pick_devices(options.device)
    return WalkSettings(
        device=device,
        dtype=DTYPES[device.type],
        batch=max(1, BATCH_TOKENS[device.type] // plan.recipe.calibration.window),
        others=tuple(others),
        host_limit=options.limits.cpu,
    )


def place_streams(plan: Plan, settings: WalkSettings, limits: Limits) -> Placement:
    """Where the streams of the first windows go. Raises UserError as `place` does."""
    params = plan.recipe.calibration
    return place(plan.config, settings, whole_windows(params)[0], params.window, len(stream_names(plan)), limits)


def missing_tokenizer(folder: Path) -> str | None:
    """Why a checkpoint's tokenizer cannot be used, None where it can."""
    try:
        load_tokenizer(folder)
    except UserError as error:
        return str(error)
    return None


def check_model(reader: CheckpointReader) -> None:
    """Raises UserError unless the checkpoint is whole and in 16 or 32 bits."""
    reader.require_16_bits()
    reader.check_complete()


def _work(
    reader: CheckpointReader, plan: Plan, settings: WalkSettings, journal: Journal, shards: list[Shard],
    ids_WS: Tensor | None, limits: Limits, watcher: Watcher,
) -> None:  # fmt: skip
    """Do the units that are not done, or whose streams were not kept. While one is at work, the next is read and the
    last written."""
    jobs, done = list(units_of(plan).items()), journal.done
    start = done if done == len(jobs) else journal.start(stream_names(plan) if ids_WS is not None else [])
    journal.require_shards(start)
    watcher.begin([name for name, _ in jobs], start)
    if start < done:
        again = ", ".join(name for name, _ in jobs[start:done])
        watcher.note(f"{again}: done again, for the activations were last saved before")
    reads = [names_read(plan, name, decisions) for name, decisions in jobs[start:]]
    written = 0
    most = max((packed_bytes(decisions) for _, decisions in jobs[start:]), default=0)
    with (
        ExitStack() as held,
        Ahead(reader, reads, settings.device) as ahead,
        Landing(most, settings.devices) as landing,
        Behind() as behind,
    ):
        units, store = Units(reader, ahead, landing, plan, settings), None
        for number, (name, decisions) in enumerate(jobs[start:], start):
            if store is None and ids_WS is not None and number > 0:
                store = held.enter_context(closing(StreamStore(units, journal, ids_WS, limits)))
                store.load(number)
                watcher.note(str(store.placement))
            progress = partial(watcher.phase, name)
            result = _compute(units, number, decisions, store, progress)
            _require_sane(result)
            progress("writing", 1.0)
            behind.wait()
            leaving = store if store is not None and number + 1 < len(jobs) and store.due else None
            if leaving is not None:
                leaving.hold()
            written += sum(tensor.nbytes for tensor in result.tensors.values())
            behind.submit(partial(_put_away, journal, number, name, shards, result, leaving, watcher))
            del result
        behind.wait()
        write_wait = behind.waited
        if store is not None:
            write_wait += store.waited
        watcher.end(Traffic(ahead.nbytes, ahead.waited, written, write_wait))


def _compute(
    units: Units, number: int, decisions: list[Decision], store: StreamStore | None, progress: Progress
) -> UnitResult:
    """The result of a unit; `store` for those that are calibrated."""
    try:
        if store is None:
            return units.plain(decisions, progress)
        if number <= units.plan.config.num_layers:
            return units.layer(number - 1, decisions, store.streams, progress)
        return units.head(decisions, store.streams, progress)
    except torch.OutOfMemoryError:
        device = units.settings.device
        takes = f"a layer takes about {decimal(store.placement.device)}, " if store and device.type == "cuda" else ""
        raise UserError(
            f"{device}: out of memory; {takes}{decimal(free_memory(device))} are free or allowed: "
            "free memory there or raise --max-gpu-memory, then --resume"
        ) from None


def _put_away(
    journal: Journal, number: int, name: str, shards: list[Shard], result: UnitResult, store: StreamStore | None,
    watcher: Watcher,
) -> None:  # fmt: skip
    """Make a unit safe: the streams that leave it, if `store` is given (the next unit waits for that), its shards, then
    the mark."""
    if store is not None:
        try:
            store.save(number + 1)
        finally:
            store.release()
    written = _write(journal.folder, shards, result)
    journal.commit(number, _record(name, result, written))
    if store is not None:
        journal.drop_streams(number + 1)
    watcher.done(_summary(name, result, written))


def _require_sane(result: UnitResult) -> None:
    """Raises UserError for a weight whose error overflows: no value is NaN or infinite, but some are far too large."""
    for module, record in result.records.items():
        if not math.isfinite(record.error):
            raise UserError(f"{module}.weight: holds values far too large for a weight; the file is damaged")


def _write(folder: Path, shards: list[Shard], result: UnitResult) -> list[ShardRecord]:
    """Write the shards that this unit fills; a shard belongs to one unit."""
    written = []
    for shard in shards:
        if shard.names[0] in result.tensors:
            part = {name: result.tensors[name] for name in shard.names}
            written.append(write_safetensors(folder / shard.file, part, {"format": "pt"}))
    return written


def _record(name: str, result: UnitResult, written: list[ShardRecord]) -> dict:
    return {
        "unit": name,
        "shards": {r.file: {"bytes": r.nbytes, "sha256": r.sha256} for r in written},
        "tensors": {module: asdict(record) for module, record in result.records.items()},
        "expert_tokens": result.expert_tokens,
    }


def _summary(name: str, result: UnitResult, written: list[ShardRecord]) -> UnitDone:
    errors = {module: r.error for module, r in result.records.items()}
    worst = max(errors, key=errors.get, default=None)
    return UnitDone(
        name=name,
        nbytes=sum(r.nbytes for r in written),
        mean_error=sum(errors.values()) / len(errors) if errors else None,
        worst_error=errors.get(worst),
        worst_tensor=worst,
        fallbacks=result.fallbacks + [f"{module}: {r.fallback}" for module, r in result.records.items() if r.fallback],
    )
