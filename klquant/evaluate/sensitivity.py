"""Which part of a model costs how much: KLD when only one class, or one layer, is quantized and all else is in 16 bits.

Parts are rounded to nearest on a recipe's grids, which needs no calibration, or taken from a checkpoint that is already
quantized, codes and all. KLD does not add up over parts, so everything together is measured as well.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from klquant.checkpoint.writer import write_json
from klquant.core.spec import WeightSpec
from klquant.errors import UserError
from klquant.evaluate.baselines import plan_for, rounding
from klquant.evaluate.options import By, EvalOptions, Silent, Watcher
from klquant.evaluate.passes import Passes
from klquant.evaluate.quantization import require_own_scales
from klquant.evaluate.result import Reference, difference, require_output
from klquant.evaluate.run import (
    CACHE,
    UNFINISHED,
    data_of,
    made_of,
    open_model,
    overlap_of,
    prepare,
    provenance_of,
)
from klquant.evaluate.sensitivity_result import Entry, Quantizer, Sensitivity, load_sensitivity
from klquant.evaluate.size import describe
from klquant.evaluate.source import DeviceSource, Mixed, Rounded, Source
from klquant.evaluate.tensor_parts import TensorPart, parts
from klquant.evaluate.windows import WindowFolder
from klquant.recipe.schema import Recipe

Clock = Callable[[], float]


@dataclass(frozen=True)
class Substitute:
    """All matrices that are quantized: their grids by module, their values, and what the result says of them.
    `notes` are for the user."""

    specs: dict[str, WeightSpec | None]
    source: Source
    said: Quantizer
    notes: list[str]


def sensitivity(
    model: Path, quantizer: Recipe | Path, out: Path, by: By, options: EvalOptions, minutes: float | None = None,
    watcher: Watcher | None = None, clock: Clock = time.monotonic,
) -> Sensitivity:  # fmt: skip
    """Evaluate the 16-bit checkpoint `model` with one part at a time quantized, by a recipe or as in a checkpoint.

    The result is written to `out` after every part; what an earlier call has measured is kept. Within `minutes` a part
    is begun only if the longest one so far would still fit, but each call measures one at least. Raises UserError for
    what the user can mend.
    """
    started, watcher = clock(), watcher or Silent()
    require_output(out, Sensitivity)
    reader = open_model(model)
    reader.files.require_16_bits()
    base = DeviceSource(reader, torch.device(options.device))
    quantized = rounded(base, quantizer) if isinstance(quantizer, Recipe) else stored(base, quantizer)
    passes = prepare(reader, reader, options, watcher)
    overlap = [] if isinstance(quantizer, Recipe) else overlap_of(quantizer, passes.text)
    notes = [*passes.text.notes, *quantized.notes, *overlap]
    for note in notes:
        watcher.note(note)
    reference = Reference(
        checkpoint=describe(reader, model), arithmetic=passes.arithmetic(passes.dtype), store=passes.store
    )
    found = Sensitivity(
        by=by, quantizer=quantized.said, arithmetic=reference.arithmetic, reference=reference,
        data=data_of(passes.text, options), floor=None, entries=[], left_out=[], notes=notes,
        provenance=provenance_of(options, 0.0, 0),
    )  # fmt: skip
    found = _resumed(out, found)
    cache = passes.reference(base, reference, options.reference_cache or out.parent / CACHE)
    floor, computed = passes.known_floor(base, reference, cache), 0
    nbytes = {name: info.nbytes for name, info in base.reader.files.tensors.items()}
    order = parts(reader.config, quantized.specs, by, nbytes)
    for number, part in enumerate(order, 1):
        if any(e.part.name == part.said.name for e in found.entries):
            continue
        longest = max((e.seconds for e in found.entries), default=0.0)
        if computed and minutes is not None and clock() - started + longest > 60 * minutes:
            break
        stage = f"{number} of {len(order)}: {part.said.name}"
        mixed = Mixed(base, quantized.source, part.names, f"{model} with {part.said.name} quantized")
        entry, tokens = _measure(passes, mixed, part, quantized.said, cache, out, stage)
        computed += tokens
        entries = {e.part.name: e for e in (*found.entries, entry)}
        names = [p.said.name for p in order]
        found = found.model_copy(update={
            "floor": floor, "entries": [entries[name] for name in names if name in entries],
            "left_out": [name for name in names if name not in entries],
            "provenance": provenance_of(options, clock() - started, computed),
        })  # fmt: skip
        write_json(out, found.model_dump(mode="json"))
        shutil.rmtree(_unfinished(out))
    return found


def rounded(base: DeviceSource, recipe: Recipe) -> Substitute:
    """The matrices that `recipe` quantizes, rounded to nearest on its grids whatever its algorithms are."""
    specs = plan_for(base.reader, recipe).specs()
    source = Rounded(base.reader, rounding("rtn", specs), base.device, f"{base.name} rounded")
    grids = hashlib.sha256(repr([(module, str(spec)) for module, spec in specs.items()]).encode()).hexdigest()
    said = Quantizer(method="rtn", name=f"recipe {recipe.name}", recipe=recipe.name, fingerprint=grids)
    return Substitute(specs, source, said, [])


def stored(base: DeviceSource, folder: Path) -> Substitute:
    """The matrices of a quantized checkpoint of the same model, as they are.

    Raises UserError unless each of them can stand in `base` alone.
    """
    reader = open_model(folder)
    if reader.schemes is None:
        raise UserError(f"{folder}: is not quantized; give a checkpoint of klquant quantize, or --recipe")
    require_own_scales(reader, base.reader)
    made, notes = made_of(reader)
    said = Quantizer(
        method="checkpoint", name=str(folder), recipe=made and made.recipe, fingerprint=reader.files.fingerprint()
    )
    return Substitute(reader.specs, DeviceSource(reader, base.device), said, notes)


def _resumed(out: Path, new: Sensitivity) -> Sensitivity:
    """`new` with what the file `out` has measured already. Raises UserError where that is of other work."""
    if not out.exists():
        return new
    old = load_sensitivity(out)
    reason = difference(new, old)
    if new.by != old.by:
        reason = f"by {old.by}, not by {new.by}"
    elif new.quantizer.fingerprint != old.quantizer.fingerprint:
        reason = f"quantized otherwise: {old.quantizer.name}"
    if reason is not None:
        raise UserError(f"{out}: holds another measurement ({reason}); choose another output, or delete it")
    return new.model_copy(update={name: getattr(old, name) for name in ("floor", "entries", "left_out", "provenance")})


def _measure(
    passes: Passes, mixed: Source, part: TensorPart, said: Quantizer, cache: WindowFolder, out: Path, stage: str
) -> tuple[Entry, int]:
    """One entry, and how many tokens were computed for it now."""
    purpose = passes.purpose(said.fingerprint, passes.dtype) | {"reference": cache.folder.name, "part": part.said.name}
    scored = passes.compare(mixed, passes.dtype, cache, WindowFolder.open(_unfinished(out), purpose), stage)
    figures, tokens = passes.figures(scored, mixed), passes.text.ids_WS.numel()
    seconds = scored.seconds * tokens / scored.tokens if scored.tokens else 0.0
    return Entry(part=part.said, overall=figures["overall"], domains=figures["domains"], seconds=seconds), scored.tokens


def _unfinished(out: Path) -> Path:
    """Windows of the part that is being measured."""
    return out.with_name(out.name + UNFINISHED)
