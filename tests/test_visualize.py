"""PNGs: the right colours in the right places, legible sizes, no display."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from csc_jax.reporting import visualize

PALETTE = np.array([[128, 64, 128], [0, 130, 180], [220, 20, 60]], np.uint8)
NAMES = ("road", "sky", "person")
GREYS = {56, 110}  # of the hatch


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def is_hatched(pixels):
    return set(np.unique(pixels)) == GREYS


def place_of(panel, color):
    """Returns the rows and columns between which a colour occurs, without the legend."""
    rows, columns = np.nonzero((panel[:-32] == color).all(axis=-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_colorize_paints_classes_and_hatches_the_rest():
    labels = np.full((16, 16), 255, np.uint8)
    labels[:, :3] = [0, 1, 2]
    drawn = visualize.colorize(labels, PALETTE)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:, :3], np.broadcast_to(PALETTE, (16, 3, 3)))
    assert is_hatched(drawn[:, 3:])


@pytest.mark.parametrize(("width", "side"), [(300, 14), (40, 14), (2400, 28)])
def test_a_legend_stands_below_a_picture_that_stays_as_it_is(width, side):
    picture = np.random.default_rng(0).integers(0, 100, (50, width, 3), np.uint8)
    whole = visualize.with_legend(picture, PALETTE, NAMES)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(whole[:50, :width], picture)
    assert (whole[:50, width:] == 255).all()
    legend = whole[50:]
    assert not GREYS & set(np.unique(legend[:, :side]))  # nothing is hatched
    for color, name in zip(PALETTE, NAMES, strict=True):
        rows, columns = np.nonzero((legend == color).all(axis=-1))
        assert len(rows) == side * side, name
        top, left = rows.min(), columns.min()
        assert (rows.max() + 1 - top, columns.max() + 1 - left) == (side, side)
        beside = legend[top : top + side, left + side + 4 :]
        assert (beside < 128).all(axis=-1).any(), name  # dark letters


def test_names_are_no_formulas(tmp_path):
    names = ("$\\frac$", "100$ bill$_", "Straße")  # two lines of the legend
    whole = visualize.with_legend(np.zeros((9, 300, 3), np.uint8), PALETTE, names)
    assert whole.shape == (9 + 2 * 24, 300, 3)
    visualize.save_bars(tmp_path / "b.png", {"run": [1.0] * 3}, names, "Mean cosine")


def test_overlay_blends_half_and_half():
    image = np.full((2, 2, 3), 100, np.uint8)
    blend = visualize.overlay(image, np.array([[0, 1], [2, 2]], np.uint8), PALETTE)
    np.testing.assert_array_equal(blend[0], [[114, 82, 114], [50, 115, 140]])


def test_panel_shows_each_picture_enlarged_and_in_its_column(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    truth = np.ones((64, 64), np.uint8)
    truth[10, 20] = 2
    pseudo = np.zeros((64, 64), np.uint8)
    pseudo[:, 32:] = 255
    path = tmp_path / "plots" / "panel.png"
    columns = {"image": [image], "ground truth": [truth], "pseudo-label": [pseudo]}
    visualize.save_panel(path, columns, PALETTE, NAMES, "step 3")
    panel = read(path)

    top, bottom, left, right = place_of(panel, PALETTE[1])  # the truth, 3 times as large
    assert (bottom - top, right - left) == (192, 192)
    truth_drawn = panel[top:bottom, left:right]
    np.testing.assert_array_equal(truth_drawn[30:33, 60:63], np.full((3, 3, 3), PALETTE[2]))
    np.testing.assert_array_equal(truth_drawn[::3, ::3], PALETTE[truth])

    pitch = 192 + 8
    image_drawn = panel[top:bottom, left - pitch : right - pitch]
    np.testing.assert_array_equal(image_drawn, image.repeat(3, 0).repeat(3, 1))
    pseudo_drawn = panel[top:bottom, left + pitch : right + pitch]
    assert (pseudo_drawn[:, :96] == PALETTE[0]).all()
    assert is_hatched(pseudo_drawn[:, 96:])


def test_panel_has_a_legend_entry_for_each_class(tmp_path):
    picture = np.full((64, 64, 3), 255, np.uint8)  # no class colour but in the legend
    visualize.save_panel(tmp_path / "p.png", {"image": [picture] * 2}, PALETTE, NAMES)
    panel = read(tmp_path / "p.png")
    for color in PALETTE:
        assert (panel == color).all(axis=-1).sum() == 14 * 14


def test_the_legend_says_what_is_hatched(tmp_path, monkeypatch):
    seen, legend = [], visualize._legend

    def spy(colors, names, *size):
        seen.append(names)
        return legend(colors, names, *size)

    monkeypatch.setattr(visualize, "_legend", spy)
    picture = np.full((64, 64, 3), 255, np.uint8)
    for hatched in ({}, {"hatched": "ignored or correct"}):
        visualize.save_panel(tmp_path / "p.png", {"image": [picture]}, PALETTE, NAMES, **hatched)
        panel = read(tmp_path / "p.png")
        greys = [(panel == grey).all(axis=-1).sum() for grey in (56, 110)]
        assert sum(greys) >= 14 * 14  # its swatch; letters have some of these greys as well
        assert min(greys) > 0
    assert seen == [(*NAMES, "ignored"), (*NAMES, "ignored or correct")]


def test_a_panel_is_as_wide_as_its_title(tmp_path):
    title = (
        "worst images of val: cutmix_mean_teacher+csc on pascal_voc, seed 0, teacher at step 39000"
    )
    picture = np.full((64, 64, 3), 255, np.uint8)
    visualize.save_panel(tmp_path / "p.png", {"image": [picture]}, PALETTE, NAMES, title)
    ink = np.nonzero((read(tmp_path / "p.png")[:34] < 128).all(axis=-1))[1]
    assert 600 < ink.max() < read(tmp_path / "p.png").shape[1] - 8


def test_large_pictures_of_several_sizes_fit_a_panel(tmp_path):
    wide = np.zeros((100, 2000), np.uint8)
    wide[:, 1002:] = 2  # within a reduced column
    rows = [wide, np.zeros((300, 200), np.uint8)]
    visualize.save_panel(tmp_path / "p.png", {"teacher": rows}, PALETTE, NAMES)
    panel = read(tmp_path / "p.png")
    assert panel.shape[1] == 480 + 2 * 8
    road, sky, person = ((panel == color).all(axis=-1).sum() - 14 * 14 for color in PALETTE)
    assert road + person == 480 * 24 + 300 * 200
    assert sky == 0  # class 1 lies between 0 and 2, but ids are not averaged


def test_rows_have_titles_above_them(tmp_path):
    pictures = [np.zeros((192, 192), np.uint8), np.ones((192, 192), np.uint8)]
    blank = [np.full((192, 192, 3), 255, np.uint8)] * 2
    columns = {"teacher": pictures, "blank": blank, "blank too": blank}
    visualize.save_panel(tmp_path / "plain.png", columns, PALETTE, NAMES)
    titles = ["lindau: mIoU 12.3%", "ulm: mIoU 45.6%"]
    visualize.save_panel(tmp_path / "titled.png", columns, PALETTE, NAMES, row_titles=titles)
    plain, panel = read(tmp_path / "plain.png"), read(tmp_path / "titled.png")
    assert panel.shape[0] == plain.shape[0] + 2 * 28
    for color in PALETTE[:2]:
        top, bottom, left, right = place_of(panel, color)
        assert (bottom - top, right - left) == (192, 192)
        assert (panel[top - 28 : top] < 128).all(axis=-1).any()  # a line of dark text


def test_pictures_are_as_wide_as_a_long_header(tmp_path):
    header = "pseudo-label, hatched where M = 0"
    columns = {"image": [np.zeros((64, 64), np.uint8)], header: [np.ones((64, 64), np.uint8)]}
    visualize.save_panel(tmp_path / "p.png", columns, PALETTE, NAMES)
    panel = read(tmp_path / "p.png")
    top, _, left, right = place_of(panel, PALETTE[1])
    dark = np.nonzero((panel[top - 28 : top] < 128).all(axis=-1))[1]
    assert left <= dark.max() < right


@pytest.fixture
def records():
    steps = range(10, 610, 10)
    train = [
        {"step": s, "train/loss": 1 / s, "train/loss_c": None if s < 100 else 0.3} for s in steps
    ]
    return [*train, {"step": 600, "val/teacher_miou": 0.5}]


def test_sheet_leaves_out_charts_without_records(tmp_path, records):
    keys = [key for chart in visualize._CHARTS for key in chart.series]
    never = {"train/separation": None}  # a key without any value
    everything = [dict.fromkeys(keys, 0.5) | record for record in records]
    visualize.save_curves(tmp_path / "two.png", [never | r for r in records], "csc")
    visualize.save_curves(tmp_path / "all.png", everything, "csc")
    two, all_charts = read(tmp_path / "two.png"), read(tmp_path / "all.png")
    assert two.shape == (354, 880, 3)
    assert all_charts.shape == (994, 1320, 3)


def test_sheet_draws_the_lines(tmp_path, records):
    visualize.save_curves(tmp_path / "c.png", records)
    sheet = read(tmp_path / "c.png")
    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    for color, left, right in [(blue, 0, 440), (blue, 440, 880)]:
        assert (sheet[:, left:right] == color).all(axis=-1).any()
    assert not (sheet == orange).all(axis=-1)[:, 440:].any()  # the student was not scored


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, drawn."""
    kept = []

    def keep(figure, path):
        FigureCanvasAgg(figure).draw()
        kept.append(figure)

    monkeypatch.setattr(visualize, "_save", keep)
    return kept


