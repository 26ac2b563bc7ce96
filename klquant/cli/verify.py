"""`klquant verify OUT`: read all of a checkpoint and say whether it is whole."""

from pathlib import Path

import click

from klquant.checkpoint.index import require_folder
from klquant.cli.main import Failure


@click.command("verify")
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Check a checkpoint, quantized or not: every tensor there once, shapes, finite values, positive scales, hashes of
    the files, a config that fits.

    Exit code 0 and one line when it is good; 1 and a line for each problem when it is not.
    """
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        hint = f"; {unfinished} is a run to go on with: klquant quantize … --resume" if unfinished.is_dir() else ""
        require_folder(folder, f"no such folder{hint}")

    from klquant.checkpoint.reader import CheckpointReader
    from klquant.checkpoint.verify import verify
    from klquant.cli.render import console
    from klquant.core.units import decimal

    with console().status("reading every tensor"):
        problems = verify(folder)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise Failure(f"{folder}: {len(problems):,} problem{'s' * (len(problems) > 1)}", 1)
    tensors = CheckpointReader.open(folder).tensors
    files = len({info.shard for info in tensors.values()})
    size = decimal(sum(info.nbytes for info in tensors.values()))
    click.echo(f"{folder}: good: {len(tensors):,} tensors, {files} file{'s' * (files > 1)}, {size}; {_hashed(folder)}")


def _hashed(folder: Path) -> str:
    """What is known of the files, when nothing is wrong."""
    from klquant.evaluate.quantization import read_provenance

    provenance = read_provenance(folder)
    if provenance is None:
        return "no hashes to compare with"
    which = "files" if "files" in provenance else "weight files"  # older outputs list only those
    return f"the {which} are as they were written"
