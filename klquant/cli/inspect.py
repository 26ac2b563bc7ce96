"""`klquant inspect OUT`: what is stored how, and where the error is."""

import json
from pathlib import Path

import click

from klquant.checkpoint.index import require_folder
from klquant.checkpoint.names import TensorClass

JSON_SCHEMA = 1
WORST = 8


@click.command("inspect")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="Only this layer, counted from 0; role by role.")
@click.option(
    "--class",
    "cls",
    type=click.Choice([c.value for c in TensorClass]),
    metavar="CLASS",
    help=f"Only tensors of one class: {', '.join(TensorClass)}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(folder: Path, layer: int | None, cls: str | None, as_json: bool) -> None:
    """Show what a checkpoint stores how and, where klquant made it, where the error is.

    Reads headers and klquant.json, no weights. Takes any Kimi-Linear checkpoint: klquant's, another tool's
    (compressed-tensors), or the 16-bit one. An error is the share of a weight's output energy that was lost.
    """  # fmt: skip
    require_folder(folder)
    from klquant.cli.findings import find

    found = find(folder, layer, cls and TensorClass(cls))
    if as_json:
        click.echo(json.dumps(findings_json(found), indent=1))
    else:
        from klquant.cli.inspect_view import print_findings
        from klquant.cli.render import console

        print_findings(console(), found, one_layer=layer is not None, one_class=cls is not None)


def findings_json(found) -> dict:
    """The findings for machines. Errors are shares of 1; a change of a key's meaning raises `schema`."""
    from klquant.cli.findings import group, mean_error, quantiles, worst

    p = found.provenance
    measured = sorted(found.measured, key=lambda t: -t.record.error)
    return {
        "schema": JSON_SCHEMA,
        "folder": str(found.folder),
        "files": found.files,
        "missing_tensors": found.missing,
        "weights": sum(t.weights for t in found.tensors),
        "bytes": sum(t.nbytes for t in found.tensors),
        "stored": [
            {"class": cls, "stored": stored, "tensors": len(part), "weights": sum(t.weights for t in part),
             "bytes": sum(t.nbytes for t in part)}
            for (cls, stored), part in group(found.tensors, "cls", "stored").items()
        ],
        "errors": [
            {"layer": layer, "class": cls, "role": role, "tensors": len(part), "mean": mean_error(part),
             "worst": worst(part).record.error, "worst_tensor": worst(part).key.name}
            for (layer, cls, role), part in group(found.measured, "layer", "cls", "role").items()
        ],
        "worst": [{"tensor": t.key.name, **t.record.model_dump()} for t in measured[:WORST]],
        "expert_tokens": [
            {"layer": layer, **quantiles(counts), "unseen": [e for e, n in enumerate(counts) if n == 0]}
            for layer, counts in found.experts.items()
        ],
        "fallbacks": fallbacks(found),
        "provenance": p and {
            "recipe": p.recipe.get("name"),
            **p.model_dump(include={"target", "versions", "calibration", "changes"}, by_alias=True),
        },
    }  # fmt: skip


def fallbacks(found) -> list[str]:
    """The fallbacks that the tensors in question took."""
    return [f"{t.key.module}: {t.record.fallback}" for t in found.measured if t.record.fallback]
