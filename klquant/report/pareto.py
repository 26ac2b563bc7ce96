"""Accuracy against size: every variant, the front, the floor."""

from collections.abc import Callable
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

from klquant.core.units import decimal, tokens
from klquant.recipe.memory import CARDS, GIB
from klquant.report.comparison import Comparison, Variant
from klquant.report.labels import place_labels
from klquant.report.marks import KLD, NARROW, WIDE, Plot, bars, floor_line, log_ticks, positive, short, style
from klquant.report.spell import memory_unit
from klquant.report.svg import INK, MUTED, PAPER, Canvas, draw


def pareto_disk(c: Comparison) -> Plot:
    largest = max(v.disk for v in c.variants)
    unit, name = (10**9, "GB") if largest >= 10**9 else (10**6, "MB")
    return _pareto(c, "pareto-disk", "Accuracy against disk", f"disk, {name}", lambda v: v.disk / unit, {},
                   f"The reference takes {decimal(c.reference.checkpoint.size.tensors)}.")  # fmt: skip


def pareto_memory(c: Comparison) -> Plot:
    length = c.plot_context
    sizes = [v.memory(length).total for v in c.variants]
    unit, name = memory_unit(max(sizes))
    low, high = _limits([size / unit for size in sizes])
    cards = {card: gib * GIB / unit for card, (count, gib) in CARDS.items() if count == 1}
    cards = {card: size for card, size in cards.items() if low < size < high}
    caption = "All on the card, 16-bit cache, one sequence." + " Upright: what cards hold." * bool(cards)
    return _pareto(c, "pareto-memory", f"Accuracy against memory at {tokens(length)} tokens",
                   f"memory at {tokens(length)} tokens, {name}", lambda v: v.memory(length).total / unit, cards,
                   caption)  # fmt: skip


def _pareto(
    c: Comparison, name: str, title: str, axis: str, size: Callable[[Variant], float], cards: dict[str, float],
    caption: str,
) -> Plot:  # fmt: skip
    """`cards`: upright lines, by the name written at their top."""
    front = c.front(size)
    corners = [(size(v), positive(v.kld.mean, c)) for v in front]
    steps = [corner for a, b in pairwise(corners) for corner in (a, (b[0], a[1]), b)]

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        floor_line(canvas, c, axes.axhspan, axes.axhline)
        if corners:
            axes.plot(*zip(*(steps or corners), strict=True), color=MUTED, linewidth=1, zorder=1)
        for i, v in enumerate(c.variants):
            _point(canvas, c, i, size(v), v in front, axis)
        axes.set(xlim=_limits([size(v) for v in c.variants]), xlabel=axis, ylabel=KLD, yscale="log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** (0.1 if cards else 0.04))  # room for the names of the cards
        log_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        for card, at in cards.items():
            axes.axvline(at, color=MUTED, linewidth=0.9, dashes=(4, 3), zorder=0)
            axes.annotate(card, (at, 1), (3, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
                          color=MUTED, fontsize=9.5)  # fmt: skip
        points = [(size(v), positive(v.kld.mean, c), short(v.name)) for v in c.variants]
        place_labels(axes, points, INK, avoid=steps)

    hollow = " Hollow: another variant is both smaller and nearer." if len(front) < len(c.takable) else ""
    crosses = " Crosses: baselines." if len(c.takable) < len(c.variants) else ""
    floor = " Dashed across: the noise floor." if c.floor is not None else ""
    alt = f"{title}, mean KLD of {len(c.variants)} variants; on the front: {', '.join(v.name for v in front)}"
    return Plot(title, caption + hollow + crosses + floor, draw(name, alt, NARROW, 300, paint),
                draw(f"{name}-wide", alt, WIDE, 380, paint))  # fmt: skip


def _point(canvas: Canvas, c: Comparison, index: int, size: float, full: bool, axis: str) -> None:
    variant, look = c.variants[index], style(c, index)
    mean = positive(variant.kld.mean, c)
    if variant.kld.low is not None:
        canvas.axes.errorbar(size, mean, yerr=bars(variant.result.overall, mean), color=look["color"], linewidth=1.2)
    face = look["color"] if full or variant.is_baseline else PAPER
    (point,) = canvas.axes.plot(size, mean, **look, markersize=7, linestyle="none", markerfacecolor=face)
    canvas.tip(point, f"{variant.name}: KLD {variant.kld.mean:.3g}, {size:.4g} {axis.rpartition(' ')[2]}")


def _limits(sizes: list[float]) -> tuple[float, float]:
    """A margin of 5 % of the size at least, so that a small difference looks small."""
    margin = max(0.12 * (max(sizes) - min(sizes)), 0.05 * max(sizes))
    return min(sizes) - margin, max(sizes) + margin
