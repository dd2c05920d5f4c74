"""csc-jax compare: differences between rows, seed by seed, and what may be concluded."""

import pytest

from csc_jax.commands import compare

RUNS = """row,partition,seed,miou,fence
base,1/8,0,40,10
base,1/8,1,64,20
base,1/8,2,45,30
base,1/4,0,60,5
ours,1/8,2,48,10
ours,1/8,0,41,10
ours,1/8,1,66,20
ours,1/8,3,99,99
ours,1/4,0,61.5,5
ours,1/4,0,70,5
flat,1/8,0,40.1,10
flat,1/8,1,64.1,20
alone,1/8,7,50,50
"""


@pytest.fixture
def runs(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(RUNS)
    return path


def table(text):
    """The cells of a Markdown table's body, row by row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def test_rows_are_compared_by_equal_seeds(runs, capsys):
    # By hand: 1, 2 and 3 points are t = 2 / (1 / sqrt(3)) = 3.464; Student's distribution of two
    # degrees of freedom has p = 1 - t / sqrt(t^2 + 2) = 0.0742 there and 4.303 at 97.5%.
    assert compare.main([str(runs), "--baseline=base"]) == 0
    out = capsys.readouterr().out
    assert table(out) == [
        ["ours", "1/8", "0: +1.0, 1: +2.0, 2: +3.0", "+2.0 ± 1.0", "-0.5 to +4.5", "0.074"],
        ["flat", "1/8", "0: +0.1, 1: +0.1", "+0.1 ± 0.0", "-", "-"],
        ["ours", "1/4", "0: +1.5", "+1.5", "-", "-"],
    ]
    assert "points above base" in out
    assert "1 run(s) that repeat" in out
    assert "Bonferroni" not in out  # of one comparison


def test_other_columns_rows_and_seeds_can_be_compared(runs, capsys):
    compare.main([str(runs), "--baseline=base", "--rows=ours", "--of=fence", "--seeds=1-2"])
    assert table(capsys.readouterr().out) == [
        ["ours", "1/8", "1: +0.0, 2: -20.0", "-10.0 ± 14.1", "-137.1 to +117.1", "0.5"]
    ]


def test_many_comparisons_are_counted(runs, capsys):
    runs.write_text(RUNS + "flat,1/8,2,48,1\n")
    compare.main([str(runs), "--baseline=base"])
    assert "2 comparisons" in (out := capsys.readouterr().out)
    assert "up to 10%; below 0.025" in out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (RUNS, ["--baseline=bass"], "no row 'bass'. It has base, ours, flat, alone"),
        (RUNS, ["--baseline=base", "--rows=our"], "no row 'our'"),
        (RUNS, ["--baseline=base", "--of=tree"], "no column 'tree'. It has row, partition"),
        (RUNS, ["--baseline=base", "--seeds=3"], "'3' is not FIRST-LAST"),
        (RUNS + "ours,1/2,0,,5\n", ["--baseline=base"], "line 15: could not convert"),
        (RUNS + "ours,1/2,0,nan,5\n", ["--baseline=base"], "line 15: miou is nan"),
        (RUNS + "ours,1/2,one,4,5\n", ["--baseline=base"], "seed must be an integer"),
        (RUNS + "ours,1/2\n", ["--baseline=base"], "line 15"),
        ("", ["--baseline=base"], "no column 'row'"),
    ],
)
def test_what_cannot_be_compared_is_explained(runs, capsys, text, arguments, message):
    runs.write_text(text)
    with pytest.raises(SystemExit) as ended:
        compare.main([str(runs), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "none.csv"), "--baseline=base"])
    assert "none.csv" in capsys.readouterr().err
