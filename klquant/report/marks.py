"""What all plots share: how variants and the noise floor look, and axes of KLD."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from klquant.evaluate.result import Quality
from klquant.report.comparison import Comparison
from klquant.report.svg import FLOOR, LINE_MARKERS, MARKERS, SERIES, Canvas, draw

NARROW, WIDE = 344, 560  # units of width: a phone's column, half a wide page
KLD = "KLD, nats a token"


@dataclass(frozen=True)
class Plot:
    """`wide`: the same for wide screens, where `narrow` would be stretched too far."""

    title: str
    caption: str
    narrow: Markup
    wide: Markup | None = None


def style(c: Comparison, index: int) -> dict:
    """Colour and marker of the variant at `index`; both, for those who cannot tell the colours. Baselines have markers
    of lines alone."""
    colour, marker = SERIES[index % len(SERIES)], MARKERS[(index + index // len(SERIES)) % len(MARKERS)]
    if c.variants[index].is_baseline:
        before = sum(v.is_baseline for v in c.variants[:index])
        return {"color": colour, "marker": LINE_MARKERS[before % len(LINE_MARKERS)], "markeredgewidth": 1.8}
    return {"color": colour, "marker": marker}


def swatch(c: Comparison, index: int) -> Markup:
    """The line and marker that stand for a variant in legends and tables."""

    def paint(canvas: Canvas) -> None:
        canvas.figure.set_layout_engine("none")
        canvas.axes.set_position((0, 0, 1, 1))
        canvas.axes.set_axis_off()
        canvas.axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], clip_on=False, **style(c, index))
        canvas.axes.set(xlim=(0, 2), ylim=(-1, 1))

    return draw(f"swatch{index}", "", 22, 10, paint)


def positive(kld: float, c: Comparison) -> float:
    """A logarithmic axis has no zero: what is not above it stands at a tenth of the least KLD that is."""
    if kld > 0:
        return kld
    return min((v.kld.mean for v in c.variants if v.kld.mean > 0), default=c.noise or 1e-6) / 10


def bars(q: Quality, mean: float) -> list[list[float]]:
    """Lengths of an error bar below and above; the lower one stays above zero."""
    return [[min(max(0.0, mean - q.kld.low), 0.999 * mean)], [max(0.0, q.kld.high - mean)]]


def floor_line(canvas: Canvas, c: Comparison, span: Callable, line: Callable, domain: str | None = None) -> None:
    """The floor's mean as a line, its range as a band."""
    q = c.floor_quality(domain)
    if q is None or q.kld.mean <= 0:
        return
    if q.kld.low is not None:
        span(max(q.kld.low, q.kld.mean / 1e3), q.kld.high, color=FLOOR, alpha=0.22, linewidth=0)
    canvas.tip(line(q.kld.mean, color=FLOOR, linewidth=1.2, dashes=(4, 2)), f"noise floor: KLD {q.kld.mean:.3g}")


def log_ticks(axis: Axis) -> None:
    """Plain numbers; more than powers of ten where those would be too few."""
    low, high = axis.get_view_interval()
    span = high / low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 30 else (1, 3) if span < 1000 else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10f}".rstrip("0").rstrip(".")))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def short(name: str) -> str:
    """A name as it fits beside or below a mark: at most 16 characters."""
    return name if len(name) <= 16 else name[:15] + "…"
