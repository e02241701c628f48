"""Heat maps show every share in its cell."""

from __future__ import annotations

import itertools
from io import BytesIO

import numpy as np
import pytest

from sinklora.plots_heatmap import plot_heat_maps

LABELS = {"x_label": "tokens", "y_label": "depth", "title": "found"}


def test_shares_stand_in_their_cells() -> None:
    one = {(1024.0, 0.0): 0.0, (1024.0, 1.0): 0.33, (512.0, 0.0): 1.0}
    two = {(1500.0, 0.5): 0.9}
    figure = plot_heat_maps({"one": one, "two": two}, **LABELS)
    first, second = figure.axes
    for axes in (first, second):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["512", "1k", "1500"]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "0.5", "1"]
    shown = {text.get_position(): text.get_text() for text in first.texts}
    assert shown == {(1, 0): "0", (1, 2): "33", (0, 0): "100"}
    assert {text.get_position(): text.get_text() for text in second.texts} == {(2, 1): "90"}
    drawn = np.asarray(first.images[0].get_array().filled(np.nan))  # type: ignore[union-attr]
    assert drawn[2, 1] == 0.33 and np.isnan(drawn[1]).all()


@pytest.mark.parametrize(("lengths", "maps"), [(1, 1), (7, 3), (20, 2)])
def test_any_number_is_drawn_and_cells_keep_their_size(lengths: int, maps: int) -> None:
    cells = {(1024.0 * (1 + i), d / 10): 0.5 for i, d in itertools.product(range(lengths), range(11))}
    figure = plot_heat_maps({f"way {i}": cells for i in range(maps)}, **LABELS)
    assert len(figure.axes) == maps
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=50)
    assert stream.getvalue().startswith(b"\x89PNG")
    for axes in figure.axes:
        box = axes.get_position()
        width = box.width * figure.get_size_inches()[0] / lengths
        height = box.height * figure.get_size_inches()[1] / 11
        # Three digits of eight points fit.
        assert width > 0.3 and height > 0.2


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="maps: expected at least one"):
        plot_heat_maps({}, **LABELS)
