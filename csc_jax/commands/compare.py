"""Says how far the rows of a table differ, seed by seed.

Command:    csc-jax compare RUNS.csv --baseline=cutmix_mean_teacher
            … --rows=csc,bank+TopN  these rows alone
            … --of=fence            the IoU of a class in place of miou
            … --seeds=3-7           these seeds alone, such as those begun
                                    after a first look
RUNS.csv:   <table>_runs.csv of csc-jax reproduce:
            row,partition,seed,miou,<classes>
Prints:     Markdown, a line for each row and partition that shares a seed with
            the baseline: the differences in points, their mean ± standard
            deviation (n - 1), a 95% interval of the mean and the two-sided p
            of a paired t test.
Runs of one seed are a pair: a seed decides about the labelled images. The test
takes differences as normally distributed, which a handful of seeds cannot
show. Of several runs of one row, partition and seed the first counts.
"""

import argparse
import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

from csc_jax.reporting.compare import Difference, Scores, caution, differences


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0."""
    parser = argparse.ArgumentParser(
        prog="csc-jax compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    parser.add_argument("--baseline", required=True, metavar="ROW")
    parser.add_argument("--rows", help="by comma; default: all but the baseline")
    parser.add_argument("--of", default="miou", metavar="COLUMN", help="miou or a class")
    parser.add_argument("--seeds", type=_range, metavar="FIRST-LAST", help="default: all")
    options = parser.parse_args(arguments)
    try:
        scores, repeated = read(options.runs, options.of)
        known = list(dict.fromkeys(row for row, _, _ in scores))
        rows = options.rows.split(",") if options.rows else known
        for row in (options.baseline, *rows):
            if row not in known:
                raise ValueError(f"{options.runs} has no row {row!r}. It has {', '.join(known)}.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.seeds is not None:
        scores = {key: value for key, value in scores.items() if key[2] in options.seeds}
    print(markdown(differences(scores, options.baseline, rows), options.baseline, options.of))
    if repeated:
        print(f"\n{repeated} run(s) that repeat a row, partition and seed are left out.")
    return 0


def read(path: Path, column: str) -> tuple[Scores, int]:
    """Returns the scores of a column, and how many runs repeat another's row, partition and seed.

    Raises:
      OSError: the file cannot be read.
      ValueError: it has no such column, or something else than a number in it.
    """
    scores: Scores = {}
    repeated = 0
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        for name in ("row", "partition", "seed", column):
            if name not in names:
                raise ValueError(f"{path} has no column {name!r}. It has {', '.join(names)}.")
        for record in reader:
            try:
                key = (record["row"], record["partition"], int(record["seed"]))
                value = float(record[column])
                if not math.isfinite(value):
                    raise ValueError(f"{column} is {value}")
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {error}. seed must be an integer and "
                    f"{column} a number; leave out lines of runs that are not done."
                ) from error
            repeated += key in scores
            scores.setdefault(key, value)
    return scores, repeated


def markdown(found: Sequence[Difference], baseline: str, column: str) -> str:
    """Returns the table, and how many comparisons stand in it."""
    lines = [
        f"{column}, points above {baseline}:",
        "",
        "| row | partition | by seed | mean ± standard deviation | 95% interval | p |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        each = ", ".join(f"{seed}: {value:+.1f}" for seed, value in one.by_seed.items())
        spread = "" if one.deviation is None else f" ± {one.deviation:.1f}"
        between = "-" if one.interval is None else "{:+.1f} to {:+.1f}".format(*one.interval)
        p = "-" if one.p is None else f"{one.p:.2g}"
        mean = f"{one.mean:+.1f}{spread}"
        lines.append(f"| {one.row} | {one.partition} | {each} | {mean} | {between} | {p} |")
    if warning := caution(found):
        lines += ["", warning]
    return "\n".join(lines)


def _range(text: str) -> range:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, such as 0-4")
    return range(int(match[1]), int(match[2]) + 1)
