"""Names beside points, none over another."""

from collections.abc import Sequence
from itertools import pairwise, product

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

GAP = 8  # points between a point and its name
MARKER = 5  # half a marker's side, in points
# Where a name may stand, best places first: at the sides, above and below, in the corners; then the same further out.
_PLACES = [
    (scale * dx, scale * dy)
    for scale, (dx, dy) in product(
        (1, 2), ((1, 0), (-1, 0), (0.6, 0.6), (-0.6, -0.6), (0, 1), (0, -1), (-0.6, 0.6), (0.6, -0.6))
    )
]


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float, str]], colour: str, avoid: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each point's name at the first free place around it; the least bad one if none is free.

    `points`: (x, y, name) in data. `avoid`: corners of a line that names should not cross. Texts that are there already
    are kept clear too. Limits and scales of the axes must be final.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # the layout is known from here on
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in centres]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    corners = [axes.transData.transform(corner) for corner in avoid]
    lines = [Bbox.from_extents(*_ordered(*a, *b)) for a, b in pairwise(corners)]
    for x, y, name in points:
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=10.5)
        costs = {}
        for place in _PLACES:
            _move(label, *place)
            box = label.get_window_extent(renderer)
            over = sum(box.overlaps(other) for other in taken)
            costs[place] = 2 * over + 3 * (not _inside(box, frame)) + any(box.overlaps(line) for line in lines)
        _move(label, *min(costs, key=costs.get))
        taken.append(label.get_window_extent(renderer))


def _move(label: Text, dx: float, dy: float) -> None:
    label.set(
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center_baseline",
        position=(GAP * dx, GAP * dy),
    )


def _ordered(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 + GAP and frame.y0 <= box.y0 and box.y1 <= frame.y1 + GAP