def test_legends_cover_no_curve_and_no_other_legend(records, figures):
    keys = [key for chart in visualize._CHARTS for key in chart.series]
    path, steps = Path("unused"), list(range(50))
    visualize.save_curves(path, [dict.fromkeys(keys, 0.123456) | r for r in records], "csc")
    runs = {f"a run with a rather long name {i}": (steps, steps) for i in range(6)}
    visualize.save_lines(path, runs, "Separ (Eq. 9) on cityscapes, lower is better")
    visualize.save_bars(path, dict.fromkeys(runs, [1.0] * 3), NAMES, "Mean cosine")
    for figure in figures:
        plots = [axes.get_window_extent() for axes in figure.axes]
        legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
        titles = [axes.get_legend().get_title().get_text() for axes in figure.axes]
        assert all(titles)
        for i, legend in enumerate(legends):
            assert not any(legend.padded(-1).overlaps(box) for box in plots)
            assert not any(legend.overlaps(box) for box in legends[:i])
            assert legend.x0 >= 0
            assert legend.x1 <= figure.bbox.x1
            assert legend.y1 <= figure.bbox.y1
    assert [len(figure.axes) for figure in figures] == [8, 1, 1]


def test_separ_and_gates_begin_where_the_bank_is_ready(figures):
    """At step 30 it became ready within the window of a record."""
    bank = ("separation", "enqueue_accepted", "consistency_accepted", "bank_fill", "loss")
    readiness = {10: 0.0, 20: 0.0, 30: 0.4, 40: 1.0, 50: 1.0}
    records = [
        {"step": step, "train/ready": ready} | {f"train/{name}": 0.5 for name in bank}
        for step, ready in readiness.items()
    ]
    records.append({"step": 10, "train/consistency": 0.9})  # has no bank in it
    visualize.save_curves(Path("unused"), records)
    visualize.save_curves(Path("unused"), [r for r in records if r["step"] < 40])
    begins = [
        {axes.get_legend().get_title().get_text(): axes.lines[0].get_xdata()[0] for axes in f.axes}
        for f in figures
    ]
    unready = {"Losses": 10, "Cons (Eq. 7), higher is better": 10, "Memory bank": 10}
    ready = {"Separ (Eq. 9), lower is better": 40, "Bank updates that passed the gate": 40}
    assert begins == [unready | ready, unready]


