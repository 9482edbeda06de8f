"""Figures of the fusion report, drawn as those of `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mufasa_rec.evaluation.figures import COLOURS, STYLE, Curve, new_figure, short, to_svg

_FUSED, _TITLE, _OTHER = COLOURS["model"], COLOURS["markov"], COLOURS["bar"]


@mpl.rc_context(STYLE)
def term_curves(train: Curve | None, held_out: Curve | None, description: str) -> Markup:
    """A loss term over training steps: on batches, and on the held-out items with its lowest value marked."""
    figure, axes = new_figure(2.0)
    if train is not None:
        axes.plot(train.x, train.y, color=_OTHER, linewidth=1.2, label=train.label)
    if held_out is not None:
        lowest = min(range(len(held_out.y)), key=lambda place: held_out.y[place])
        axes.plot(held_out.x, held_out.y, color=_FUSED, linewidth=1.8, label=held_out.label)
        axes.plot(held_out.x[lowest], held_out.y[lowest], color=_FUSED, marker="o", markersize=5)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="best", labelcolor=COLOURS["ink"], handlelength=1.2)
    return to_svg(figure, description)


@mpl.rc_context(STYLE)
def structure_band(bins: Mapping[str, Sequence[float]], description: str) -> Markup:
    """Cosines in the fusion space over those of titles: the median, and a band from the quantile 0.1 to 0.9."""
    figure, axes = new_figure(2.5)
    axes.fill_between(bins["title"], bins["low"], bins["high"], color=_FUSED, alpha=0.2, linewidth=0)
    axes.plot(bins["title"], bins["median"], color=_FUSED, linewidth=1.8, marker="o", markersize=3)
    axes.set_xlabel("cosine of two titles")
    axes.set_ylabel("cosine of their fused vectors")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid()
    return to_svg(figure, description)


@mpl.rc_context(STYLE)
def spectra(shares: Mapping[str, Sequence[float]], ranks: Mapping[str, float], description: str) -> Markup:
    """How much of the variance the first directions hold, for each space, and where its effective rank lies."""
    figure, axes = new_figure(2.5)
    for name, colour in (("title", _TITLE), ("fused", _FUSED)):
        held = _cumulative(shares[name])
        axes.plot(range(1, len(held) + 1), held, color=colour, linewidth=1.8, label=name)
        axes.axvline(ranks[name], color=colour, linewidth=1.0, linestyle=(0, (2, 2)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("directions, the largest first")
    axes.set_ylabel("share of the variance")
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y")
    axes.legend(frameon=False, loc="lower right", labelcolor=COLOURS["ink"], handlelength=1.2)
    return to_svg(figure, description)


@mpl.rc_context(STYLE)
def movement_bars(movement: Mapping[str, Mapping[str, Any]], description: str) -> Markup:
    """How far the fused vector turns without a modality: the mean, and a line from the quantile 0.1 to 0.9."""
    figure, axes = new_figure(0.8 + 0.42 * len(movement))
    shown = {name: found for name, found in movement.items() if found["mean"] is not None}
    for place, found in enumerate(shown.values()):
        axes.barh(place, found["mean"], height=0.62, color=_FUSED, linewidth=0)
        axes.plot([found["low"], found["high"]], [place, place], color=COLOURS["ink"], linewidth=1.4)
    axes.set_yticks(range(len(shown)), [f"without {name}" for name in shown])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.set_xlim(left=0)
    axes.set_xlabel("1 – cosine to the vector with it")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return to_svg(figure, description)


def _cumulative(shares: Sequence[float]) -> list[float]:
    held, total = [], 0.0
    for share in shares:
        total += share
        held.append(total)
    return held
