"""PNGs for people: panels of predictions, overlays, and one sheet of training curves.

Drawn with Matplotlib's Figure objects on the Agg canvas: no display, no pyplot, no global state.
Matplotlib is imported with the first picture, as a run has none to draw before its first step.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_INK = "#222222"
_GRID = "#dddddd"
_LINES = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe-Ito: safe for colour blindness

# Lengths of a panel in px. A picture narrower than the least width, or than its header, is enlarged
# by a whole factor, so that a pixel of a 64x64 image can be seen; a very wide one is reduced.
_LEAST_WIDTH = 192
_GREATEST_WIDTH = 480
_GAP = 8
_TITLE = 34
_HEADER = 28
_LEGEND_LINE = 24
_SWATCH = 14
_LETTER = 7  # mean width at font size 9, rounded up
_HATCH_PERIOD = 8


class _Chart(NamedTuple):
    title: str
    unit: str
    factor: float  # from the recorded value to the unit
    share: bool  # drawn on a fixed axis from 0 to 100%
    series: dict[str, str]  # metric key -> name in the legend


_CHARTS = (
    _Chart(
        "Losses",
        "",
        1,
        False,
        {
            "train/loss": "total",
            "train/loss_s": "$L_s$ labels",
            "train/loss_u": "$L_u$ pseudo-labels",
            "train/loss_c": "$L_p$ or $L_c$ contrast",
        },
    ),
    _Chart(
        "Mean IoU on the validation split",
        "%",
        100,
        False,
        {"val/teacher_miou": "teacher", "val/student_miou": "student"},
    ),
    _Chart(
        "Pseudo-labels",
        "% of pixels",
        100,
        True,
        {"train/kept_fraction": "kept", "train/pseudo_label_accuracy": "right among the kept"},
    ),
    _Chart("Learning rate", "", 1, False, {"train/learning_rate": "backbone"}),
    _Chart("Separ (Eq. 9), lower is better", "", 1, False, {"train/separation": "bank"}),
    _Chart("Cons (Eq. 7), higher is better", "", 1, False, {"train/consistency": "features"}),
    _Chart("Memory bank", "% of slots filled", 100, True, {"train/bank_fill": "fill"}),
    _Chart(
        "Bank updates that passed the gate",
        "% of steps",
        100,
        True,
        {"train/consistency_accepted": "consistency step", "train/enqueue_accepted": "enqueue"},
    ),
)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) uint8 class ids -> (H, W, 3) uint8 RGB; ids outside the palette (C, 3) are hatched."""
    known = labels < len(palette)
    colors = palette[np.where(known, labels, 0)]
    return np.where(known[..., None], colors, _hatch(*labels.shape))


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Blends an image (H, W, 3) uint8 RGB and the colours of class ids (H, W), half and half."""
    return cv2.addWeighted(image, 0.5, colorize(labels, palette), 0.5, 0)


def save_panel(
    path: Path,
    columns: Mapping[str, Sequence[np.ndarray]],
    palette: np.ndarray,
    class_names: Sequence[str],
    title: str = "",
    row_titles: Sequence[str] = (),
) -> None:
    """Writes a grid of pictures with a legend as a PNG: a row an image, a column a view of it.

    Args:
      path: the file; its folder is made.
      columns: header -> one picture a row, (H, W, 3) uint8 RGB or (H, W) uint8 class ids. An id
        that is no class is drawn hatched: 255 marks ignored pixels of the ground truth and
        those that the mask drops from the pseudo-labels. Columns have equal numbers of rows and
        the pictures of a row equal sizes.
      palette: (C, 3) uint8 RGB.
      class_names: C names for the legend.
      title: one line at the top.
      row_titles: a line above each row, or none at all.
    """
    least_width = max(_LEAST_WIDTH, _LETTER * max(map(len, columns)))
    rows = [
        [_as_drawn(picture, palette, least_width) for picture in row]
        for row in zip(*columns.values(), strict=True)
    ]
    column_width = max(row[0].shape[1] for row in rows)
    pitch = column_width + _GAP
    width = len(columns) * pitch + _GAP
    names = [*class_names, "ignored or not kept"]
    entry_width = _SWATCH + 20 + _LETTER * max(map(len, names))
    entries_a_line = max(1, (width - _GAP) // entry_width)
    legend_height = _LEGEND_LINE * math.ceil(len(names) / entries_a_line)
    row_title = _HEADER if row_titles else 0
    pictures_height = sum(row_title + row[0].shape[0] + _GAP for row in rows)
    height = _TITLE + _HEADER + pictures_height + legend_height + _GAP

    figure = _figure(width, height)
    _write(figure, _GAP, height - _TITLE // 2, title, fontsize=12, fontweight="bold")
    y = height - _TITLE - _HEADER  # Matplotlib's y grows upwards
    for column, header in enumerate(columns):
        x = _GAP + column * pitch + column_width // 2
        _write(figure, x, y + _HEADER // 2, header, fontsize=9, ha="center")
    for i, row in enumerate(rows):
        if row_titles:
            _write(figure, _GAP, y - _HEADER // 2, row_titles[i], fontsize=9)
        y -= row_title + row[0].shape[0]
        for column, picture in enumerate(row):
            x = _GAP + column * pitch + (column_width - picture.shape[1]) // 2
            figure.figimage(picture, x, y, origin="upper")  # px for px, never resampled
        y -= _GAP
    swatches = [np.tile(color, (_SWATCH, _SWATCH, 1)) for color in palette]
    swatches.append(np.tile(_hatch(_SWATCH, _SWATCH), (1, 1, 3)))
    for i, (swatch, name) in enumerate(zip(swatches, names, strict=True)):
        line, place = divmod(i, entries_a_line)
        x = _GAP + place * entry_width
        middle = y - line * _LEGEND_LINE - _LEGEND_LINE // 2
        figure.figimage(swatch, x, middle - _SWATCH // 2, origin="upper")
        _write(figure, x + _SWATCH + 6, middle, name, fontsize=9)
    _save(figure, path)


def save_curves(path: Path, records: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Writes a sheet of small charts of a run's metrics as a PNG.

    Args:
      path: the file; its folder is made.
      records: as `writers.read_metrics` returns them; a null value is left out of its line, and a
        chart without any value out of the sheet. A legend gives a line's last value.
      title: one line at the top.
    """
    recorded = {key for record in records for key, value in record.items() if value is not None}
    charts = [chart for chart in _CHARTS if recorded & set(chart.series)]
    across = min(3, max(1, len(charts)))
    down = math.ceil(len(charts) / across)
    figure = _figure(440 * across, 300 * down + _TITLE)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    for i, chart in enumerate(charts):
        _draw_chart(figure.add_subplot(down, across, i + 1), chart, records)
    _save(figure, path)


