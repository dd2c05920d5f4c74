"""Draws the figure of the method in the README.

Command:    python scripts/draw_method.py [--out=docs/images/method.svg]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "method.svg"
INK, EDGE, PAPER = "#1f2933", "#52606d", "#fbfbfa"
DATA, NETWORK, BANK, LOSS = "#eceff1", "#cfe3f5", "#d5ecd9", "#fbe3c8"


class Box(NamedTuple):
    """A rounded box: its centre, size and colour, a bold first line and the others."""

    x: float
    y: float
    width: float
    height: float
    color: str
    title: str
    text: str = ""


BOXES = {
    "weak": Box(1.3, 5.3, 2.2, 0.9, DATA, "Unlabelled images", "weak view"),
    "strong": Box(1.3, 3.95, 2.2, 0.9, DATA, "Unlabelled images", "strong view, CutMix"),
    "labeled": Box(1.3, 2.75, 2.2, 0.9, DATA, "Labelled images", "weak view"),
    "teacher": Box(4.2, 5.3, 1.9, 0.9, NETWORK, "Teacher", "no gradient"),
    "student": Box(4.2, 3.35, 1.9, 2.1, NETWORK, "Student", "trained by gradient"),
    "pseudo": Box(7.3, 5.3, 2.3, 0.9, DATA, "Pseudo-labels", "mask M (Eq. 4), CutMix"),
    "logits": Box(7.3, 3.95, 2.3, 0.9, DATA, "Logits", "segmentation head"),
    "features": Box(7.3, 2.75, 2.3, 0.9, DATA, "Pixel features", "projection head"),
    "loss_u": Box(10.5, 5.3, 2.3, 0.9, LOSS, "$L_u$ (Eq. 3)", "learn the pseudo-labels"),
    "loss_s": Box(10.5, 3.95, 2.3, 0.9, LOSS, "$L_s$ (Eq. 2)", "learn the labels"),
    "loss_c": Box(10.5, 2.75, 2.3, 0.9, LOSS, "$L_c$ (Eq. 6)", "contrast, TopN positives"),
    "consistency": Box(
        3.9, 0.85, 2.6, 1.1, BANK, "Consistency step", "Eq. 8\ngate: Separ must fall"
    ),
    "enqueue": Box(
        7.3, 0.85, 2.6, 1.1, BANK, "Enqueue", "new pixels of each class\ngate: Separ in range"
    ),
    "bank": Box(10.5, 0.85, 2.3, 1.1, BANK, "Memory bank", "a queue of features\nfor each class"),
    "total": Box(13.2, 3.95, 1.5, 0.9, LOSS, "$L$ (Eq. 1)", "sum"),
}

# (from, to, label, side of the start, side of the end); a side is left, right, top or bottom.
ARROWS = (
    ("weak", "teacher", "", "right", "left"),
    ("strong", "student", "", "right", "left"),
    ("labeled", "student", "", "right", "left"),
    ("student", "teacher", "EMA of\nthe weights", "top", "bottom"),
    ("teacher", "pseudo", "", "right", "left"),
    ("student", "logits", "", "right", "left"),
    ("student", "features", "", "right", "left"),
    ("pseudo", "loss_u", "", "right", "left"),
    ("logits", "loss_u", "", "right", "left"),
    ("logits", "loss_s", "", "right", "left"),
    ("features", "loss_c", "queries", "right", "left"),
    ("features", "consistency", "", "bottom", "top"),
    ("features", "enqueue", "pixels drawn by class", "bottom", "top"),
    ("consistency", "enqueue", "", "right", "left"),
    ("enqueue", "bank", "", "right", "left"),
    ("bank", "loss_c", "keys", "top", "bottom"),
    ("loss_u", "total", r"$\lambda_u$", "right", "left"),
    ("loss_s", "total", "", "right", "left"),
    ("loss_c", "total", r"$\lambda_c$", "right", "left"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the figure, the same bytes each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="an SVG file")
    out = parser.parse_args(arguments).out
    with matplotlib.rc_context({"svg.hashsalt": "csc_jax", "mathtext.fontset": "dejavusans"}):
        figure = Figure(figsize=(11.4, 4.95))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 14.2), ylim=(0, 6.1))
        axes.axis("off")
        # The figure has a ground of its own, so that it can be read on a dark page as well.
        axes.add_patch(_rounded(0.03, 0.03, 14.14, 6.04, PAPER, EDGE, 0.2, 0.6))
        for box in BOXES.values():
            _draw_box(axes, box)
        for start, end, label, leaves, arrives in ARROWS:
            _draw_arrow(axes, BOXES[start], BOXES[end], label, leaves, arrives)
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    # Matplotlib ends lines with blanks, which tools for text complain of.
    lines = out.read_text().splitlines()
    out.write_text("".join(f"{line.rstrip()}\n" for line in lines))


def _rounded(
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    edge: str,
    radius: float,
    line: float,
) -> FancyBboxPatch:
    style = f"round,pad=0,rounding_size={radius}"
    return FancyBboxPatch(
        (x, y), width, height, boxstyle=style, facecolor=color, edgecolor=edge, linewidth=line
    )


def _draw_box(axes: Axes, box: Box) -> None:
    left, bottom = box.x - box.width / 2, box.y - box.height / 2
    axes.add_patch(_rounded(left, bottom, box.width, box.height, box.color, EDGE, 0.12, 0.9))
    lines = box.text.count("\n") + 1
    style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25}
    axes.text(box.x, box.y + 0.15 * lines, box.title, fontsize=10.5, fontweight="bold", **style)
    axes.text(box.x, box.y - 0.19, box.text, fontsize=9, **style)


def _draw_arrow(axes: Axes, start: Box, end: Box, label: str, leaves: str, arrives: str) -> None:
    tail, head = _edge(start, leaves, end), _edge(end, arrives, start)
    arrow = {"arrowstyle": "-|>", "color": EDGE, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", head, tail, arrowprops=arrow)
    if label:
        x, y = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2
        style = {"fontsize": 9, "color": INK}
        if tail[1] == head[1]:
            axes.text(x, y + 0.1, label, ha="center", va="bottom", **style)
        elif tail[1] > head[1] or tail[0] == head[0]:
            axes.text(x + 0.1, y, label, ha="left", va="center", **style)
        else:
            axes.text(x - 0.1, y, label, ha="right", va="center", **style)


def _edge(box: Box, side: str, other: Box) -> tuple[float, float]:
    """Returns a point on a side of a box, level with the other box as far as the side goes.

    The centre of the lower of two boxes decides, so that arrows are horizontal where they can be.
    """
    if side in ("left", "right"):
        reach = box.height / 2 - 0.25
        y = other.y if other.height <= box.height else box.y
        y = min(max(y, box.y - reach), box.y + reach)
        return box.x + (box.width / 2 if side == "right" else -box.width / 2), y
    reach = box.width / 2 - 0.3
    x = min(max(other.x, box.x - reach), box.x + reach)
    return x, box.y + (box.height / 2 if side == "top" else -box.height / 2)


if __name__ == "__main__":
    main()
