"""PNGs for people: panels of predictions, overlays, and one sheet of training curves.

Drawn with Matplotlib's Figure objects on the Agg canvas: no display, no pyplot, no global state.
Matplotlib is imported with the first picture, as a run has none to draw before its first step.
"""

import functools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from csc_jax.reporting.writers import bank_was_ready

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Colors = tuple[tuple[int, int, int], ...]  # RGB, one a class

_DPI = 100
INK = "#222222"
GRID = "#dddddd"
LINES = (
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
_THUMBNAIL = 240  # of a picture on a contact sheet
_ACROSS = 5
_CHART_WIDTH, _CHART_HEIGHT = 440, 320  # of each on the sheet of curves
_GAP = 8
_LINE = 4  # between the pictures of `four`
_TITLE = 34
_HEADER = 28
_LEGEND_LINE = 24
_SWATCH = 14
_LETTER = 7  # mean width at font size 9, rounded up
_TITLE_LETTER = 11  # likewise of a title
_DRAWN = (0.5, 99.5)  # percentiles of a band that are black and white
_LOOKED_AT = 1 << 20  # pixels that they are taken of, about
_HATCH_PERIOD = 8
_LONGEST_NAME = 40  # characters of a class or file; a legend is as wide as its longest entry
_RIGHT_TO_LEFT = ("R", "AL", "RLE", "RLO", "RLI", "AN")  # Unicode's bidirectional classes
CAPTION = _THUMBNAIL // _LETTER  # characters above a picture on a contact sheet
_FULL_SIZE = 1000  # px of a picture's width for which its legend has letters of size 9


class _Chart(NamedTuple):
    title: str
    unit: str
    factor: float  # from the recorded value to the unit
    share: bool  # drawn on a fixed axis from 0 to 100%
    series: dict[str, str]  # metric key -> name in the legend
    when_ready: bool = False  # drawn from the step at which the bank held every class


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
    _Chart("Separ (Eq. 9), lower is better", "", 1, False, {"train/separation": "bank"}, True),
    _Chart("Cons (Eq. 7), higher is better", "", 1, False, {"train/consistency": "features"}),
    _Chart("Memory bank", "% of slots filled", 100, True, {"train/bank_fill": "fill"}),
    _Chart(
        "Bank updates that passed the gate",
        "% of steps",
        100,
        True,
        {"train/consistency_accepted": "consistency step", "train/enqueue_accepted": "enqueue"},
        True,
    ),
)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Returns how an image (H, W, K) is drawn, (H, W, 3) uint8 RGB.

    Its first three bands are red, green and blue; one band is grey, and with two blue is black.
    Values of 8 bits are drawn as they are, others from black at percentile 0.5, band by band, to
    white at percentile 99.5.
    """
    bands = image[..., :3]
    if bands.dtype != np.uint8:
        bands = np.stack([_stretched(bands[..., i]) for i in range(bands.shape[-1])], axis=-1)
    if bands.shape[-1] == 1:
        return bands.repeat(3, axis=-1)
    if bands.shape[-1] == 2:
        return np.concatenate([bands, np.zeros_like(bands[..., :1])], axis=-1)
    return np.ascontiguousarray(bands)


def _stretched(band: np.ndarray) -> np.ndarray:
    """Returns (H, W) of any values as uint8; one value throughout is black."""
    step = max(1, math.isqrt(band.size // _LOOKED_AT))
    low, high = np.percentile(band[::step, ::step], _DRAWN)
    shares = band.astype(np.float32) - np.float32(low)
    shares *= 255 / (high - low) if high > low else 0
    return shares.clip(0, 255).round().astype(np.uint8)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) uint8 class ids -> (H, W, 3) uint8 RGB; ids outside the palette (C, 3) are hatched."""
    known = labels < len(palette)
    colors = palette[np.where(known, labels, 0)]
    return np.where(known[..., None], colors, _hatch(*labels.shape))


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Blends an image (H, W, K) and the colours of class ids (H, W), half and half."""
    return cv2.addWeighted(as_rgb(image), 0.5, colorize(labels, palette), 0.5, 0)


def with_legend(picture: np.ndarray, palette: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Puts the colours and names of the classes below a picture, which itself stays as it is.

    Args:
      picture: (H, W, 3) uint8 RGB.
      palette: (C, 3) uint8 RGB.
      class_names: C names.

    Returns:
      (H + h, W', 3) uint8 RGB, white where there is nothing; W' is W or the length of a long name.
    """
    height, width, _ = picture.shape
    scale = max(1, round(width / _FULL_SIZE))
    legend = _legend(_colors(palette), _labels(class_names), width, scale)
    below, wide, _ = legend.shape
    whole = np.full((height + below, max(width, wide), 3), 255, np.uint8)
    whole[:height, :width] = picture
    whole[height:, :wide] = legend
    return whole


