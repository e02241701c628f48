"""Pictures of the pattern agree with the mask that they show."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from sinklora import SFPattern, plots, plots_curves

PATTERN = SFPattern(group_size=4, num_sink_tokens=1, shifted_fraction=0.5)

DRAWN = """\
SF-Attn: group size 4, 1 sink tokens, 0.5 of the heads shifted
█ own group   ▒ sink token   · nothing

1 head, unshifted
██··········
████········
██████······
████████····
▒▒······██··
▒▒······████

1 head, shifted by 2
██··········
████········
▒▒··██······
▒▒··████····
▒▒··██████··
▒▒··████████"""


def test_text_is_the_drawn_one() -> None:
    assert plots.text_pattern(PATTERN, 2, 6) == DRAWN


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "fraction"), [(8, 0.25), (5, 0.3), (3, 0.0), (4, 1.0), (1, 0.25)])
def test_cells_are_the_mask_of_each_head(heads: int, fraction: float, causal: bool) -> None:
    pattern = SFPattern(group_size=6, num_sink_tokens=3, shifted_fraction=fraction, shift=2, causal=causal)
    classes = plots.head_classes(pattern, heads, 20)
    mask = pattern.mask(heads, 20)
    counts = [int(kind.title.split()[0]) for kind in classes]
    assert sum(counts) == heads
    masks = np.repeat(np.stack([kind.cells != plots.NOTHING for kind in classes]), counts, axis=0)
    assert np.array_equal(masks, mask)


def test_sinks_are_those_that_no_group_gives() -> None:
    cells = plots.cells(SFPattern(group_size=4, num_sink_tokens=2), 8)
    assert (cells[4:, :2] == plots.SINK).all()
    assert not (cells[:4] == plots.SINK).any()


def test_many_tokens_share_a_cell() -> None:
    pattern = SFPattern(group_size=256, num_sink_tokens=1)
    lines = plots.text_pattern(pattern, 4, 1000, width=40).splitlines()
    assert "50 tokens a cell" in lines[1]
    rows = [line for line in lines if line and line[0] in "█▒·"]
    assert {len(row) for row in rows[1:]} == {40}
    assert rows[-1].startswith("▒▒")


def test_figure_has_an_axis_for_each_class() -> None:
    figure = PATTERN.plot(2, 300)
    assert [axes.get_title() for axes in figure.axes] == ["1 head, unshifted", "1 head, shifted by 2"]
    assert figure.axes[0].get_xlim() == (0, 300)
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        stream = BytesIO()
        figure.savefig(stream, format=kind)
        assert stream.getvalue().startswith(magic)
    assert len(SFPattern(4, shifted_fraction=0.0).plot(2, 8).axes) == 1


@pytest.mark.parametrize(
    ("heads", "tokens", "name"), [(0, 8, "num_heads"), (2, 0, "num_tokens"), (2, 9000, "num_tokens")]
)
def test_numbers_out_of_range(heads: int, tokens: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        plots.plot_pattern(PATTERN, heads, tokens)


def test_curves() -> None:
    figure = plots_curves.plot_curves(
        {"a": [1.0, 2.0, 3.0, 4.0], "empty": []}, x_label="step", y_label="loss", title="t", smooth=2
    )
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == [1.5, 2.5, 3.5]
    assert line.get_xdata().tolist() == [1.5, 2.5, 3.5]
    with pytest.raises(ValueError, match="smooth"):
        plots_curves.plot_curves({}, x_label="", y_label="", title="", smooth=0)


def test_lines() -> None:
    figure = plots_curves.plot_lines(
        {"a": {100: 1.0, 10: 2.0}, "b": {10: 3.0}},
        x_label="x",
        y_label="y",
        title="t",
        log_x=True,
        log_y=True,
    )
    axes = figure.axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[100, 10], [10]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "100"]
    assert axes.get_yscale() == "log"


def test_kept_picture_is_the_share_of_heads() -> None:
    picture = plots.kept_picture([2, 4], [np.array([[0, 1], [0, -1]]), np.array([[0, 3], [2, 3]])])
    assert picture.tolist() == [[1, 0.5, 0, 0], [0.5, 0, 0.5, 1]]
    assert plots.kept_picture([3], [np.array([0, 2])]).tolist() == [[1, 0, 1]]


def test_kept_timeline_shows_every_position() -> None:
    # More positions and moments than pixels: a single one must stay visible.
    seen = list(range(3000, 5500))
    figure = plots.plot_kept(seen, [np.array([7, moment - 1]) for moment in seen], title="kept")
    (mesh,) = figure.axes[0].collections
    pixels = np.asarray(mesh.get_array())
    assert pixels.shape[0] <= 1024 and pixels.shape[1] <= 1024
    assert (pixels[:, 1] == 1).all() and (pixels[:, 2] == 0).all() and pixels[-1, -1] == 1
    assert figure.axes[0].get_ylim() == (5499, 3000)
    assert figure.axes[0].get_title() == "kept"


def test_kept_moment_shows_scores() -> None:
    figure = plots.plot_kept([10], [np.array([9, -1, 4])], scores=np.array([0.5, 8.0, 2.0]))
    (lines,) = figure.axes[0].collections
    assert [path.vertices.tolist() for path in lines.get_paths()] == [[[9, 0], [9, 0.5]], [[4, 0], [4, 2]]]
    plots.plot_kept([10], [np.array([9])])


def test_kept_refuses_nothing() -> None:
    for seen, kept in (([], []), ([1, 2], [np.array([0])])):
        with pytest.raises(ValueError, match="moments"):
            plots.plot_kept(seen, kept)
