"""Figures that show themselves at the end of a notebook's cell, whatever backend matplotlib has, without pyplot."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

DPI = 150
LARGEST = 14.0  # inches of a side, beyond which panels and nodes become smaller
INCHES_PER_NAME = 0.16  # along an axis
LONGEST = 24  # characters of a name; what is longer is cut
FALLBACKS = (  # fonts for what those of matplotlib have no glyphs for, where they are installed
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans Arabic",
    "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Emoji", "Segoe UI Emoji", "Segoe UI Symbol", "Symbola",
    "Arial Unicode MS", "Unifont",
)  # fmt: skip


class Picture(Figure):
    """A figure that a notebook shows."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure, dpi: int = 100) -> bytes:
    """A figure as a file of this format."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
    return file.getvalue()


def is_picture(given: object) -> bool:
    """Whether this is a figure, or axes in one."""
    return isinstance(given, Figure | SubFigure | Axes)


def root(ax: Axes) -> Figure:
    """The figure that holds these axes, in a subfigure or not."""
    return cast(Figure, ax.figure.figure)


def new_axes(width: float, height: float) -> Axes:
    """Axes in a figure of their own, of this size in inches."""
    return Picture(figsize=(width, height), layout="constrained").subplots()


def sheet(rows: int, columns: int, panel: float) -> list[list[Axes]]:
    """Rows of axes in one figure, panels of so many inches where that fits, and of no less than a third of them."""
    side = max(panel / 3, min(panel, LARGEST / max(rows, columns)))
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
    told = fitted(text, _inches(ax)[0], fontsize, lines)
    ax.set_title(told, fontsize=fontsize, pad=above, family=families("sans-serif"))


def families(generic: str) -> list[str]:
    """A family of fonts, and those that serve where it has no glyph."""
    installed = {font.name for font in fontManager.ttflist}
    return [generic, *(name for name in FALLBACKS if name in installed)]


def _missing(codes: Iterable[int]) -> set[int]:
    """Which characters no font has that names and titles are drawn with."""
    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in families("monospace")]
    return {code for code in codes if not any(font.get_char_index(code) for font in fonts)}


def drawable(texts: Iterable[str]) -> list[str]:
    """Texts with an empty square for each character that no font has, and one warning if there are any."""
    given = list(texts)
    beyond_ascii = {code for code in map(ord, "".join(given)) if code > 127}
    missing = _missing(beyond_ascii) if beyond_ascii else set()
    if not missing:
        return given
    some = "".join(map(chr, sorted(missing)[:8]))
    warnings.warn(
        f"no installed font that matplotlib can use has {some!r} (drawn as □): install one, such as Noto Sans CJK or "
        f"Noto Emoji, and remove matplotlib's cache of fonts",
        stacklevel=2,
    )
    return [text.translate(dict.fromkeys(missing, "□")) for text in given]


def fitted(text: str, inches: float, fontsize: float = 8, lines: int = 4) -> str:
    """A text in lines of this width, without mathematics."""
    characters = max(8, int(inches * 72 / (0.54 * fontsize)))
    parts = [part for line in drawable([text])[0].split("\n") for part in wrap(line, characters) or [""]]
    if len(parts) > lines:
        parts = [*parts[: lines - 1], f"{parts[lines - 1][: characters - 2]} …"]
    return "\n".join(parts).replace("$", r"\$")


def set_names(ax: Axes, axis: Any, names: Sequence[str], *, fontsize: float = 7) -> None:
    """Names along an axis, upright where they are long, and of many only so many as do not overlap.

    They are cut where they would leave the picture no room.
    """
    is_x = axis is ax.xaxis
    sides = _inches(ax) if is_x else _inches(ax)[::-1]
    length, size = sides[0], fontsize / 72
    step = max(1, math.ceil(len(names) * 1.3 * size / length))
    most = min(LONGEST, max(4, int(0.4 * sides[1] / (0.6 * size))))
    shown = [visible(name, most) for name in names[::step]]
    longest = max(map(len, shown), default=0)
    turned = 90 if is_x and 0.6 * size * (longest + 1) > length * step / len(names) else 0
    axis.set_ticks(range(0, len(names), step), shown, fontsize=fontsize, family=families("monospace"), rotation=turned)


def visible(name: str, most: int = LONGEST) -> str:
    """A name with its white space seen, cut where it is very long, and no mathematics."""
    name = {" ": "␣", "\n": "↵", "\t": "⇥"}.get(name, name.replace("\n", "↵"))
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def inches(names: Iterable[str], fontsize: float = 7) -> float:
    """How long the longest of these names is, as it is shown."""
    return 0.62 * fontsize / 72 * max((len(visible(name)) for name in names), default=0)


def _inches(ax: Axes) -> tuple[float, float]:
    """About how wide and high the axes will be: before a figure is drawn, its layout is not known."""
    width, height = root(ax).get_size_inches()
    spec = ax.get_subplotspec()
    rows, columns = (1, 1) if spec is None else spec.get_gridspec().get_geometry()
    return 0.84 * width / columns, 0.75 * height / rows


def bar(ax: Axes, image: ScalarMappable, label: str) -> None:
    """What the colours mean."""
    width, height = _inches(ax)
    share = min(0.18 / width, 0.25)
    beside = ax.figure.colorbar(
        image, ax=ax, fraction=share, aspect=max(5, 0.7 * height / (share * width)), pad=0.08 / width
    )
    beside.set_label(label, fontsize=7)
    beside.ax.tick_params(labelsize=7)
