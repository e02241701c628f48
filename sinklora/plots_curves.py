"""Curves: losses over steps, perplexities over budgets and lengths. Extra "plot"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_curves(
    curves: Mapping[str, Sequence[float]], *, x_label: str, y_label: str, title: str, smooth: int = 1
) -> Figure:
    """One line for each named series over 1, 2, 3, ...; smooth averages over so many neighbours.

    Raises:
        MissingExtraError: matplotlib is not installed. ValueError: smooth below 1.
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    if smooth < 1:
        raise ValueError(f"smooth: expected at least 1, got {smooth}")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    for name, values in curves.items():
        width = min(smooth, len(values))
        if width:
            means = np.convolve(values, np.full(width, 1 / width), mode="valid")
            axes.plot(np.arange(len(means)) + (width + 1) / 2, means, label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    return figure


def plot_lines(
    lines: Mapping[str, Mapping[float, float]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One line with points for each named mapping of x to y.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
    if log_x:
        axes.set_xscale("log")
        ticks = sorted({x for points in lines.values() for x in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    return figure
