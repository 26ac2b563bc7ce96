"""Matplotlib figures as inline SVG that follows the page: its colours, its font, light and dark.

A figure is drawn in stand-in colours, which become the page's CSS variables (`page.css`), and its text stays text. What
matplotlib cannot write, a tooltip, is added by the artist's id.
"""

import io
from collections.abc import Callable

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klquant.report.inline import inline

INK, MUTED, RULE, PAPER, FLOOR = (f"#b0000{i}" for i in range(5))
SERIES = tuple(f"#a0000{i}" for i in range(7))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_MARKERS = ("x", "+", (6, 2, 0), (3, 2, 0))  # crosses, of two, three and one and a half strokes
_VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)", FLOOR: "var(--floor)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)},
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "klquant", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "font.family": "DejaVu Sans", "font.size": 11, "axes.labelsize": 11, "axes.titlesize": 11,
    "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "text.color": INK, "axes.labelcolor": MUTED,
    "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.edgecolor": RULE, "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": RULE,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.6, "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}  # fmt: skip
_POINTS = 72  # matplotlib's SVG unit is a point, so that a figure of w units is w / 72 inches wide


class Canvas:
    """What a painter gets: axes, and `tip` to say what an artist stands for."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure, self.axes = figure, axes
        self.tips: dict[str, str] = {}

    def tip(self, artist: Artist, text: str) -> None:
        key = f"tip-{len(self.tips)}"
        artist.set_gid(key)
        self.tips[key] = text


def draw(name: str, alt: str, width: int, height: int, paint: Callable[[Canvas], None]) -> Markup:
    """The SVG of what `paint` draws, `width` × `height` units (CSS pixels at its natural size).

    `name`: unique on the page. `alt`: what a screen reader says.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / _POINTS, height / _POINTS), dpi=_POINTS)
        FigureCanvasAgg(figure)
        canvas = Canvas(figure, figure.add_subplot())
        paint(canvas)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(inline(buffer.getvalue(), name, alt, _VARIABLES, canvas.tips))
