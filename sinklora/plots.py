"""Pictures: the attention pattern (matplotlib or block characters), what a cache kept. Extra "plot"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .extras import require
from .pattern import SFPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A mask of every pair is drawn: above this it is 64 MiB a head and more than a picture can show.
MOST_TOKENS = 8192

# Above this several tokens share a pixel.
MOST_PIXELS = 128
# The same for the positions that a cache kept, and for the moments.
MOST_KEPT_PIXELS = 1024

# What a pair is, as cells() counts it: not allowed, allowed by the group, allowed by a sink token alone.
NOTHING, GROUP, SINK = 0, 1, 2
COLOURS = ("#f4f4f2", "#2f6c9e", "#e08214")


class HeadClass(NamedTuple):
    """Heads with one mask: a title with their number, and int8 (N, N) cells of NOTHING, GROUP or SINK."""

    title: str
    cells: npt.NDArray[np.int8]


def head_classes(pattern: SFPattern, num_heads: int, num_tokens: int) -> list[HeadClass]:
    """The unshifted and the shifted heads of a pattern; a class without heads is left out.

    Raises:
        ValueError: num_heads or num_tokens below 1, or more tokens than a picture can show.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    if not 1 <= num_tokens <= MOST_TOKENS:
        raise ValueError(f"num_tokens: expected from 1 to {MOST_TOKENS} for a picture, got {num_tokens}")
    shifted = _num_shifted(pattern, num_heads)
    found = []
    if shifted < num_heads:
        of_all = dataclasses.replace(pattern, shifted_fraction=0.0)
        found.append(HeadClass(f"{_heads(num_heads - shifted)}, unshifted", cells(of_all, num_tokens)))
    if shifted:
        of_all = dataclasses.replace(pattern, shifted_fraction=1.0)
        shift = pattern.settings[1]
        found.append(HeadClass(f"{_heads(shifted)}, shifted by {shift}", cells(of_all, num_tokens)))
    return found


def cells(pattern: SFPattern, num_tokens: int) -> npt.NDArray[np.int8]:
    """int8 (N, N): what query i (row) and key j (column) of the first head are to each other."""
    allowed = pattern.mask(1, num_tokens)[0]
    by_group = dataclasses.replace(pattern, num_sink_tokens=0).mask(1, num_tokens)[0]
    return np.where(by_group, GROUP, np.where(allowed, SINK, NOTHING)).astype(np.int8)


def _heads(number: int) -> str:
    return "1 head" if number == 1 else f"{number} heads"


def _num_shifted(pattern: SFPattern, num_heads: int) -> int:
    """How many heads are shifted, read off the definition: two tokens whose groups only the shift parts."""
    probe = SFPattern(
        group_size=2, num_sink_tokens=0, shifted_fraction=pattern.shifted_fraction, shift=1, causal=True
    )
    return num_heads - int(probe.mask(num_heads, 2)[:, 1, 0].sum())


def describe(pattern: SFPattern) -> str:
    """One line of a pattern's settings, for titles."""
    group_size, _, sinks, fraction, causal = pattern.settings
    kind = "" if causal else ", not causal"
    return f"group size {group_size}, {sinks} sink tokens, {fraction:g} of the heads shifted{kind}"


