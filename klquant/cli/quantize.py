"""`klquant quantize MODEL -o OUT`: the main job, watched, and gone on with after it was stopped."""

from pathlib import Path

import click

from klquant.checkpoint.index import PROVENANCE
from klquant.cli.calibration import require_text, with_calibration
from klquant.cli.main import Failure
from klquant.cli.options import calib_tokens_option, recipe_option, target_option
from klquant.cli.spell import Size
from klquant.errors import UserError
from klquant.recipe.schema import load_recipe


@click.command("quantize")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty.")
@recipe_option
@click.option(
    "--calib",
    multiple=True,
    metavar="MIX|FILE",
    help="Calibration text: a mix (default, tiny), self (sampled from the model itself), a .txt, .jsonl or "
    ".parquet file, or a folder of them; several if given several times.  [default: the recipe's]",
)
@target_option
@click.option(
    "--device",
    "--devices",
    metavar="cpu|cuda|cuda:N,…",
    help="Where to compute; several cards share the work.  [default: cuda, or cpu without a GPU]",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped.")
@click.option("--max-shard-size", type=Size(), help="Largest output file.  [default: 5GB]")
@calib_tokens_option
@click.option(
    "--window", type=click.IntRange(min=2), metavar="N", help="Tokens in a calibration window.  [default: the recipe's]"
)
@click.option("--max-gpu-memory", type=Size(), help="Most memory to use on a card.  [default: what is free]")
@click.option("--max-cpu-memory", type=Size(), help="Most host memory to use.  [default: what is free]")
def command(
    model: str, out: Path, recipe: str, calib: tuple[str, ...], target: str, device: str | None, resume: bool,
    max_shard_size: int | None, calib_tokens: int | None, window: int | None, max_gpu_memory: int | None,
    max_cpu_memory: int | None,
) -> None:  # fmt: skip
    """Quantize MODEL, a checkpoint folder or a hub id (owner/name), into a new folder.

    Work goes layer by layer and lies in OUT.unfinished meanwhile. However it was stopped, the same command with
    --resume goes on from the last finished layer and ends with the same bytes.
    """
    chosen = with_calibration(load_recipe(recipe), calib_tokens, window, "--window")
    if resume and (out / PROVENANCE).exists():
        raise UserError(f"{out}: is finished already; `klquant verify {out}` tells whether it is whole")

    from klquant.cli.fetch import open_model
    from klquant.core.device import default_device, pick_devices
    from klquant.pipeline.journal import Journal
    from klquant.pipeline.placement import Limits
    from klquant.pipeline.room import Room, require_room
    from klquant.pipeline.run import SHARD_BYTES, RunOptions

    options = RunOptions(
        calib=",".join(calib) or None,
        device=device or default_device(),
        resume=resume,
        shard_bytes=max_shard_size or SHARD_BYTES,
        limits=Limits(gpu=max_gpu_memory, cpu=max_cpu_memory),
    )
    devices = pick_devices(options.device)
    if max_gpu_memory is not None and devices[0].type == "cpu":
        raise UserError("--max-gpu-memory: this run computes on the CPU; leave it out, or name a card with --device")
    with Journal(out) as journal:
        begun = journal.find(resume) is not None

    def check(plans, folder: Path) -> None:
        require_text(plans[0], options.calib)
        if journal.complete:  # a name is all that is missing
            return
        room = Room.of(plans[0], folder, options)
        room = room.to_go_on() if begun else room
        require_room([room], out, [journal.folder], "the result takes", "choose another output")

    reader, (plan,) = open_model(model, [chosen], target, check)
    _run(model, reader, plan, out, options)


def _run(model: str, reader, plan, out: Path, options) -> None:
    from klquant.cli.live import watcher
    from klquant.cli.pace import Work
    from klquant.cli.render import console
    from klquant.cli.summary import print_after, print_before
    from klquant.pipeline.journal import Journal
    from klquant.pipeline.run import quantize
    from klquant.pipeline.units import units_of

    screen = console()
    print_before(screen, model, plan, out, options)
    works = {name: Work.of(decisions) for name, decisions in units_of(plan).items()}
    try:
        with watcher(screen, works) as shown:
            provenance = quantize(reader, plan, out, options, shown)
    except KeyboardInterrupt:
        kept = "the same command with --resume goes on" if Journal(out).folder.exists() else "nothing was written"
        raise Failure(f"interrupted: {kept}", 130) from None
    print_after(screen, model, plan, out, provenance, shown.pace.gone, shown.traffic)
