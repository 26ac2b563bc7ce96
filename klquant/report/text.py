"""The report as Markdown and as JSON, for those who read it elsewhere or reckon on."""

from klquant.evaluate.result import MemoryAt
from klquant.recipe.memory import CARDS
from klquant.report.comparison import Choice, Comparison
from klquant.report.content import content
from klquant.report.table import Table, escape, markdown

SCHEMA = 1


def as_markdown(c: Comparison) -> str:
    """All tables of the page but those of single variants; no plots."""
    said = content(c)

    def section(title: str, *tables: Table, text: list[str] | None = None) -> list[str]:
        return [f"## {title}\n", *(f"{escape(line)}\n" for line in text or []), *map(markdown, tables)]

    return "\n".join([
        f"# {escape(said.title)}: accuracy against size\n",
        f"{escape(said.lead)}\n",
        *section("Choose", said.choice, said.summary, text=[said.floor]),
        *(f"- {escape(note)}\n" for note in said.notes),
        *section("Quality against the reference", *said.quality, text=said.close),
        *(section("Tasks", *said.tasks) if said.tasks else []),
        *section("Where it errs", *([said.classes] if said.classes else []), *said.sensitivity,
                 text=[f"{v.name}: {v.fallbacks}" for v in said.variants]),
        *section("Size", *said.sizes),
        *section("Provenance", said.common, *(v.made for v in said.variants)),
    ])  # fmt: skip


def as_json(c: Comparison) -> dict:
    """What the report concludes, beside the results it concludes it from."""
    fronts = {
        "disk": {v.name for v in c.front(lambda v: v.disk)},
        "memory": {v.name for v in c.front(lambda v: v.memory(c.plot_context).total)},
    }
    return {
        "schema_version": SCHEMA,
        "kind": "klquant-report",
        "contexts": c.contexts,
        "memory_context": c.plot_context,
        "choices": {card: [_choice(choice) for choice in c.choices(card)] for card in CARDS},
        "too_close": [
            {"variants": [a.name, b.name], "why": "inside the floor" if noise else "ranges overlap"}
            for a, b, noise in c.too_close()
        ],
        "floor": c.floor and c.floor.model_dump(mode="json"),
        "variants": [
            {
                "name": v.name,
                "baseline": v.is_baseline,
                "inside_floor": c.inside_floor(v.result.overall),
                "times_floor": c.times_floor(v.result.overall),
                "on_front": {kind: v.name in names for kind, names in fronts.items()},
                "result": v.result.model_dump(mode="json"),
            }
            for v in c.variants
        ],
        "sensitivities": [s.model_dump(mode="json") for s in c.sensitivities],
    }


def _choice(choice: Choice) -> dict:
    memory: MemoryAt | None = choice.memory
    return {
        "context": choice.context,
        "variant": choice.variant and choice.variant.name,
        "memory": memory and memory.model_dump(mode="json"),
    }
