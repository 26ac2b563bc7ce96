"""`klquant report RESULT…`: what `klquant eval` found, as a page to decide from."""

import json
import os
from contextlib import suppress
from pathlib import Path

import click

from klquant.errors import UserError


@click.command("report")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The report; needed for HTML.  [default: printed]")
@click.option("--md", "form", flag_value="md", help="Markdown instead of HTML.")
@click.option("--json", "form", flag_value="json", help="JSON instead of HTML.")
@click.option("--svg", "form", flag_value="svg", help="Only the plot of accuracy against disk, as SVG.")
def command(results: tuple[Path, ...], out: Path | None, form: str | None) -> None:
    """Compare RESULTs, files of `klquant eval` against one reference on the same text, in one report.

    Files of `klquant sensitivity` on that text may be among them: what each part of the model costs.

    HTML is a single file that fetches nothing: sizes and the cards they fit, quality with its noise floor, where the
    error is, plots of accuracy against size, and what it takes to repeat it.
    """
    if form is None and out is None:
        raise click.UsageError("HTML needs a file: -o report.html (or --md, --json, --svg to print)")
    from klquant.report.comparison import Comparison

    write_report(Comparison.load(results), out, form)


def write_report(comparison, out: Path | None, form: str | None) -> None:
    """Write HTML (None), "md", "json" or "svg" to `out`, or print it."""
    from klquant.report.text import as_json, as_markdown

    if form == "md":
        text = as_markdown(comparison)
    elif form == "json":
        text = json.dumps(as_json(comparison), indent=1) + "\n"
    else:
        require_plots()
        from klquant.report import page

        text = page.svg(comparison) if form == "svg" else page.html(comparison)
    if out is None:
        click.echo(text, nl=False)
        return
    part = out.parent / f".{out.name}.part"
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None


def require_plots() -> None:
    """Raises UserError without the plotting library."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'klquant[report]'; --md and --json do without") from None