def save_lines(
    path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> None:
    """Writes one chart of several runs over the training steps as a PNG.

    Args:
      path: the file; its folder is made.
      series: name of the run -> steps and values.
      title: of the chart.
    """
    figure = _figure(720, 440)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(series.items()):
        axes.plot(steps, values, color=_LINES[i % len(_LINES)], linewidth=1.8, label=name)
    axes.set_xlabel("step", fontsize=9, color=_INK)
    _limit_ticks(axes, 6)
    _style(axes, title)
    _save(figure, path)


def save_bars(
    path: Path, series: Mapping[str, Sequence[float]], labels: Sequence[str], title: str
) -> None:
    """Writes grouped bars as a PNG: one group a label, one bar a run.

    Args:
      path: the file; its folder is made.
      series: name of the run -> one value a label.
      labels: of the groups.
      title: of the chart.
    """
    figure = _figure(max(720, 60 * len(labels)), 440)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        place = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        axes.bar(place, values, width, color=_LINES[i % len(_LINES)], label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
    _style(axes, title)
    _save(figure, path)


def _limit_ticks(axes: "Axes", most: int) -> None:
    """Sets at most `most` + 1 ticks on the x axis, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))


def _style(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(fontsize=8, frameon=True, framealpha=0.8, edgecolor="none", labelcolor=_INK)


def _draw_chart(axes: "Axes", chart: _Chart, records: Sequence[Mapping[str, Any]]) -> None:
    for (key, name), color in zip(chart.series.items(), _LINES, strict=False):
        points = [(r["step"], r[key] * chart.factor) for r in records if r.get(key) is not None]
        if not points:
            continue
        steps, values = np.array(points, np.float64).T
        window = 2 * (len(values) // 40) + 1  # odd, so that the mean does not lag
        if window > 1:  # many noisy points: the running mean on top of them
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, window)
        marker = "o" if len(values) <= 20 else ""
        label = f"{name}  {values[-1]:.4g}"
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, ms=3.5, label=label)
    axes.set_xlim(0, max(record["step"] for record in records) * 1.02)  # the same on all charts
    axes.set_xlabel("step", fontsize=8, color=_INK)
    axes.set_ylabel(chart.unit, fontsize=8, color=_INK)
    _limit_ticks(axes, 5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if chart.share:
        axes.set_ylim(-3, 103)
    _style(axes, chart.title)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one, over those that exist near the ends."""
    ones = np.ones(window)
    counts = np.convolve(np.ones_like(values), ones, "same")
    return np.convolve(values, ones, "same") / counts


def _hatch(height: int, width: int) -> np.ndarray:
    """(H, W, 1) uint8 dark grey with light diagonals, unlike any flat class colour."""
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % _HATCH_PERIOD
    return np.where(diagonal < 2, 110, 56).astype(np.uint8)[..., None]


def _as_drawn(picture: np.ndarray, palette: np.ndarray, least_width: int) -> np.ndarray:
    """A picture or class ids of any size -> (h, w, 3) uint8 RGB at the size in the panel."""
    height, width = picture.shape[:2]
    if width > _GREATEST_WIDTH:
        size = (_GREATEST_WIDTH, max(1, round(height * _GREATEST_WIDTH / width)))
        # Class ids must not be averaged.
        how = cv2.INTER_AREA if picture.ndim == 3 else cv2.INTER_NEAREST
        picture = cv2.resize(picture, size, interpolation=how)
    else:
        factor = math.ceil(least_width / width)
        picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    # Coloured only now, so that the hatch is not scaled with the picture.
    return picture if picture.ndim == 3 else colorize(picture, palette)


def _figure(width: int, height: int) -> "Figure":
    """A white figure of `width` x `height` px."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")


def _write(figure: "Figure", x: int, y: int, text: str, **style: Any) -> None:
    """Writes `text` vertically centred on (x, y) px from the lower left corner."""
    width, height = figure.bbox.size
    figure.text(x / width, y / height, text, va="center", color=_INK, **style)


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