def save_panel(
    path: Path,
    columns: Mapping[str, Sequence[np.ndarray]],
    palette: np.ndarray,
    class_names: Sequence[str],
    title: str = "",
    row_titles: Sequence[str] = (),
    hatched: str = "ignored",
) -> None:
    """Writes a grid of pictures with a legend as a PNG: a row an image, a column a view of it.

    Args:
      path: the file; its folder is made.
      columns: header -> one picture a row, (H, W, K) as `as_rgb` draws it, or (H, W) uint8 class
        ids. An id that is no class is drawn hatched. Columns have equal numbers of rows and the
        pictures of a row equal sizes.
      palette: (C, 3) uint8 RGB.
      class_names: C names for the legend.
      title: one line at the top.
      row_titles: a line above each row, or none at all.
      hatched: what the legend says of hatched areas.
    """
    least_width = max(_LEAST_WIDTH, _LETTER * max(map(len, columns)))
    rows = [
        [_as_drawn(picture, palette, least_width) for picture in row]
        for row in zip(*columns.values(), strict=True)
    ]
    column_width = max(row[0].shape[1] for row in rows)
    pitch = column_width + _GAP
    width = max(len(columns) * pitch + _GAP, _TITLE_LETTER * len(title))
    legend = _legend(_colors(palette), (*_labels(class_names), hatched), width - 2 * _GAP)
    width = max(width, legend.shape[1] + 2 * _GAP)
    row_title = _HEADER if row_titles else 0
    pictures_height = sum(row_title + row[0].shape[0] + _GAP for row in rows)
    height = _TITLE + _HEADER + pictures_height + len(legend) + _GAP

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
    figure.figimage(legend, _GAP, y - len(legend), origin="upper")
    _save(figure, path)


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """Resizes a picture (H, W, 3) uint8 RGB so that its longer side has `_THUMBNAIL` px."""
    height, width, _ = picture.shape
    factor = _THUMBNAIL / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    return cv2.resize(picture, size, interpolation=how)


