"""Heat maps of shares over two numbers, as retrieval is shown: length across, depth downwards. Extra
"plot"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .extras import require
from .plots import COLOURS, GROUP, NOTHING, SINK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches of a cell and around a map; a figure is about this wide before maps go below each other.
CELL_WIDTH, CELL_HEIGHT = 0.42, 0.34
MARGIN_WIDTH, MARGIN_HEIGHT = 1.0, 1.1
FIGURE_WIDTH = 14.0
LEAST_WIDTH, LEAST_HEIGHT = 2.8, 1.9


def plot_heat_maps(
    maps: Mapping[str, Mapping[tuple[float, float], float]], *, x_label: str, y_label: str, title: str
) -> Figure:
    """One map for each named mapping of (x, y) to a share from 0 to 1, written into its cell in percent.

    All maps have the same axes, the x and y of all of them in order; what is not in a mapping stays white.

    Returns:
        A matplotlib Figure (`figure.savefig(path)`) that no window shows.

    Raises:
        MissingExtraError: matplotlib is not installed. ValueError: no map.
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    if not maps:
        raise ValueError("maps: expected at least one")
    xs = sorted({x for cells in maps.values() for x, _ in cells})
    ys = sorted({y for cells in maps.values() for _, y in cells})
    width = max(LEAST_WIDTH, CELL_WIDTH * len(xs)) + MARGIN_WIDTH
    height = max(LEAST_HEIGHT, CELL_HEIGHT * len(ys)) + MARGIN_HEIGHT
    columns = max(1, min(len(maps), int(FIGURE_WIDTH / width)))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, cells) in zip(grid, maps.items(), strict=False):
        _draw_map(axes, xs, ys, cells)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    for axes in grid[len(maps) :]:
        axes.remove()
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_map(
    axes: Axes, xs: list[float], ys: list[float], cells: Mapping[tuple[float, float], float]
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    # From orange over nothing to blue: told apart by those who see no red or green, too.
    colours = LinearSegmentedColormap.from_list("share", [COLOURS[SINK], COLOURS[NOTHING], COLOURS[GROUP]])
    shares = np.full((len(ys), len(xs)), np.nan)
    for (x, y), share in cells.items():
        shares[ys.index(y), xs.index(x)] = share
    axes.imshow(shares, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for (row, column), share in np.ndenumerate(shares):
        if not np.isnan(share):
            colour = "white" if share > 0.8 else "black"
            text = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
            text.set_color(colour)
            # Inside the map anyway; measured, hundreds of them take seconds.
            text.set_in_layout(False)
    axes.set_xticks(range(len(xs)), [_short(x) for x in xs], rotation=90 if len(xs) > 6 else 0, fontsize=8)
    axes.set_yticks(range(len(ys)), [f"{y:.3g}" for y in ys], fontsize=8)
    axes.set_xticks(np.arange(1, len(xs)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(ys)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _short(number: float) -> str:
    """32768 is 32k, as lengths are called; what is no multiple of 1024 is written out."""
    return f"{number / 1024:g}k" if number >= 1024 and number % 1024 == 0 else f"{number:g}"
