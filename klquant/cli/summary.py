"""What `klquant quantize` says before it begins and when it is done."""

import shlex
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klquant.calibrate.coverage import whole_windows
from klquant.calibrate.documents import BUILT_IN
from klquant.checkpoint.names import TensorClass
from klquant.cli.render import count
from klquant.cli.spell import duration, place
from klquant.core.device import pick_devices
from klquant.core.memory import free_memory
from klquant.core.units import decimal, percent, some
from klquant.errors import UserError
from klquant.evaluate.options import EvalOptions
from klquant.evaluate.text import require_text
from klquant.pipeline.report import Traffic
from klquant.pipeline.run import RunOptions, missing_tokenizer
from klquant.recipe.plan import Plan
from klquant.recipe.schema import CalibrationParams

# Parameters from which a calibrated run on the CPU is no matter of minutes.
LARGE = 2_000_000_000
LABEL = 13  # columns


def print_before(out: Console, model: str, plan: Plan, path: Path, options: RunOptions) -> None:
    """What will be done, and on what."""
    whole, experts = plan.part(), plan.part(TensorClass.ROUTED_EXPERTS)
    out.print(Text.assemble((model, "bold"), " → ", (str(path), "bold")), soft_wrap=not out.is_terminal)
    rows = [
        ("recipe", Text.assemble((plan.recipe.name, "bold"), f"  {plan.recipe.description}")),
        ("size", Text.assemble(
            f"{decimal(whole.bytes_before)} → ", (decimal(whole.bytes_after), "bold"),
            f", {whole.bits:.2f} bits a weight, experts {experts.bits:.2f}")),
        ("calibration", Text(_calibration(plan, options))),
        ("device", _device(plan, options)),
    ]  # fmt: skip
    if plan.changes:
        kept, cost = sum(c.count for c in plan.changes), sum(c.extra_bytes for c in plan.changes)
        rows.append(("target", Text.assemble(
            (plan.target, "bold"), f"  keeps {kept:,} tensors that the recipe quantizes, ",
            (f"{decimal(cost)} larger", "yellow"), "; `klquant plan` says which")))  # fmt: skip
    _print_rows(out, rows)
    out.print()


def print_after(
    out: Console, model: str, plan: Plan, path: Path, provenance: dict, seconds: float, traffic: Traffic | None
) -> None:
    """What came of it, and what to do next. `provenance` as in klquant.json; `traffic` where units were worked on."""
    size, files = sum(shard["bytes"] for shard in provenance["shards"].values()), len(provenance["shards"])
    plural = "s" * (files > 1)
    rows = [("size", Text.assemble(
        (decimal(size), "bold"), f" in {files} file{plural}, {plan.part().bits:.2f} bits a weight"))]  # fmt: skip
    if tensors := provenance["tensors"]:
        rows.append(("error", _errors(tensors)))
    rows += expert_lines(provenance["expert_tokens"], plan.recipe.calibration)
    if fallbacks := provenance["fallbacks"]:
        rows.append(("fallbacks", Text(f"{len(fallbacks):,}: {some(fallbacks, 2)}", "yellow")))
    if traffic is not None:
        rows.append(("disk", _disk(traffic, seconds)))
    out.print()
    out.print(Text.assemble(("done", "bold green"), f" in {duration(seconds)}"))
    _print_rows(out, rows)
    out.print()
    for command in next_commands(model, path):
        # To be copied: never broken into lines.
        out.print(Text(f"  {shlex.join(['klquant', *command])}"), soft_wrap=True)


def next_commands(model: str, path: Path) -> list[list[str]]:
    """Commands that run as they are: without a tokenizer nothing is evaluated, without `datasets` on built-in text."""
    commands = [["verify", str(path)], ["inspect", str(path)]]
    if missing_tokenizer(path) is None:
        try:
            require_text(EvalOptions.data)
            text = []
        except UserError:
            text = ["--data", BUILT_IN]
        commands.append(["eval", str(path), "--against", model, *text, "-o", f"{path}.json"])
    return commands


