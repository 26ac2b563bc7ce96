"""The calibration text of a run: drawn once, and found again by a resumed run without a second probe or sampling.

What was drawn lies in the unfinished folder. Text that still has a source is read again and must be the same; text
that the model itself made is taken from there, for sampling it takes long and a GPU may sample other tokens.
"""

import json
from dataclasses import asdict, dataclass

from klquant.calibrate.coverage import Coverage, draw_windows, whole_windows
from klquant.calibrate.sample import sample_windows
from klquant.calibrate.text import SELF, Calibration, SourceInfo, open_pool
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.calibrate.walk import WalkSettings
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.writer import write_safetensors
from klquant.errors import UserError
from klquant.pipeline.journal import OTHER_TEXT, Journal
from klquant.pipeline.report import Watcher
from klquant.recipe.schema import CalibrationParams

TEXT = "text.safetensors"


@dataclass(frozen=True)
class Text:
    """Calibration windows of what `spec` names, and the probe that said how many; `asked` were asked for."""

    spec: str
    calibration: Calibration
    coverage: Coverage | None
    asked: int


def draw_text(
    spec: str, reader: CheckpointReader, params: CalibrationParams, settings: WalkSettings, watcher: Watcher,
    journal: Journal,
) -> Text:  # fmt: skip
    """The text of a new run, or of the one that `journal` goes on with. `spec` as in `open_pool`.

    Raises UserError for text that is missing or too short, and when the run to go on with used other text.
    """
    kept = _kept(journal) if journal.found else None
    if kept is not None and SELF in (spec, kept.spec):
        if spec != kept.spec:
            raise journal.refusal(_other_text(kept.spec, spec))
        return kept

    def progress(phase: str, fraction: float) -> None:
        watcher.phase("calibration", phase, fraction)

    progress("reading text", 0.0)
    tokenizer = load_tokenizer(reader.folder)

    def sample(sequences: int, length: int, seed: int):
        progress("sampling text from the model", min(1.0, (seed - params.seed) * sequences * length / params.tokens))
        return sample_windows(reader, tokenizer, sequences, length, seed, settings)

    pool = open_pool(spec, tokenizer, reader.config, window=params.window, seed=params.seed, generate=sample)
    if kept is not None:
        pool.take(kept.asked)
        if pool.calibration().sha256 != kept.calibration.sha256:
            raise journal.refusal(_other_text(kept.spec, spec))
        return kept

    calibration, coverage = draw_windows(pool, reader, params, settings, progress)
    return Text(spec, calibration, coverage, whole_windows(params)[0] if coverage is None else coverage.wanted)


def _other_text(then: str, now: str) -> str:
    """A name may have moved with its text; where the names are the same, what they name has changed."""
    return OTHER_TEXT if then == now else f"{OTHER_TEXT}: {then}, not {now}"


def keep_text(text: Text, journal: Journal) -> None:
    """Put a new run's text into its folder."""
    c = text.calibration
    record = {
        "spec": text.spec, "sources": [asdict(source) for source in c.sources], "sha256": c.sha256, "notes": c.notes,
        "asked": text.asked, "coverage": text.coverage and asdict(text.coverage),
    }  # fmt: skip
    tensors = {"ids": c.ids, "source_of_window": c.source_of_window}
    write_safetensors(journal.state / TEXT, tensors, {"text": json.dumps(record)})


def _kept(journal: Journal) -> Text | None:
    file = journal.state / TEXT
    if not file.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            record = json.loads(tensors.metadata()["text"])
            ids, source_of_window = tensors.get_tensor("ids"), tensors.get_tensor("source_of_window")
    except (SafetensorError, OSError):
        raise UserError(f"{file}: unreadable; delete {journal.folder} and start again") from None
    sources = tuple(SourceInfo(**source) for source in record["sources"])
    calibration = Calibration(ids, source_of_window, sources, record["sha256"], tuple(record["notes"]))
    return Text(record["spec"], calibration, record["coverage"] and Coverage(**record["coverage"]), record["asked"])
