"""A figure is a small table and a drawing of it: SVG for the page, PNG and CSV for everybody else.

The SVG is drawn in a handful of agreed colours, which then become the page's CSS variables, so that one drawing suits a
light page, a dark one and paper. Text stays text. The PNG has the light colours on white.
Leaves out: which figures there are (charts).
"""

import csv
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from tinylora.reporting.samples import shown
from tinylora.talk import harmless

INK, SOFT, LINE, PAPER = "#1c2126", "#5c666f", "#d5dbe1", "#fdfefd"
LIGHT = ("#1f66c1", "#bf5212", "#14805a", "#9a3f9c", "#b52d3a", "#7c6a0b", "#0e7d92", "#5a51c9")
DARK = ("#7db2f7", "#f2a56f", "#5fd0a0", "#df96e0", "#f48f96", "#d6c561", "#63cde2", "#aca6f8")
"""Colours of series on a light and on a dark page, in this order."""
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)))
WIDTH = 3.9
"""Inches: small, so that 8 points are still readable where a phone shows the figure at its own width."""
MOST_LABEL = 60
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)", PAPER: "var(--paper)"} | {
    colour: f"var(--c{index})" for index, colour in enumerate(LIGHT)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A named table, and how it looks."""

    name: str
    title: str
    caption: str
    section: str
    """Where on the page it stands."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    svg: str
    """An element of an HTML page, in its colours; `standalone_svg` makes a file of it."""
    png: bytes

    def csv(self) -> str:
        """The table with its line of names; None is an empty field, a float has every digit."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([map(cell, row) for row in (self.columns, *self.rows)])
        return text.getvalue()


def draw_figure(
    name: str,
    title: str,
    caption: str,
    section: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    draw: Callable[[Any], None],
    *,
    height: float = 2.55,
    width: float = WIDTH,
    panels: int = 1,
    has_legend: bool = False,
) -> Figure:
    """`draw(axes)` draws the rows; width, height in inches. With has_legend, what is labelled is named above the axes.

    Of several panels, which stand one above the other on a shared axis, `draw` gets the list.
    """
    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 9, "legend.fontsize": 7.8,
        "font.family": "DejaVu Sans", "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 8.5,
        "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT,
        "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.6, "legend.frameon": False,
        "xtick.major.size": 0, "ytick.major.size": 0, "axes.prop_cycle": cycler(color=LIGHT),
    }  # fmt: skip
    svg, png = io.StringIO(), io.BytesIO()
    # A label in a script that the font lacks is drawn as boxes in the PNG; that is no reason to warn or to stop.
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawing = Drawing(figsize=(width, height), dpi=72, layout="constrained")
        FigureCanvasAgg(drawing)
        axes = list(drawing.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
        draw(axes if panels > 1 else axes[0])
        if has_legend:
            drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=1.4,
                           columnspacing=1.0, handletextpad=0.5, borderaxespad=0.1)  # fmt: skip
        drawing.draw_without_rendering()  # which makes the layout, once for both files
        drawing.set_layout_engine(None)
        drawing.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        drawing.savefig(png, format="png", dpi=180, facecolor="white")
    return Figure(
        name=name, title=title, caption=caption, section=section, columns=tuple(columns),
        rows=tuple(tuple(row) for row in rows), svg=inline_svg(svg.getvalue(), name, title), png=png.getvalue(),
    )  # fmt: skip


def cell(value: Any) -> Any:
    """A field of a CSV file: a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str) or not value:
        return value
    value = harmless(value).replace("\n", "\u240a")
    begins = value[0] == "\t" or value.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20")
    try:
        float(value)
    except ValueError:
        return f"'{value}" if begins else value
    return value


def short(label: str) -> str:
    """A label that fits, harmless to draw."""
    return shown(label.replace("\n", " ").replace("\t", " "), MOST_LABEL)


def inline_svg(svg: str, name: str, title: str) -> str:
    """matplotlib's SVG as an element of an HTML page: ids of its own, CSS variables for colours, nothing from outside.

    Only what stands inside of tags is touched; labels pass as they are, escaped by matplotlib.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    root = f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{escape(title)}">'
    svg = re.sub(r"<svg\b[^>]*>", lambda _: root, svg, count=1)
    body = re.sub(r"<[^>]*>", lambda tag: _adapted(tag[0], name), svg[len(root) :])
    return root + re.sub(r">\s+<", "><", body).strip()


def standalone_svg(figure: Figure) -> str:
    """A figure's SVG as a file of its own: light colours on white, for a viewer without the page's variables."""
    svg = figure.svg
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(variable, colour)
    root = svg[: svg.index(">")]
    named = f'{root} xmlns="http://www.w3.org/2000/svg" font-family="DejaVu Sans, Verdana, sans-serif"'
    return f'{named}><rect width="100%" height="100%" fill="white"/>{svg[len(root) + 1 :]}\n'


def _adapted(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    tag = re.sub(r"font-family: [^;\"]+; ?", "", tag)  # the page's own
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), tag)
    return re.sub(r"-?\d+\.\d{3,}(?![\d.e])", lambda number: f"{float(number[0]):.2f}", tag)