def draw_contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    palette: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> np.ndarray:
    """Draws small pictures in rows, each under its caption, and a legend below.

    Args:
      pictures: at least one, of `thumbnail`.
      captions: a line for each, of `CAPTION` characters; what is wider than a picture is cut off.
      palette: (C, 3) uint8 RGB.
      class_names: C names for the legend.
      title: one line at the top.

    Returns:
      (H, W, 3) uint8 RGB.
    """
    from matplotlib.transforms import Bbox

    across = min(_ACROSS, len(pictures))
    rows = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    pitch = _THUMBNAIL + _GAP
    width = max(across * pitch + _GAP, _TITLE_LETTER * len(title))
    legend = _legend(_colors(palette), _labels(class_names), width - 2 * _GAP)
    width = max(width, legend.shape[1] + 2 * _GAP)
    tallest = [max(picture.shape[0] for picture in row) for row in rows]
    height = _TITLE + sum(_HEADER + each + _GAP for each in tallest) + len(legend) + _GAP
    figure = _figure(width, height)
    _write(figure, _GAP, height - _TITLE // 2, title, fontsize=12, fontweight="bold")
    y = height - _TITLE
    for i, row in enumerate(rows):
        for column, picture in enumerate(row):
            x, caption = _GAP + column * pitch, captions[i * across + column][:CAPTION]
            above = Bbox.from_bounds(x, y - _HEADER, _THUMBNAIL, _HEADER)
            style = {"fontsize": 9, "clip_on": True, "clip_box": above}
            _write(figure, x, y - _HEADER // 2, caption, **style)
            figure.figimage(picture, x, y - _HEADER - picture.shape[0], origin="upper")
        y -= _HEADER + tallest[i] + _GAP
    figure.figimage(legend, _GAP, y - len(legend), origin="upper")
    return _pixels(figure)


def four(pictures: Sequence[np.ndarray], palette: np.ndarray) -> np.ndarray:
    """Puts four pictures of one size into two rows, a narrow grey line between them.

    Args:
      pictures: (H, W, K) as `as_rgb` draws it, or (H, W) uint8 class ids, hatched where an id is
        no class.
      palette: (C, 3) uint8 RGB.

    Returns:
      (h, w, 3) uint8 RGB; small pictures are enlarged, large ones reduced, as in a panel.
    """
    drawn = [_as_drawn(picture, palette, _LEAST_WIDTH) for picture in pictures]
    height, width, _ = drawn[0].shape
    whole = np.full((2 * height + _LINE, 2 * width + _LINE, 3), 128, np.uint8)
    for index, picture in enumerate(drawn):
        row, column = divmod(index, 2)
        y, x = row * (height + _LINE), column * (width + _LINE)
        whole[y : y + height, x : x + width] = picture
    return whole


@functools.lru_cache(maxsize=4)  # predict asks for the same one for each image
def _legend(colors: "Colors", names: tuple[str, ...], width: int, scale: int = 1) -> np.ndarray:
    """Draws the names of classes, each beside a swatch of its colour.

    Args:
      colors: one a class.
      names: one a class, and perhaps one more for hatched areas.
      width: px to fill, line by line.
      scale: of letters and swatches.

    Returns:
      (h, w, 3) uint8 RGB; w is `width`, or more where an entry is longer.
    """
    line, swatch, letter = scale * _LEGEND_LINE, scale * _SWATCH, scale * _LETTER
    entry = swatch + 20 * scale + letter * max(map(len, names))
    entries = max(1, width // entry)
    width = max(width, entry)
    height = line * math.ceil(len(names) / entries)
    figure = _figure(width, height)
    swatches = [np.tile(np.array(color, np.uint8), (swatch, swatch, 1)) for color in colors]
    swatches.append(np.tile(_hatch(swatch, swatch), (1, 1, 3)))
    for i, (name, picture) in enumerate(zip(names, swatches, strict=False)):
        row, column = divmod(i, entries)
        x, middle = column * entry, height - row * line - line // 2
        figure.figimage(picture, x, middle - swatch // 2, origin="upper")
        _write(figure, x + swatch + 6 * scale, middle, name, fontsize=9 * scale)
    return _pixels(figure)


def can_draw(text: str) -> bool:
    """Whether pictures show a name of a class or file as it is.

    Not if the font lacks a character, if the script runs from right to left, which Matplotlib does
    not turn around, or if the name is very long.
    """
    return len(text) <= _LONGEST_NAME and all(map(_has_glyph, text))


def _labels(class_names: Sequence[str]) -> tuple[str, ...]:
    """Returns what stands for each class in a picture: its name, or its id."""
    return tuple(name if can_draw(name) else f"class {i}" for i, name in enumerate(class_names))


def _as_drawable(text: str) -> str:
    """Returns a line with a question mark for each character that cannot be drawn."""
    return "".join(c if _has_glyph(c) else "?" for c in text)


@functools.cache
def _has_glyph(character: str) -> bool:
    from matplotlib import font_manager

    if unicodedata.bidirectional(character) in _RIGHT_TO_LEFT or not character.isprintable():
        return False
    regular, bold = (
        font_manager.get_font(font_manager.findfont(font_manager.FontProperties(weight=weight)))
        for weight in ("normal", "bold")
    )
    code = ord(character)
    return bool(regular.get_char_index(code) and bold.get_char_index(code))


def _colors(palette: np.ndarray) -> "Colors":
    return tuple(map(tuple, palette.tolist()))


def save_curves(path: Path, records: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Writes a sheet of small charts of a run's metrics as a PNG.

    Args:
      path: the file; its folder is made.
      records: as `writers.read_metrics` returns them; a null value is left out of its line, and a
        chart without any value out of the sheet. A legend gives a line's last value. Separ and the
        gates begin where the bank is ready (`writers.bank_was_ready`).
      title: one line at the top.
    """
    charts = [
        chart for chart in _CHARTS if any(_points(chart, key, records) for key in chart.series)
    ]
    across = min(3, max(1, len(charts)))
    down = math.ceil(len(charts) / across)
    figure = _figure(_CHART_WIDTH * across, _CHART_HEIGHT * down + _TITLE)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    for i, chart in enumerate(charts):
        _draw_chart(figure.add_subplot(down, across, i + 1), chart, records)
    _save(figure, path)


def draw_curves(records: Sequence[Mapping[str, Any]]) -> dict[str, "Figure"]:
    """Draws the charts of `save_curves` one by one: title -> a figure without background."""
    figures = {}
    for chart in _CHARTS:
        if any(_points(chart, key, records) for key in chart.series):
            figures[chart.title] = figure = empty_figure(_CHART_WIDTH, _CHART_HEIGHT)
            _draw_chart(figure.add_subplot(), chart, records)
    return figures


def empty_figure(width: int, height: int) -> "Figure":
    """Returns a figure of `width` x `height` px for one chart."""
    figure = _figure(width, height)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    return figure


def save_lines(
    path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str
) -> None:
    """Writes one chart of several runs over the training steps as a PNG.

    Args:
      path: the file; its folder is made.
      series: name of the run -> steps and values.
      title: of the chart.
    """
    width = 720
    figure = _figure(width, 440)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(series.items()):
        axes.plot(steps, values, color=LINES[i % len(LINES)], linewidth=1.8, label=_plain(name))
    axes.set_xlabel("step", fontsize=9, color=INK)
    _limit_ticks(axes, 6)
    _style(axes, title, width)
    _save(figure, path)


def save_bars(
    path: Path, series: Mapping[str, Sequence[float]], labels: Sequence[str], title: str
) -> None:
    """Writes grouped bars as a PNG: one group a label, one bar a run.

    Args:
      path: the file; its folder is made.
      series: name of the run -> one value a label.
      labels: of the groups, which are classes.
      title: of the chart.
    """
    width = max(720, 60 * len(labels))
    figure = _figure(width, 440)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.add_subplot()
    bar = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        place = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * bar
        axes.bar(place, values, bar, color=LINES[i % len(LINES)], label=_plain(name))
    drawn = _labels(labels)
    axes.set_xticks(range(len(labels)), drawn, rotation=40, ha="right", parse_math=False)
    _style(axes, title, width)
    _save(figure, path)


def _limit_ticks(axes: "Axes", most: int) -> None:
    """Sets at most `most` + 1 ticks on the x axis, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))


def _style(axes: "Axes", title: str, width: int) -> None:
    """Dresses a chart of `width` px, with title and legend above it, where no curve is."""
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    names = axes.get_legend_handles_labels()[1]
    longest = max(len(name) - name.count("$") - name.count("_") for name in names)
    legend = axes.legend(
        title=title,
        title_fontsize=10,
        fontsize=8,
        ncols=max(1, width // (_LETTER * longest + 36)),
        handlelength=1.2,
        columnspacing=1.2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
        borderpad=0.2,
        alignment="left",
        frameon=False,
        labelcolor=INK,
    )
    legend.get_title().set_color(INK)


def _draw_chart(axes: "Axes", chart: _Chart, records: Sequence[Mapping[str, Any]]) -> None:
    for (key, name), color in zip(chart.series.items(), LINES, strict=False):
        points = _points(chart, key, records)
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
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.set_ylabel(chart.unit, fontsize=8, color=INK)
    _limit_ticks(axes, 5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if chart.share:
        axes.set_ylim(-3, 103)
    _style(axes, chart.title, _CHART_WIDTH)


def _points(
    chart: _Chart, key: str, records: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """Steps and values of one line of a chart."""
    return [
        (record["step"], record[key] * chart.factor)
        for record in records
        if record.get(key) is not None and (bank_was_ready(record) or not chart.when_ready)
    ]


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
    if picture.ndim == 3:
        picture = as_rgb(picture)
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
    where = x / width, y / height
    # Names of classes and files are the user's, and no formulas.
    figure.text(*where, _as_drawable(text), va="center", color=INK, parse_math=False, **style)


def _plain(name: str) -> str:
    """Returns the name of a run for a legend, where "$" begins a formula."""
    return _as_drawable(name).replace("$", r"\$")


def _pixels(figure: "Figure") -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
