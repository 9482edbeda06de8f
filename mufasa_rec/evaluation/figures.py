"""Figures of the report as SVG text that takes its colours and typeface from the page around it.

Each function draws with matplotlib and returns an `<svg>` element to put into HTML. Colours are drawn as placeholders
and replaced by CSS variables, text stays text: one figure serves light and dark, screen and phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Any distinct colours do: `to_svg` replaces each by `var(--<name>)`. The page defines the variables.
COLOURS = {
    name: f"#fe{number:02x}dc"
    for number, name in enumerate(
        ["ink", "muted", "line", "bar", "popularity", "markov", "model", "model-without-content", "oracle", "other"]
    )
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
}
_WIDTH = 5.0  # inches; small, so that text stays readable when a phone shrinks the figure
_MAX_LABEL = 28


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A labelled value with its interval; ``low`` and ``high`` may be missing."""

    label: str
    colour: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A labelled line through points."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


def colour_of(row: str) -> str:
    """Name of a row's colour."""
    name = row.replace("_", "-")
    return name if name in COLOURS else "other"


@mpl.rc_context(STYLE)
def metric_bars(bars: Sequence[Bar], description: str) -> Markup:
    """Horizontal bars with whiskers for the intervals.

    Args:
        bars: The bars, topmost first.
        description: What the figure shows, for readers who do not see it.

    Returns:
        The figure.
    """
    figure, axes = new_figure(0.45 + 0.42 * len(bars))
    ends = [bar.value if bar.high is None else bar.high for bar in bars]
    reach = max([*ends, 1e-6])
    for place, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        colour = COLOURS[bar.colour]
        axes.barh(place, bar.value, height=0.62, color=colour, linewidth=0)
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=COLOURS["ink"], linewidth=1.4)
        weight = "bold" if bar.colour == "model" else "normal"
        axes.text(end + 0.02 * reach, place, f"{bar.value:.4f}", va="center", fontweight=weight)
    axes.set_yticks(range(len(bars)), [clipped(bar.label) for bar in bars])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_xlim(0, 1.2 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return to_svg(figure, description)


@mpl.rc_context(STYLE)
def learning_curves(curves: Sequence[Curve], description: str, *, smooth: bool = False) -> Markup:
    """Lines over training steps.

    Args:
        curves: One line for each run.
        description: What the figure shows, for readers who do not see it.
        smooth: Draw the values thin and their moving average thick; otherwise mark the points and name the highest.

    Returns:
        The figure.
    """
    figure, axes = new_figure(2.7)
    for curve in curves:
        colour = COLOURS[curve.colour]
        if smooth and len(curve.x) > 1:
            axes.plot(curve.x, curve.y, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(curve.x, _moving_average(curve.y), color=colour, linewidth=1.8, label=clipped(curve.label))
        else:
            best = max(range(len(curve.y)), key=lambda place: curve.y[place])
            name = clipped(curve.label)
            label = name if smooth else f"{name}: best {curve.y[best]:.4f}"
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.8, marker="o", markersize=2.5, label=label)
            axes.plot(curve.x[best], curve.y[best], color=colour, marker="o", markersize=6)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    if len(curves) > 1 or not smooth:
        axes.legend(frameon=False, loc="best", labelcolor=COLOURS["ink"], handlelength=1.2)
    return to_svg(figure, description)


@mpl.rc_context(STYLE)
def slice_dots(slices: Mapping[str, Sequence[Bar]], description: str) -> Markup:
    """One line for each slice of the users, one dot on it for each row.

    Args:
        slices: Label of a slice to the values of the rows in it.
        description: What the figure shows, for readers who do not see it.

    Returns:
        The figure.
    """
    figure, axes = new_figure(0.9 + 0.44 * len(slices))
    seen: set[str] = set()
    for place, bars in enumerate(slices.values()):
        values = [bar.value for bar in bars]
        if values:
            axes.plot([min(values), max(values)], [place, place], color=COLOURS["line"], linewidth=2.5, zorder=1)
        for bar in bars:
            label = None if bar.label in seen else clipped(bar.label)
            seen.add(bar.label)
            size = 60 if bar.colour == "model" else 38
            axes.scatter(bar.value, place, size, color=COLOURS[bar.colour], label=label, zorder=2, linewidth=0)
    axes.set_yticks(range(len(slices)), [clipped(label) for label in slices])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(len(slices) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    columns = 2 if len(seen) in (2, 4) else 3
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, handletextpad=0.1, columnspacing=1.2)
    return to_svg(figure, description)


@mpl.rc_context(STYLE)
def histogram(edges: Sequence[float], counts: Sequence[int], x_label: str, description: str) -> Markup:
    """Bars of equal width for the given bins, whatever their edges; so geometric bins read like a log axis.

    Args:
        edges: Borders of the bins, one more than counts.
        counts: Number in each bin.
        x_label: What is binned.
        description: What the figure shows, for readers who do not see it.

    Returns:
        The figure.
    """
    figure, axes = new_figure(2.4)
    axes.bar(range(len(counts)), counts, width=0.9, align="edge", color=COLOURS["bar"], linewidth=0)
    stride = max(1, -(-len(edges) // 8))
    places = list(range(0, len(edges), stride))
    axes.set_xticks([place - 0.05 for place in places], [short(edges[place]) for place in places])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(x_label)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")
    return to_svg(figure, description)


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def clipped(label: str) -> str:
    """A label that leaves room for the drawing."""
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"


def _moving_average(values: Sequence[float]) -> list[float]:
    """Centred average over about a tenth of the points, fewer towards the ends.

    Example:
        >>> _moving_average([1.0, 2.0, 6.0])
        [1.0, 3.0, 6.0]
    """
    reach = max(len(values) // 20, 1)
    averages = []
    for place in range(len(values)):
        side = min(reach, place, len(values) - 1 - place)
        near = values[place - side : place + side + 1]
        averages.append(sum(near) / len(near))
    return averages


def short(value: float) -> str:
    """A number in at most four characters or so: 950, 1.5k, 20k, 3M.

    Example:
        >>> [short(value) for value in (0.5, 950, 1500, 20_000, 3e6)]
        ['0.5', '950', '1.5k', '20k', '3M']
    """
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def to_svg(figure: Figure, description: str) -> Markup:
    """Renders a figure as an element of an HTML page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in each figure, and nothing refers to them
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert box is not None, "matplotlib always writes a viewBox"
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(description)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'font-family: [^;"]*', "font-family: var(--sans)", svg)
    for name, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return Markup(svg)  # matplotlib and the line above have escaped every text
