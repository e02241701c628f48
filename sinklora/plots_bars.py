"""Bars with intervals: differences between models. Extra "plot"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_differences(
    bars: Mapping[str, tuple[float, float | None, float | None]], *, x_label: str, title: str
) -> Figure:
    """A horizontal bar for each named difference, from 0, with a line over its interval (low, high) where
    there is one; the first one on top.

    Returns:
        A matplotlib Figure (`figure.savefig(path)`) that no window shows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.4 + 0.4 * max(1, len(bars))), layout="constrained")
    axes: Axes = figure.subplots()
    axes.axvline(0, color="grey", linewidth=1)
    for place, (value, low, high) in enumerate(bars.values()):
        axes.barh(place, value, height=0.6)
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color="black", marker="|")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")
    return figure