def plot_pattern(pattern: SFPattern, num_heads: int, num_tokens: int) -> Figure:
    """The mask of each kind of head, side by side: queries down, keys across, sinks in their own colour.

    Args:
        num_heads: query heads, at least 1.
        num_tokens: tokens of the sequence, from 1 to 8192.

    Returns:
        A matplotlib Figure (`figure.savefig(path)`) that no window shows.

    Raises:
        MissingExtraError: matplotlib is not installed. ValueError: a number out of range.
    """
    require("plot", "matplotlib")
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    classes = head_classes(pattern, num_heads, num_tokens)
    figure = Figure(figsize=(4.2 * len(classes) + 0.4, 5.0), layout="constrained")
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(classes))), classes, strict=True):
        axes.imshow(
            _shrink(kind.cells, -(-num_tokens // MOST_PIXELS)),
            cmap=ListedColormap(list(COLOURS)),
            vmin=NOTHING,
            vmax=SINK,
            interpolation="nearest",
            extent=(0, num_tokens, num_tokens, 0),
        )
        axes.set_title(kind.title)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    figure.suptitle(f"SF-Attn: {describe(pattern)}", fontsize=10)
    figure.legend(
        handles=[
            Patch(color=COLOURS[GROUP], label="own group"),
            Patch(color=COLOURS[SINK], label="sink token"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def text_pattern(pattern: SFPattern, num_heads: int, num_tokens: int, *, width: int = 80) -> str:
    """The mask of each kind of head in block characters: full for the own group, shaded for sinks, dots for
    nothing.

    A cell is two characters wide. Where the tokens do not fit into `width` characters, several share a cell,
    and it shows whether anything is allowed there. Each class is a title and rows of queries.

    Raises:
        ValueError: a number out of range.
    """
    if width < 2:
        raise ValueError(f"width: expected at least 2 characters, got {width}")
    lines = [f"SF-Attn: {describe(pattern)}"]
    tokens_per_cell = -(-num_tokens // (width // 2))
    legend = "█ own group   ▒ sink token   · nothing"
    lines.append(legend if tokens_per_cell == 1 else f"{legend}   ({tokens_per_cell} tokens a cell)")
    for kind in head_classes(pattern, num_heads, num_tokens):
        lines += ["", kind.title]
        lines += ["".join("·█▒"[cell] * 2 for cell in row) for row in _shrink(kind.cells, tokens_per_cell)]
    return "\n".join(lines)


def _shrink(cells: npt.NDArray[np.int8], factor: int) -> npt.NDArray[np.int8]:
    """One cell for each factor x factor square; a few sinks among many tokens stay visible."""
    if factor == 1:
        return cells
    size = -(-len(cells) // factor)
    padded = np.zeros((size * factor, size * factor), dtype=np.int8)
    padded[: len(cells), : len(cells)] = cells
    squares = padded.reshape(size, factor, size, factor)
    group, sink = ((squares == kind).any(axis=(1, 3)) for kind in (GROUP, SINK))
    return np.where(group, GROUP, np.where(sink, SINK, NOTHING)).astype(np.int8)


def kept_picture(seen: Sequence[int], kept: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.float32]:
    """float32 (moments, positions): the share of the heads that kept each position at each moment, 0 to 1.

    Args:
        seen: tokens read at each moment.
        kept: (num_heads, entries) or (entries,) positions at each; -1 is an unused slot.
    """
    picture = np.zeros((len(kept), max(seen, default=0)), dtype=np.float32)
    for row, positions in zip(picture, kept, strict=True):
        heads = np.atleast_2d(positions)
        used = heads[heads >= 0]
        np.add.at(row, used, np.float32(1 / len(heads)))
    return picture


def plot_kept(
    seen: Sequence[int],
    kept: Sequence[npt.NDArray[np.integer]],
    *,
    scores: npt.NDArray[np.floating] | None = None,
    title: str = "kept positions",
) -> Figure:
    """When which position of a text was in a cache.

    Over several moments, a picture: positions across, time downwards, dark where all heads kept the position,
    light where some did. Of one moment, a line for each kept position, as high as its score.

    Args:
        seen: tokens that were read at each moment, not decreasing.
        kept: the positions kept at each moment, integers (entries,) of one head or (num_heads, entries) of
            several; -1 for unused slots.
        scores: of the last moment, like its positions; only drawn where it is the only one.

    Returns:
        A matplotlib Figure (`figure.savefig(path)`) that no window shows.

    Raises:
        MissingExtraError: matplotlib is not installed. ValueError: nothing to draw, or unequal lengths.
    """
    require("plot", "matplotlib")
    from matplotlib.figure import Figure

    if not seen or len(seen) != len(kept):
        raise ValueError(f"seen, kept: expected as many moments, at least one, got {len(seen)}, {len(kept)}")
    figure = Figure(figsize=(8.0, 4.6 if len(seen) > 1 else 2.8), layout="constrained")
    axes: Axes = figure.subplots()
    if len(seen) > 1:
        _draw_timeline(axes, seen, kept)
    else:
        _draw_moment(axes, kept[0], scores)
    axes.set_xlim(0, max(seen))
    axes.set_xlabel("position in the text")
    axes.set_title(title)
    return figure


def _draw_timeline(axes: Axes, seen: Sequence[int], kept: Sequence[npt.NDArray[np.integer]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    picture = _largest(kept_picture(seen, kept), MOST_KEPT_PIXELS)
    # Moments need not be evenly spaced: each row lasts until the next one.
    edges = np.linspace(0, len(seen) - 1, len(picture) + 1)
    rows = np.interp(edges, np.arange(len(seen)), np.asarray(seen, dtype=np.float64))
    columns = np.linspace(0, max(seen), picture.shape[1] + 1)
    colours = LinearSegmentedColormap.from_list("kept", [COLOURS[NOTHING], COLOURS[GROUP]])
    axes.pcolormesh(columns, rows, picture, cmap=colours, vmin=0.0, vmax=1.0, rasterized=True)
    axes.set_ylim(seen[-1], seen[0])
    axes.set_ylabel("tokens read")


def _draw_moment(
    axes: Axes, positions: npt.NDArray[np.integer], scores: npt.NDArray[np.floating] | None
) -> None:
    used = positions >= 0
    heights = np.ones(positions.shape) if scores is None else scores
    axes.vlines(positions[used], 0, heights[used], color=COLOURS[GROUP], linewidth=1)
    axes.set_ylim(bottom=0)
    if scores is None:
        axes.set_yticks([])
    else:
        axes.set_ylabel("score")


def _largest(picture: npt.NDArray[np.float32], most: int) -> npt.NDArray[np.float32]:
    """At most `most` rows and columns, each pixel the largest of those that share it: single kept positions
    stay visible."""
    for axis in (0, 1):
        factor = -(-picture.shape[axis] // most)
        if factor > 1:
            starts = np.arange(0, picture.shape[axis], factor)
            picture = np.maximum.reduceat(picture, starts, axis=axis)
    return picture
