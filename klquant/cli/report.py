"""`klquant report RESULT…`: what `klquant eval` found, as a page to decide from."""

import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import click

from klquant.errors import UserError

REPORT_START = 4096  # characters; a title is the name of a folder
_REPORT = re.compile(
    r"# [^\n]*: accuracy against size\n"
    r"|<!doctype html>.*<title>[^<\n]*: accuracy against size</title>"
    r'|\{\s*"schema_version": \d+,\s*"kind": "klquant-report"'
    r'|<svg [^>]*aria-label="Accuracy against disk',
    re.DOTALL,
)


@click.command("report")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The report; needed for HTML.  [default: printed]")
@click.option("--md", is_flag=True, help="Markdown instead of HTML.")
@click.option("--json", is_flag=True, help="JSON instead of HTML.")
@click.option("--svg", is_flag=True, help="Only the plot of accuracy against disk, as SVG.")
def command(results: tuple[Path, ...], out: Path | None, **forms: bool) -> None:
    """Compare RESULTs, files of `klquant eval` against one reference on the same text, in one report.

    Files of `klquant sensitivity` on that text may be among them: what each part of the model costs.

    HTML is a single file that fetches nothing: sizes and the cards they fit, quality with its noise floor, where the
    error is, plots of accuracy against size, and what it takes to repeat it.
    """
    asked = [form for form, given in forms.items() if given]
    if len(asked) > 1:
        raise click.UsageError("--md, --json and --svg exclude each other")
    if not asked and out is None:
        raise click.UsageError("HTML needs a file: -o report.html (or --md, --json, --svg to print)")
    if twice := [file for i, file in enumerate(results) if file.resolve() in {f.resolve() for f in results[:i]}]:
        raise UserError(f"{twice[0]}: comes twice; name each result once")
    if out is not None and out.exists() and not out.is_dir() and not _is_report(out):
        raise UserError(f"{out}: is there already and no report of klquant report; choose another output")
    from klquant.report.comparison import Comparison

    write_report(Comparison.load(results), out, asked[0] if asked else None)


def _is_report(file: Path) -> bool:
    """Whether a file begins as one of the four forms does, or is empty, and so may be written again."""
    if not file.is_file():
        return False
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            start = lines.read(REPORT_START)
    except OSError:
        return False
    return not start or _REPORT.match(start) is not None


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
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where its cache lies is no news
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'klquant[report]'; --md and --json do without") from None
