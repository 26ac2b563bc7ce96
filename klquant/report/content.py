"""All that a report says, whatever form it is given."""

from collections.abc import Sequence
from dataclasses import dataclass

from klquant.core.units import decimal
from klquant.evaluate.result import DomainText
from klquant.report.comparison import Comparison
from klquant.report.provenance import common_table, variant_table
from klquant.report.sensitive import sensitivity_tables
from klquant.report.table import Table
from klquant.report.tables import choice_table, closeness, memory_tables, quality_table, size_table, summary_table
from klquant.report.tasks import task_tables
from klquant.report.where import class_table, expert_table, fallbacks, layer_table


@dataclass(frozen=True)
class VariantContent:
    """One variant by itself. `summary` is what its closed section shows."""

    name: str
    index: int
    fallbacks: str
    errors: Table | None
    experts: Table | None
    made: Table


@dataclass(frozen=True)
class Content:
    """Tables and sentences, in the order of the page."""

    title: str
    lead: str
    floor: str
    choice: Table
    summary: Table
    notes: list[str]
    domains: str
    close: list[str]
    quality: list[Table]
    tasks: list[Table]
    sizes: list[Table]
    classes: Table | None
    sensitivity: list[Table]
    variants: list[VariantContent]
    common: Table


def content(c: Comparison) -> Content:
    domains = list(c.first.domains) if len(c.first.domains) > 1 else []
    return Content(
        title=c.reference.checkpoint.name,
        lead=_lead(c),
        floor=_floor(c),
        choice=choice_table(c),
        summary=summary_table(c),
        notes=_notes(c),
        domains=_domain_plots(c, [None, *domains]),
        close=closeness(c),
        quality=[quality_table(c, domain) for domain in (None, *domains)],
        tasks=task_tables(c),
        sizes=[size_table(c), *memory_tables(c)],
        classes=class_table(c),
        sensitivity=sensitivity_tables(c),
        variants=[
            VariantContent(v.name, i, fallbacks(v), layer_table(c, v), expert_table(v),
                           variant_table(v))
            for i, v in enumerate(c.variants)
        ],
        common=common_table(c),
    )  # fmt: skip


def _lead(c: Comparison) -> str:
    data, overall = c.first.data, c.first.overall
    whole = decimal(c.reference.checkpoint.size.tensors)
    kinds = ((len(c.takable), "variant"), (len(c.variants) - len(c.takable), "baseline"))
    counts = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for count, kind in kinds if count)
    return (
        f"{counts} of a model that takes {whole} in 16 bits, "
        f"compared with it at {overall.positions:,} tokens: {_domains(data.domains)}, in windows of {data.window:,}."
    )


def _domains(domains: list[DomainText]) -> str:
    names = [d.name for d in domains]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _floor(c: Comparison) -> str:
    start = "KLD is the Kullback–Leibler divergence of the next token's distribution from the reference's, in nats. "
    if c.floor is None:
        return start + "No noise floor was measured (klquant eval --floor), so small differences may be arithmetic."
    return start + (f"The noise floor is {c.floor.what}: a difference inside it says nothing about a quantization.")


def _domain_plots(c: Comparison, domains: Sequence[str | None]) -> str:
    """What the plots of these domains show (None: all text)."""
    variants = [v.result.overall if d is None else v.result.domains[d] for d in domains for v in c.variants]
    floors = [q for d in domains if (q := c.floor_quality(d)) is not None and q.kld.mean > 0]
    start = "Mean KLD and its 95 % range." if any(q.kld.low is not None for q in variants) else "Mean KLD."
    if not floors:
        return start
    band = ", the band its range" if any(q.kld.low is not None for q in floors) else ""
    return f"{start} The dashed line is the noise floor{band}."


def _notes(c: Comparison) -> list[str]:
    """Each result's notes, once, with the variants they are about."""
    about: dict[str, list[str]] = {}
    for v in c.variants:
        for note in v.result.notes:
            about.setdefault(note, []).append(v.name)
    everyone = len(c.variants)
    beaten = [f"{b.name}, a baseline, takes no more disk than {v.name} and is nearer." for b, v in c.beaten()]
    return beaten + [note if len(names) == everyone else f"{', '.join(names)}: {note}" for note, names in about.items()]
