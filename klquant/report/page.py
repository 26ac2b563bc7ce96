"""The page: one HTML file, nothing fetched, no script. And its first plot, as a file of its own."""

from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from klquant.report.comparison import Comparison
from klquant.report.content import content
from klquant.report.marks import WIDE, swatch
from klquant.report.pareto import pareto_disk, pareto_memory
from klquant.report.plots import by_domain, by_layer, by_position, expert_tokens

_FILE = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" width="{width}" '


def html(c: Comparison) -> str:
    """The report as HTML. Names and paths in the results are data: all of it is escaped."""
    environment = Environment(
        loader=PackageLoader("klquant.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    drawn = {
        "pareto": [pareto_disk(c), pareto_memory(c)],
        "domains": by_domain(c),
        "where": [by_position(c), *by_layer(c)],
        "experts": [expert_tokens(c, i) for i in range(len(c.variants))],
    }
    return environment.get_template("page.html.j2").render(
        css=Markup(_data("colours.css") + _data("page.css")), c=c, said=content(c), drawn=drawn,
        swatches=[swatch(c, i) for i in range(len(c.variants))],
    )  # fmt: skip


def svg(c: Comparison) -> str:
    """Accuracy against disk for a README or a paper: light or dark as its reader has it."""
    plot = str(pareto_disk(c).wide)
    opening, rest = plot.split(">", 1)
    opening = opening.replace("<svg ", _FILE.format(width=WIDE), 1)
    return f"{opening}><style>{_data('colours.css')}</style>{rest}\n"


def _data(name: str) -> str:
    return (resources.files("klquant.report") / name).read_text(encoding="utf-8")
