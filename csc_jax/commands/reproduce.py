"""Trains the rows of a table that are not there yet, and writes the table.

Command:    csc-jax reproduce --table=3 --config=cityscapes --seeds=3
            csc-jax reproduce --rows=csc,unimatch+csc --partitions=1/8,1/4 …
            … --set data.root=DIR train.steps=2000  further fields, of every run
            … --shard=1/4                           every fourth run
            … --dry_run                             commands and table alone
Rows:       a method of csc_jax/methods; METHOD+csc, the paper's module on top
            of it; baseline, L_p, bank, bank+TopN, bank+TopN+CSCM of Tables I
            to IV.
Hardware:   what the config says, one run at a time; shards run at the same
            time on as many devices or machines, if they share the folder
            --out. Whichever is last has the whole table.
Writes:     OUT/<config>/<row>/<partition>/seed<k>: work directory of each run
            OUT/<config>/<table>.md and .csv, and <table>_runs.csv: IoU of each
            class, minutes; csc-jax compare says how far its rows differ, seed
            by seed
The command can be stopped and given again: a run that was cut off continues,
one that is done is left alone. The score is that of the last step, not the
best one on the val images.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import csc_jax
from csc_jax.commands import at_least_one
from csc_jax.commands.tables import TABLES, Changes, row_changes
from csc_jax.config import files as config_files
from csc_jax.errors import Interrupted

RESULT = "reproduce.json"  # in a run's folder once it is done
RATE = "train/images_per_second"  # of metrics.jsonl; labelled and unlabelled images


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: a row in one partition with one seed."""

    row: str
    partition: str
    seed: int
    workdir: Path
    command: tuple[str, ...]  # of csc_jax.main

    @property
    def result(self) -> dict[str, Any] | None:
        """See `_result`; None as long as the run of this very command has not ended."""
        path = self.workdir / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        return result if tuple(result["command"]) == self.command else None

    @property
    def miou(self) -> float | None:
        """In percent; None as long as there is no result."""
        result = self.result
        return None if result is None else float(result["miou"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be compared."""

    name: str  # of the files
    title: str
    rows: dict[str, Changes]
    partitions: tuple[str, ...]
    paper: dict[str, dict[str, float]]  # empty where the config is of another data set
    note: str


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, or 1 if a run failed, or that of an interruption."""
    parser = argparse.ArgumentParser(
        prog="csc-jax reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="a name, or a file")
    parser.add_argument("--table", type=int, choices=TABLES, help="of the paper")
    parser.add_argument("--rows", type=_list, default=(), help="instead of a table's, by comma")
    parser.add_argument("--partitions", type=_list, default=(), help="such as 1/8,1/4")
    parser.add_argument("--seeds", type=at_least_one, default=1, help="0, 1, … of each row")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", type=Path, default=Path.cwd() / "runs" / "tables")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args(arguments)
    if not options.table and not options.rows:
        parser.error("give --table=1 … 8, or --rows=METHOD,METHOD")
    try:
        plan = _plan(options)
    except ValueError as error:
        parser.error(str(error))
    out = options.out / options.config.stem
    runs = _runs(plan, options.config, options.seeds, options.set, out)
    part, parts = options.shard
    failed = []
    for run in runs[part - 1 :: parts]:
        if run.miou is not None:
            continue
        print("$ " + shlex.join(run.command), flush=True)
        if options.dry_run:
            continue
        status = _train(run)
        if status == Interrupted.exit_status:
            return status
        if status:
            failed.append(run)
        print(_progress(plan, runs), flush=True)
    _write(plan, runs, out)
    print(f"\n{_markdown(plan, runs)}\n{out / plan.name}.md and .csv")
    for run in failed:
        print(f"failed: {run.workdir} (its own messages are above)", file=sys.stderr)
    return 1 if failed else 0


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, such as 1/4")
    return int(match[1]), int(match[2])


def _plan(options: argparse.Namespace) -> Plan:
    table = TABLES.get(options.table)
    known = table.rows if table else {}
    rows = {n: known[n] if n in known else row_changes(n) for n in options.rows or known}
    partitions = options.partitions or (tuple(table.partitions) if table else ("1/8",))
    config = runpy.run_path(config_files.find(str(options.config)))["get_config"]()
    paper, note = {}, ""
    if table and table.data == config.data.name:
        paper, note = table.paper, table.note
    elif table:
        note = f"The paper has this table for {table.data}; its figures are not comparable."
    title = f"Table {options.table}: {table.title}" if table else "Comparison"
    name = f"table{options.table}" if table else "comparison"
    return Plan(name, f"{title}, {options.config.stem}", rows, partitions, paper, note)


def _runs(plan: Plan, config: Path, seeds: int, fields: Sequence[str], out: Path) -> list[Run]:
    """Every run, seed by seed, so that one seed of all rows is there before the next begins."""
    runs = []
    for seed in range(seeds):
        for partition in plan.partitions:
            for row, changes in plan.rows.items():
                workdir = out / _folder(row) / _folder(partition) / f"seed{seed}"
                values = {"seed": seed, "data.labeled_fraction": partition, **changes}
                flags = [*(f"{name}={value}" for name, value in values.items()), *fields]
                command = (
                    *("python", "-m", "csc_jax.main", f"--config={config}"),
                    *(f"--workdir={workdir}", *(f"--config.{flag}" for flag in flags)),
                )
                runs.append(Run(row, partition, seed, workdir, command))
    return runs


def _folder(name: str) -> str:
    return re.sub(r"[^\w+=.-]+", "_", name)


def _train(run: Run) -> int:
    """Trains or continues a run; returns the exit status."""
    environment = dict(os.environ)
    home = str(Path(csc_jax.__file__).parents[1])
    if home != sysconfig.get_path("purelib"):  # a checkout, which need not be installed
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [home, os.environ.get("PYTHONPATH")])
        )
    status = subprocess.run([sys.executable, *run.command[1:]], env=environment).returncode
    if status == 0:
        (run.workdir / RESULT).write_text(json.dumps(_result(run), indent=1) + "\n")
    return status


def _result(run: Run) -> dict[str, Any]:
    """Returns what a run that has ended came to.

    Returns:
      "miou" and "classes", in percent, at the last step, of the network that the config evaluates;
      "minutes" of the steps alone, at the median rate, None if no rate was written; "command".
    """
    from csc_jax.reporting.writers import read_metrics

    config = json.loads((run.workdir / "config.json").read_text())
    metrics = read_metrics(run.workdir)
    of_network = f"val/{config['eval.network']}_"
    scores = [record for record in metrics if f"{of_network}miou" in record][-1]
    of_class = f"{of_network}iou/"
    classes = {k.removeprefix(of_class): v for k, v in scores.items() if k.startswith(of_class)}
    rates = [r[RATE] for r in metrics if RATE in r]
    images = scores["step"] * (config["batch.labeled"] + config["batch.unlabeled"])
    return {
        "command": run.command,
        "miou": 100 * scores[f"{of_network}miou"],
        "classes": {name: 100 * iou for name, iou in classes.items()},
        "minutes": images / statistics.median(rates) / 60 if rates else None,
    }


def _scores(runs: Sequence[Run], row: str, partition: str) -> tuple[list[float], int]:
    """Scores of a cell in percent, and how many it will have."""
    cell = [run.miou for run in runs if (run.row, run.partition) == (row, partition)]
    return [miou for miou in cell if miou is not None], len(cell)


def _progress(plan: Plan, runs: Sequence[Run]) -> str:
    """A small table of how many runs of each cell are done."""
    width = max(map(len, plan.rows))
    lines = [" " * width + "".join(f"{p:>8}" for p in plan.partitions)]
    for row in plan.rows:
        cells = [_scores(runs, row, partition) for partition in plan.partitions]
        lines.append(f"{row:<{width}}" + "".join(f"{f'{len(s)} of {n}':>8}" for s, n in cells))
    return "\n".join(lines)


def _markdown(plan: Plan, runs: Sequence[Run]) -> str:
    columns = ["row"]
    for partition in plan.partitions:
        columns += [f"{partition} ours", "paper", "difference"] if plan.paper else [partition]
    lines = [f"### {plan.title}", "", _line(columns), _line(["---"] * len(columns))]
    for row in plan.rows:
        cells = [row]
        for partition in plan.partitions:
            scores, count = _scores(runs, row, partition)
            cells.append(_mean(scores, count))
            if plan.paper:
                paper = plan.paper.get(row, {}).get(partition)
                cells.append("-" if paper is None else f"{paper:.2f}")
                difference = _difference(scores, paper)
                cells.append("-" if difference is None else f"{difference:+.2f}")
        lines.append(_line(cells))
    lines += ["", "mIoU in percent at the last step, mean ± standard deviation over seeds."]
    lines += [plan.note] if plan.note else []
    lines += ["", "```", *(shlex.join(run.command) for run in runs if run.seed == 0), "```"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(scores: Sequence[float], count: int) -> str:
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    missing = f" ({len(scores)} of {count} seeds)" if len(scores) < count else ""
    return f"{statistics.mean(scores):.2f}{spread}{missing}"


def _difference(scores: Sequence[float], paper: float | None) -> float | None:
    """Mean of the scores less the paper's figure; None if either is missing."""
    return statistics.mean(scores) - paper if scores and paper is not None else None


def _write(plan: Plan, runs: Sequence[Run], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{plan.name}.md").write_text(_markdown(plan, runs))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "partition", "paper", "mean", "std", "difference", "scores", "command"])
    for row in plan.rows:
        for partition in plan.partitions:
            scores, _ = _scores(runs, row, partition)
            paper = plan.paper.get(row, {}).get(partition)
            mean = statistics.mean(scores) if scores else None
            std = statistics.stdev(scores) if len(scores) > 1 else None
            command = next(r.command for r in runs if (r.row, r.partition) == (row, partition))
            figures = (paper, mean, std, _difference(scores, paper))
            each = " ".join(map(_number, scores))
            writer.writerow([row, partition, *map(_number, figures), each, shlex.join(command)])
    (out / f"{plan.name}.csv").write_text(text.getvalue())
    _write_runs(runs, out / f"{plan.name}_runs.csv")


def _write_runs(runs: Sequence[Run], path: Path) -> None:
    """Writes a line for each run that is done: the IoU of each class, in percent, and minutes."""
    # A run done by an older version has its mIoU alone.
    alone: dict[str, Any] = {"classes": {}, "minutes": None}
    done = [(run, alone | run.result) for run in runs if run.result]
    classes = list(dict.fromkeys(name for _, result in done for name in result["classes"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "partition", "seed", "miou", *classes, "minutes"])
    for run, result in done:
        figures = [result["miou"], *map(result["classes"].get, classes), result["minutes"]]
        writer.writerow([run.row, run.partition, run.seed, *map(_number, figures)])
    path.write_text(text.getvalue())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