def expert_lines(tokens: dict[str, list[int]], params: CalibrationParams) -> list[tuple[str, Text]]:
    """How many calibration tokens the routed experts saw; those that saw none by name. `tokens`: layer → counts."""
    if not tokens:
        return []
    counts = torch.tensor([n for layer in tokens.values() for n in layer]).double()
    middle, low = int(counts.median()), int(counts.quantile(0.01))
    lines = [("experts", Text(f"{middle:,} calibration tokens for the middle expert, {low:,} at the 1st percentile"))]
    none = [f"layer {layer}: {e}" for layer, row in tokens.items() for e, n in enumerate(row) if n == 0]
    few = int(((counts > 0) & (counts < params.min_expert_tokens)).sum())
    if none:
        text = f"{len(none):,} of {len(counts):,} saw no token and use their layer's statistics: {some(none)}"
        lines.append(("", Text(text, "yellow")))
    if few:
        lines.append(("", Text(f"{few:,} of {len(counts):,} saw fewer than {params.min_expert_tokens}", "yellow")))
    return lines


def _print_rows(out: Console, rows: list[tuple[str, Text]]) -> None:
    """Labels and what belongs to them; on a pipe a line each, however long."""
    if not out.is_terminal:
        for label, text in rows:
            out.print(Text(f"{label:<{LABEL}}").append_text(text), soft_wrap=True)
        return
    table = Table.grid()
    table.add_column(style="dim", no_wrap=True, min_width=LABEL)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _calibration(plan: Plan, options: RunOptions) -> str:
    params = plan.recipe.calibration
    if not plan.needs_calibration:
        return "none: this recipe rounds each weight by itself" + "; --calib is not used" * bool(options.calib)
    least, most = whole_windows(params)
    text = f"{options.calib or params.mix}, {least * params.window:,} tokens in windows of {params.window:,}"
    if params.min_expert_tokens and most > least:
        text += f"; up to {most * params.window:,}, until rare experts get {params.min_expert_tokens}"
    return text


def _device(plan: Plan, options: RunOptions) -> Text:
    device, *others = pick_devices(options.device)
    free = f"{decimal(free_memory(device))} free"
    if device.type == "cuda":
        each = " each" if others else ""
        return Text.assemble((options.device, "bold"), f"  {torch.cuda.get_device_name(device)}, {free}{each}")
    threads = torch.get_num_threads()
    text = Text.assemble(("CPU", "bold"), f"  {threads} thread{'s' * (threads > 1)}, {free}")
    weights = plan.part().weights
    if plan.needs_calibration and weights > LARGE:
        text.append(f"; {count(weights)} weights take very long without a GPU", "yellow")
    return text


def _disk(traffic: Traffic, seconds: float) -> Text:
    """What went to and fro, and how long nothing else could go on meanwhile."""
    share = (traffic.read_wait + traffic.write_wait) / max(seconds, 1e-9)
    return Text(
        f"{decimal(traffic.read)} read, {decimal(traffic.written)} written; {duration(traffic.read_wait)} waited for "
        f"reading and {duration(traffic.write_wait)} for writing, {100 * share:.0f} % of the time"
    )


def _errors(tensors: dict[str, dict]) -> Text:
    """`tensors`: module → record."""
    errors = {module: record["error"] for module, record in tensors.items()}
    worst = max(errors, key=errors.get)
    mean = sum(errors.values()) / len(errors)
    kinds = {record["measured"] for record in tensors.values()}
    of = "of a weight's output energy" if "outputs" in kinds else "of a weight's own energy"
    return Text.assemble(
        (percent(mean), "bold"),
        f" {of} on average; at worst ",
        (percent(errors[worst]), "bold"),
        f" in {' '.join(place(worst)).strip()}",
    )
