"""What makes a folder of finished units a checkpoint: side files, index, provenance, config.json last, and its name."""

import hashlib
from dataclasses import asdict

from klquant.checkpoint.index import CONFIG, INDEX, PROVENANCE
from klquant.checkpoint.quantized import quantization_config
from klquant.checkpoint.reader import CheckpointReader
from klquant.checkpoint.writer import Shard, copy_side_files, json_bytes, write_index, write_json
from klquant.core.versions import versions
from klquant.pipeline.journal import Journal
from klquant.pipeline.text import Text
from klquant.pipeline.units import units_of
from klquant.recipe.plan import Plan

SCHEMA = 1


def finish(reader: CheckpointReader, plan: Plan, journal: Journal, shards: list[Shard], text: Text | None) -> dict:
    """Write what makes the folder a checkpoint, config.json last, and give it its name."""
    folder = journal.folder
    copied = copy_side_files(reader.folder, folder)
    write_index(folder, shards, plan.stored_sizes())
    specs = {module: spec for module, spec in plan.specs().items() if spec is not None}
    kept = [module for module, spec in plan.specs().items() if spec is None]
    config = {k: v for k, v in reader.raw_config.items() if k != "quantization_config"}
    if specs:
        config["quantization_config"] = quantization_config(specs, kept, reader.config)
    files = {name: _record((folder / name).read_bytes()) for name in (*copied, INDEX)}
    files[CONFIG] = _record(json_bytes(config))
    write_json(folder / PROVENANCE, _provenance(plan, journal, text) | {"files": files})
    write_json(folder / CONFIG, config)
    return journal.finish()


def _record(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _provenance(plan: Plan, journal: Journal, text: Text | None) -> dict:
    """Everything one needs to repeat or judge the run. No times, no host: equal runs write equal files."""
    records = [journal.record(number) for number in range(len(units_of(plan)))]
    tensors = {module: r for record in records for module, r in record["tensors"].items()}
    calibration = None
    if text is not None:
        ids = text.calibration.ids
        calibration = {
            "text": text.spec,
            "sha256": text.calibration.sha256,
            "windows": ids.shape[0],
            "window": ids.shape[1],
            "sources": [asdict(s) for s in text.calibration.sources],
            "notes": list(text.calibration.notes),
            "coverage": text.coverage and asdict(text.coverage),
        }
    return {
        "schema": SCHEMA,
        "purpose": journal.found,
        "versions": versions(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "target": plan.target,
        "changes": [
            {"class": c.cls, "roles": c.roles, "count": c.count, "why": c.why, "extra_bytes": c.extra_bytes}
            for c in plan.changes
        ],
        "calibration": calibration,
        "tensors": tensors,
        "expert_tokens": {r["unit"].removeprefix("layer "): r["expert_tokens"] for r in records if r["expert_tokens"]},
        "fallbacks": [f"{module}: {r['fallback']}" for module, r in tensors.items() if r["fallback"]],
        "shards": {file: shard for record in records for file, shard in record["shards"].items()},
    }