def test_a_run_without_records_yields_a_png(tmp_path):
    visualize.save_curves(tmp_path / "c.png", [], "csc")
    assert read(tmp_path / "c.png") is not None


def test_running_mean_is_centred():
    ramp = np.arange(100.0)
    np.testing.assert_allclose(visualize._running_mean(ramp, 5)[2:-2], ramp[2:-2])
    np.testing.assert_allclose(visualize._running_mean(ramp, 5)[[0, -1]], [1, 98])


def test_drawing_needs_neither_display_nor_pyplot(tmp_path):
    code = (
        "import sys, pathlib, numpy as np\n"
        "from csc_jax.reporting import visualize\n"
        f"visualize.save_curves(pathlib.Path({str(tmp_path / 'c.png')!r}), "
        "[{'step': 1, 'train/loss': 1.0}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {"MPLCONFIGDIR": str(tmp_path), "PATH": ""}  # neither DISPLAY nor MPLBACKEND
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert read(tmp_path / "c.png") is not None


HOSTILE_NAMES = ("<b>ä</b> & $x$", "空", "שלום", "مرحبا", "a\x1b[31m\n", "x" * 500, "🙂", "_y")


def test_names_that_cannot_be_drawn_give_way_to_ids():
    assert visualize._labels(HOSTILE_NAMES) == (
        *("<b>ä</b> & $x$", "class 1", "class 2", "class 3", "class 4", "class 5", "class 6", "_y"),
    )


def test_pictures_take_any_name(tmp_path):
    """Warnings of missing glyphs are errors here."""
    palette = np.arange(24, dtype=np.uint8).reshape(8, 3)
    picture = np.zeros((20, 30, 3), np.uint8)
    legend = visualize.with_legend(picture, palette, HOSTILE_NAMES)
    plain = visualize.with_legend(picture, palette, ("<b>ä</b> & $x$", *["class 1"] * 6, "_y"))
    assert legend.shape == plain.shape
    path = tmp_path / "a.png"
    visualize.save_panel(path, {"空": [picture]}, palette, HOSTILE_NAMES, "標題\n$", ["a\x1b空"])
    series = {"空 $x": [1.0] * 8}
    visualize.save_bars(path, series, HOSTILE_NAMES, "bars")
    visualize.save_lines(path, {"空 $x$ $": ([1, 2], [1.0, 2.0])}, "lines")


def test_a_contact_sheet_has_five_pictures_in_a_row_under_their_captions():
    pictures = [np.full((60, 120, 3), (10 + 30 * i, 200, 90), np.uint8) for i in range(6)]
    small = [visualize.thumbnail(picture) for picture in pictures]
    assert small[0].shape == (120, 240, 3)
    tall, tiny = np.zeros((5000, 2, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)
    assert [visualize.thumbnail(each).shape for each in (tall, tiny)] == [
        (240, 1, 3),
        (240, 240, 3),
    ]
    sheets = [
        visualize.draw_contact_sheet(small, captions, PALETTE, NAMES, "title")
        for captions in ([""] * 6, [f"{i}: 0.5  {'long name' * 99}\x1b" for i in range(6)])
    ]
    assert sheets[0].shape == sheets[1].shape  # whatever the captions
    places = [place_of(sheets[1], picture[0, 0]) for picture in pictures]
    assert {(y1 - y0, x1 - x0) for y0, y1, x0, x1 in places} == {(120, 240)}
    assert len({place[0] for place in places[:5]}) == 1
    assert places[5][0] > places[0][1]
    assert places[5][2] == places[0][2]
    for y0, _, _, x1 in places:  # each caption ends before the next picture begins
        np.testing.assert_array_equal(sheets[1][y0 - 24 : y0, x1 : x1 + 8], 255)
