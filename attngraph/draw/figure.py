"""Figures that show themselves at the end of a notebook's cell, whatever backend matplotlib has, without pyplot."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import wrap
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

DPI = 150
LARGEST = 14.0  # inches of a side, beyond which panels and nodes become smaller
INCHES_PER_NAME = 0.16  # along an axis


class Picture(Figure):
    """A figure that a notebook shows."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as a file of this format."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
    return file.getvalue()


def root(ax: Axes) -> Figure:
    """The figure that holds these axes, in a subfigure or not."""
    return cast(Figure, ax.figure.figure)


def new_axes(width: float, height: float) -> Axes:
    """Axes in a figure of their own, of this size in inches."""
    return Picture(figsize=(width, height), layout="constrained").subplots()


def sheet(rows: int, columns: int, panel: float) -> list[list[Axes]]:
    """Rows of axes in one figure, panels of so many inches where that fits."""
    side = min(panel, LARGEST / max(rows, columns))
    figure = Picture(figsize=(columns * side, rows * side), layout="constrained")
    return figure.subplots(rows, columns, squeeze=False).tolist()


def wrapped_sheet(count: int, panel: float) -> list[Axes]:
    """So many axes, a few in a row or about as many rows as columns; what is left of the last row is empty."""
    columns = count if count <= 4 else math.ceil(count**0.5)
    axes = [ax for row in sheet(math.ceil(count / columns), columns, panel) for ax in row]
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]


def set_title(ax: Axes, text: str, *, fontsize: float = 8, lines: int = 4, above: float = 6) -> None:
    """A title that is as wide as its axes, of a few lines, so many points above them; what is longer is cut."""
    ax.set_title(fitted(text, _inches(ax)[0], fontsize, lines), fontsize=fontsize, pad=above)


def fitted(text: str, inches: float, fontsize: float = 8, lines: int = 4) -> str:
    """A text in lines of this width, without mathematics."""
    characters = max(8, int(inches * 72 / (0.54 * fontsize)))
    parts = [part for line in text.split("\n") for part in wrap(line, characters) or [""]]
    if len(parts) > lines:
        parts = [*parts[: lines - 1], f"{parts[lines - 1][: characters - 2]} …"]
    return "\n".join(parts).replace("$", r"\$")


def set_names(ax: Axes, axis: Any, names: Sequence[str], *, fontsize: float = 7) -> None:
    """Names along an axis, upright where they are long, and of many only so many as do not overlap."""
    is_x = axis is ax.xaxis
    length, size = _inches(ax)[0 if is_x else 1], fontsize / 72
    step = max(1, math.ceil(len(names) * 1.3 * size / length))
    shown = [visible(name) for name in names[::step]]
    longest = max(map(len, shown), default=0)
    turned = 90 if is_x and 0.6 * size * (longest + 1) > length * step / len(names) else 0
    axis.set_ticks(range(0, len(names), step), shown, fontsize=fontsize, family="monospace", rotation=turned)


def visible(name: str) -> str:
    """A name with its white space seen, cut where it is very long, and no mathematics."""
    name = {" ": "␣", "\n": "↵", "\t": "⇥"}.get(name, name.replace("\n", "↵"))
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")


def _inches(ax: Axes) -> tuple[float, float]:
    """About how wide and high the axes will be: before a figure is drawn, its layout is not known."""
    width, height = root(ax).get_size_inches()
    spec = ax.get_subplotspec()
    rows, columns = (1, 1) if spec is None else spec.get_gridspec().get_geometry()
    return 0.84 * width / columns, 0.75 * height / rows


def bar(ax: Axes, image: AxesImage, label: str) -> None:
    """What the colours mean."""
    width, height = _inches(ax)
    share = min(max(0.04, 0.1 / width), 0.2)
    beside = ax.figure.colorbar(image, ax=ax, fraction=share, aspect=max(5, 0.7 * height / (share * width)), pad=0.02)
    beside.set_label(label, fontsize=7)
    beside.ax.tick_params(labelsize=7)
