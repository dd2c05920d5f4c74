"""Charts of a report as inline SVG, whose colours follow the page's.

No name of a user's stands in them: these are on the page, where they are escaped.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from csc_jax.evaluation.calibration import BINS, Calibration
from csc_jax.reporting import visualize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 1000  # of a line; more make a file larger and look the same
# Variables of the page's style sheet in place of colours.
_COLORS = {visualize.INK: "currentColor", visualize.GRID: "var(--rule)"} | {
    color: f"var(--line-{i})" for i, color in enumerate(visualize.LINES)
}
LINES = len(visualize.LINES)


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the charts of a run's metrics, title -> SVG; see `visualize.save_curves`."""
    figures = visualize.draw_curves(_thinned(records))
    return {title: _svg(figure, title) for title, figure in figures.items()}


def reliability(calibration: Calibration) -> str:
    """Returns the accuracy of each bin of confidence, and how many pixels lie in it."""
    figure = visualize.empty_figure(440, 400)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    edges = np.arange(BINS) / BINS
    style = {"width": 1 / BINS, "align": "edge", "color": visualize.LINES[0], "alpha": 0.75}
    above.bar(edges, np.nan_to_num(calibration.accuracy), **style)
    above.plot([0, 1], [0, 1], color=visualize.INK, linewidth=1, linestyle="--")
    above.set_ylim(0, 1)
    above.set_ylabel("share of right pixels", fontsize=8, color=visualize.INK)
    share = calibration.count / max(calibration.count.sum(), 1)
    below.bar(edges, 100 * share, **style)
    below.set_ylabel("% of pixels", fontsize=8, color=visualize.INK)
    below.set_xlabel("confidence", fontsize=8, color=visualize.INK)
    below.set_xlim(0, 1)
    for axes in (above, below):
        _plain(axes)
    return _svg(figure, "Reliability curve")


def lines(
    series: Iterable[tuple[Sequence[float], Sequence[float]]], title: str, across: str, up: str
) -> str:
    """Returns lines over steps, each in the colour of its place.

    Args:
      series: x and y of each.
      title: of the chart, for those who cannot see it.
      across: label of the x axis.
      up: label of the y axis.
    """
    figure = visualize.empty_figure(720, 380)
    axes = figure.add_subplot()
    for i, (x, y) in enumerate(series):
        axes.plot(x, y, **_line(i), ms=3)
    axes.set_xlabel(across, fontsize=8, color=visualize.INK)
    axes.set_ylabel(up, fontsize=8, color=visualize.INK)
    _plain(axes)
    return _svg(figure, title)


def label_efficiency(
    series: Iterable[tuple[Sequence[float], Sequence[float], Sequence[float]]],
) -> str:
    """Returns mean mIoU over the number of labelled images, with deviations, a line a row.

    Args:
      series: labelled images, mean and standard deviation in percent of each row.
    """
    figure = visualize.empty_figure(720, 380)
    axes = figure.add_subplot()
    ticks = set[float]()
    for i, (images, mean, deviation) in enumerate(series):
        axes.errorbar(images, mean, deviation, **_line(i), ms=4, capsize=3)
        ticks.update(images)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(sorted(ticks), [f"{n:g}" for n in sorted(ticks)])
    axes.set_xlabel("labelled images", fontsize=8, color=visualize.INK)
    axes.set_ylabel("mIoU %", fontsize=8, color=visualize.INK)
    _plain(axes)
    return _svg(figure, "Label efficiency")


def _line(index: int) -> dict[str, Any]:
    """The style of a line by its place, as the page's legend has it."""
    dashes = ("-", "--", ":")[index // LINES % 3]
    color = visualize.LINES[index % LINES]
    return {"color": color, "linestyle": dashes, "linewidth": 1.8, "marker": "o"}


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=8, colors=visualize.INK, length=0)
    axes.grid(color=visualize.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _thinned(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns every n-th record of a long run, and those between that are no averages of steps."""
    train = sum("train/loss" in record for record in records)
    every = -(-train // _MOST_POINTS)
    if every <= 1:
        return list(records)
    kept, index = [], 0
    for record in records:
        if "train/loss" not in record:
            kept.append(record)
            continue
        index += 1
        if (train - index) % every == 0:  # the last one among them
            kept.append(record)
    return kept


def _svg(figure: "Figure", title: str) -> str:
    """Returns a figure as an element of an HTML page; `title` is ours."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Letters stay letters, and ids of one chart do not meet those of another.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r' id="([\w-]+)"', lambda m: m[0] if m[1] in used else "", text)
    for color, variable in _COLORS.items():
        text = text.replace(color, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg class="chart" role="img" aria-label="{title}" {box[0]}>'
    return re.sub(r"<svg[^>]*>", head, text, count=1)
