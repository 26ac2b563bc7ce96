"""Tables of a plan for the terminal; plain text of 100 columns on a pipe."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klquant.checkpoint.names import TensorClass
from klquant.core.spec import WHOLE_ROW
from klquant.core.units import decimal, tokens
from klquant.recipe.memory import GIB, Memory, offloaded
from klquant.recipe.plan import Plan
from klquant.recipe.rows import Row, plan_rows, spell_layers
from klquant.recipe.targets import TARGETS

PIPE_WIDTH = 100
WIDE = 130  # columns from which reasons stand beside their row instead of below the table


def console() -> Console:
    """stdout: the terminal's width, or PIPE_WIDTH where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_table(out: Console, table: Table) -> None:
    """With every figure whole: a terminal narrower than that breaks the lines."""
    width, unbounded = out.width, out.options.update(max_width=10 * PIPE_WIDTH)
    for column in table.columns:
        if column.no_wrap:
            cells = [column.header, column.footer, *column.cells]
            column.min_width = max(out.measure(cell, options=unbounded).maximum for cell in cells)
    out.width = max(width, out.measure(table, options=unbounded).minimum)
    out.print(table)
    out.width = width


def count(number: int) -> str:
    """49.12 B parameters, 61.7 M."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def print_plan(out: Console, plan: Plan, memory: list[Memory], model: str) -> None:
    """Everything `klquant plan` says, in the order a reader asks: what, how small, what it needs."""
    config, rows, whole, wide = plan.config, plan_rows(plan), plan.part(), out.width >= WIDE
    out.print(Text(model, style="bold", overflow="fold"))
    out.print(Text(
        f"{count(whole.weights)} parameters, {config.num_layers} layers, {config.num_experts} experts "
        f"({config.top_k} a token)", style="dim"))  # fmt: skip
    out.print(Text.assemble("recipe ", (plan.recipe.name, "bold"), (f"  {plan.recipe.description}", "dim")))
    out.print(Text.assemble("target ", (plan.target, "bold"), (f"  {TARGETS[plan.target].title}", "dim")))
    section(out, "Tensors", _tensor_table(plan, rows, wide))
    if not wide:
        section(out, "Why", _reasons(rows))
    _print_changes(out, plan)
    section(out, "Bits a weight", _bits_table(plan))
    for title, bits in (("all on the card, 16-bit cache", 16), ("embedding in host memory, 8-bit cache", 8)):
        section(out, f"Memory to run, GiB: {title}", _memory_table([m for m in memory if m.cache_bits == bits]))
    out.print()
    out.print(Text(
        "For one sequence. Workspace is an estimate (activations, CUDA context, kernels, slack); the other parts are "
        "exact. Two cards split the layers, and each needs its workspace.", style="dim"))  # fmt: skip
    least = min(memory, key=lambda m: m.total)
    if aside := offloaded(plan.config, plan.weight_sizes, least):
        cards = ", ".join(f"{name} with {size / GIB:.1f} GiB" for name, size in reversed(aside.items()))
        out.print(Text(
            f"Slower, with experts in the host's memory ({tokens(least.context)}, as in the last table): {cards} of "
            "them.", style="dim"))  # fmt: skip


def section(out: Console, title: str, table: Table) -> None:
    """A title and its table."""
    out.print()
    out.print(Text(title, style="bold"))
    print_table(out, table)


def new_table() -> Table:
    """Without columns, in the look of all tables that have a title."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", footer_style="bold")


def _tensor_table(plan: Plan, rows: list[Row], wide: bool) -> Table:
    table, whole = new_table(), plan.part()
    table.show_footer = True
    table.add_column("class", "whole model", no_wrap=True)
    table.add_column("count", f"{len(plan.decisions):,}", justify="right", no_wrap=True)
    table.add_column("bits", justify="right", no_wrap=True)
    table.add_column("group", justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    table.add_column("before", decimal(whole.bytes_before), justify="right", no_wrap=True)
    table.add_column("after", decimal(whole.bytes_after), justify="right", no_wrap=True)
    if wide:
        table.add_column("why")
    for row in rows:
        sizes = decimal(row.part.bytes_before), decimal(row.part.bytes_after)
        cells = [row.cls + _part_of(row), f"{row.count:,}", *_scheme(row), *sizes]
        table.add_row(*cells, *([row.why] if wide else []), style="" if row.spec else "dim")
    return table


def _scheme(row: Row) -> tuple[str, str, str]:
    if row.spec is None:
        return "+".join(row.dtypes), "", "keep"
    bits = f"{row.spec.bits}" if row.spec.symmetric else f"{row.spec.bits} asym"
    return bits, "row" if row.spec.group_size == WHOLE_ROW else str(row.spec.group_size), row.algorithm.upper()


def _part_of(row: Row) -> str:
    """What a row has of its class when the recipe splits it, on lines of their own."""
    roles = f"\n  {_role_names(row)}" if row.roles else ""
    return roles + (f"\n  layers {spell_layers(row.layers)}" if row.layers else "")


def _role_names(row: Row) -> str:
    return ", ".join(role.removesuffix("_proj") for role in row.roles)


def _reasons(rows: list[Row]) -> Table:
    """One line a reason, with every class that shares it."""
    table = new_table()
    table.show_header = False
    table.add_column(max_width=32)
    table.add_column()
    shared: dict[str, list[str]] = {}
    for row in rows:
        shared.setdefault(row.why, []).append(row.cls + (f" ({_role_names(row)})" if row.roles else ""))
    for why, names in shared.items():
        table.add_row(", ".join(dict.fromkeys(names)), why)
    return table


def _print_changes(out: Console, plan: Plan) -> None:
    if not plan.changes:
        return
    out.print()
    out.print(Text(f"Changed for {plan.target}", style="bold yellow"))
    for c in plan.changes:
        out.print(Text.assemble(
            f"{c.cls} {', '.join(c.roles)}: {c.count} tensors kept instead of {c.wanted}, ",
            (f"{decimal(c.extra_bytes)} larger", "yellow"), f". {c.why}."))  # fmt: skip


def _bits_table(plan: Plan) -> Table:
    table = new_table()
    table.add_column("part")
    for name in ("bits", "weights", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    whole = plan.part()
    for label, part, note in (
        ("routed experts", plan.part(TensorClass.ROUTED_EXPERTS), ""),
        ("always active", plan.always_active, "all but routed experts and embedding"),
        ("whole model", whole, f"{whole.bytes_before / whole.bytes_after:.2f}× smaller than before"),
        ("read a token", plan.read_per_token, f"always active and {plan.config.top_k} experts a layer"),
    ):
        table.add_row(label, f"{part.bits:.3f}", count(part.weights), decimal(part.bytes_after), Text(note, "dim"))
    return table


def _memory_table(memory: list[Memory]) -> Table:
    table = new_table()
    table.add_column("context", no_wrap=True)
    for name in ("weights", "latent\ncache", "KDA\nstate", "work-\nspace", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits (GB)")
    for m in memory:
        exact = (f"{part / GIB:.2f}" for part in (m.weights, m.latent_cache, m.kda_state))
        about = (f"≈{part / GIB:.1f}" for part in (m.workspace + m.runtime, m.total))
        cards = " · ".join(name.removesuffix(" GB") for name in m.fits()) or "none of these cards"
        table.add_row(tokens(m.context), *exact, *about, cards)
    return table
